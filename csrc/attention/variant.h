// What tells the variants of an attention kernel apart, beside its element type and head size. csrc/variants.py lists
// those that are compiled.
#pragma once

namespace jax_bsk::attention::cuda {

// Rows that stay with a CTA: queries of the forward, keys of the backward. k64Feeder: 64 queries, with one producer
// warp (attention/sm90/fwd_feeder.cuh).
enum class Tile { k64, k128, k64Feeder };

// What a variant takes besides queries, keys and values: a soft cap (the word stands for a scale below
// kLeastPlainScale, too), gates, and extras, which are biases and dropout. "Or not" is a branch at run time.
enum class Features {
  kAny,          // everything: a soft cap or not, gates or not, extras or not
  kUngated,      // a soft cap or not, neither gates nor extras
  kExtended,     // a soft cap or not, and gates or extras or both
  kPlain,        // none of them
  kSoftCap,      // a soft cap alone
  kPlainGated,   // gates alone
  kPlainExtras,  // extras alone
};

constexpr bool Takes(Features features, bool soft_cap, bool gates, bool extras) {
  switch (features) {
    case Features::kAny:
      return true;
    case Features::kUngated:
      return !gates && !extras;
    case Features::kExtended:
      return gates || extras;
    case Features::kPlain:
      return !soft_cap && !gates && !extras;
    case Features::kSoftCap:
      return soft_cap && !gates && !extras;
    case Features::kPlainGated:
      return !soft_cap && gates && !extras;
    case Features::kPlainExtras:
      return !soft_cap && !gates && extras;
  }
  return false;
}

}  // namespace jax_bsk::attention::cuda
