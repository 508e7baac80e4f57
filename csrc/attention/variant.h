// What tells the variants of an attention kernel apart, beside its element type and head size. csrc/variants.cmake
// lists those that are compiled.
#pragma once

namespace jax_bsk::attention::cuda {

// Rows that stay with a CTA: queries of the forward, keys of the backward.
enum class Tile { k64, k128 };

// What a variant takes besides queries, keys and values: a soft cap (the word stands for a scale below
// kLeastPlainScale, too), and gates. "Or not" is a branch at run time.
enum class Features {
  kAny,          // a soft cap or not, gates or not
  kUngated,      // a soft cap or not, no gates
  kGated,        // a soft cap or not, gates
  kPlain,        // neither
  kSoftCap,      // a soft cap, no gates
  kPlainGated,   // no soft cap, gates
  kPlainBiased,  // no soft cap, no gates, a bias or dropout or both
};

constexpr bool Takes(Features features, bool soft_cap, bool gates, bool extras) {
  switch (features) {
    case Features::kAny:
      return true;
    case Features::kUngated:
      return !gates && !extras;
    case Features::kGated:
      return gates;
    case Features::kPlain:
      return !soft_cap && !gates && !extras;
    case Features::kSoftCap:
      return soft_cap && !gates && !extras;
    case Features::kPlainGated:
      return !soft_cap && gates && !extras;
    case Features::kPlainBiased:
      return !soft_cap && !gates;
  }
  return false;
}

}  // namespace jax_bsk::attention::cuda
