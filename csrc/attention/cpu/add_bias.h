// Adding the bias to a block of logits. Scratch holds logits [other][own] with `own` along the lanes: queries in the
// forward and for dQ, keys for dK and dV and the bias's own gradient.
//
// Whole rows of lanes are added in each of a term's layouts, and each by one fused multiplication and addition, so that
// all kernels have equal logits to the last bit, whichever side is along their lanes.
#pragma once

#include "block_list.h"
#include "cpu/elements.h"
#include "cpu/exponential.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

// One term of the bias within a block: a pair's element lies at first + own * own_step + other * other_step.
struct Term {
  const void* first;
  bool wide;  // of the statistics type, which is the compute type; else of the queries' type
  int64_t own_step;
  int64_t other_step;
};

struct Terms {
  int count;
  Term term[3];
};

template <class C, class E>
JAX_BSK_INLINE const void* ElementAt(const void* array, bool wide, int64_t index) {
  return wide ? static_cast<const void*>(static_cast<const C*>(array) + index) : static_cast<const E*>(array) + index;
}

// The number of the tile that an entry adds, of `count`; negative: none.
JAX_BSK_INLINE int64_t BiasTileOf(const int32_t* numbers, int64_t count, int64_t index) {
  return Minimum(numbers[index], count - 1);
}

// The terms of the block whose first pair is (first_query, first_key). `tile_numbers` are bias.row_tiles or
// bias.col_tiles of `list`, and `row` and `entry` say which of them.
template <class C, class E>
JAX_BSK_NO_INLINE Terms TermsOfBlock(const Bias& bias, const Shape& s, const BlockList& list,
                                     const int32_t* tile_numbers, int64_t b, int64_t h, const BlockRow& row,
                                     int64_t entry, int64_t first_query, int64_t first_key, bool queries_along_lanes) {
  Terms result = {};
  const auto add = [&](const void* first, bool wide, int64_t step_q, int64_t step_k) {
    result.term[result.count++] = {first, wide, queries_along_lanes ? step_q : step_k,
                                   queries_along_lanes ? step_k : step_q};
  };
  if (bias.dense != nullptr) {
    const int64_t step_q = bias.dense_q == 1 ? 0 : bias.dense_kv, step_k = bias.dense_kv == 1 ? 0 : 1;
    const int64_t matrix = LeadingIndex(bias.dense_batch, bias.dense_heads, b, h) * bias.dense_q * bias.dense_kv;
    add(ElementAt<C, E>(bias.dense, bias.dense_wide, matrix + first_query * step_q + first_key * step_k),
        bias.dense_wide, step_q, step_k);
  }
  if (bias.distances != nullptr) {
    const int64_t vector = LeadingIndex(bias.distances_batch, bias.distances_heads, b, h) * (s.q_len + s.kv_len - 1);
    add(static_cast<const C*>(bias.distances) + vector + first_key - first_query + s.q_len - 1, true, -1, 1);
  }
  if (bias.tiles != nullptr) {
    const int64_t index = LeadingIndex(list.batch, list.heads, b, h) * list.capacity + row.begin + entry;
    const int64_t number = BiasTileOf(tile_numbers, bias.tiles_count, index);
    const int64_t tile = LeadingIndex(bias.tiles_batch, bias.tiles_heads, b, h) * bias.tiles_count + number;
    if (number >= 0) {
      add(static_cast<const C*>(bias.tiles) + tile * bias.tiles_q * bias.tiles_kv, true,
          bias.tiles_q == 1 ? 0 : bias.tiles_kv, bias.tiles_kv == 1 ? 0 : 1);
    }
  }
  return result;
}

// Biases below this one are looked at more closely: the sum of three might be infinite in base-2 units.
template <class C>
constexpr C kSuspectBias = kNoLogSumExp<C> / 8;

// Adds one term, in base-2 units, to the logits of `own` x `others` pairs. Returns whether some element of it is below
// kSuspectBias.
template <class C, class E>
JAX_BSK_NO_INLINE bool AddTerm(const E* from, const Term& term, int64_t own, int64_t others, C* logits, int64_t ld) {
  constexpr int n = kLanes<C>;
  const int64_t own_step = term.own_step, other_step = term.other_step;
  const Vec<C> unit = Broadcast<C>(static_cast<C>(kLog2E));
  Vec<C> lowest = {};
  const auto add = [&](C* to, Vec<C> bias) {
    lowest = bias < lowest ? bias : lowest;
    Store<C>(to, MultiplyAdd<C>(bias, unit, Load<C>(to)));
  };
  if (own_step == 0) {
    for (int64_t o = 0; o < others; ++o) {
      const Vec<C> bias = Broadcast<C>(LoadPart<C>(from + o * other_step, 1)[0]);
      for (int64_t v = 0; v < own; v += n) add(logits + o * ld + v, bias);
    }
  } else if (own_step == 1) {
    for (int64_t o = 0; o < others; ++o) {
      for (int64_t v = 0; v < own; v += n) add(logits + o * ld + v, LoadUpTo<C>(from + o * other_step + v, own - v));
    }
  } else if (own_step == -1) {
    // The lanes in reverse: the last one's element is the first in memory.
    for (int64_t o = 0; o < others; ++o) {
      const E* const row = from + o * other_step;
      int64_t v = 0;
      for (; v + n <= own; v += n) {
        add(logits + o * ld + v, Reverse<C>(Elements<C, E>::Load(row - v - (n - 1))));
      }
      if (v < own) {
        Vec<C> bias = {};
        for (int64_t k = 0; k < own - v; ++k) bias[k] = LoadPart<C>(row - v - k, 1)[0];
        add(logits + o * ld + v, bias);
      }
    }
  } else {
    // Rows of the array run across the lanes: squares of it are transposed.
    for (int64_t v = 0; v < own; v += n) {
      for (int64_t o = 0; o < others; o += n) {
        Vec<C> square[n];
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
          square[k] = v + k < own ? LoadUpTo<C>(from + (v + k) * own_step + o, others - o) : Vec<C>{};
        }
        TransposeSquare<C>(square);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
          if (o + k < others) add(logits + (o + k) * ld + v, square[k]);
        }
      }
    }
  }
  bool suspect = false;
  for (int k = 0; k < n; ++k) suspect |= lowest[k] < kSuspectBias<C>;
  return suspect;
}

template <class C, class E>
bool AddTerms(const Terms& terms, int64_t own, int64_t others, C* logits, int64_t ld) {
  bool suspect = false;
  for (int t = 0; t < terms.count; ++t) {
    const Term& term = terms.term[t];
    suspect |= term.wide ? AddTerm<C>(static_cast<const C*>(term.first), term, own, others, logits, ld)
                         : AddTerm<C>(static_cast<const E*>(term.first), term, own, others, logits, ld);
  }
  return suspect;
}

// What a bias needs beside the kernels' own scratch; null without one.
template <class C>
struct BiasScratch {
  C* alone = nullptr;         // [o, w] the bias in base-2 units, where some of it is -inf
  C* slope = nullptr;         // [o, w] the soft cap's derivative, if it is wanted
  uint32_t* words = nullptr;  // [block_q, block_kv / 32] bits of the pairs whose bias is not -inf and that attend

  template <class Params>
  void Take(const Params& p, bool with_slope, Carver& carver) {
    if (!HasBias(p.bias)) return;
    const int64_t pairs = p.shape.block_q * p.shape.block_kv;
    alone = carver.Take<C>(pairs);
    if (with_slope && p.soft_cap != 0) slope = carver.Take<C>(pairs);
    words = carver.Take<uint32_t>(pairs / 32);
  }
};

// Applies the soft cap, of which `slope` (unless null) receives the derivative.
template <class C>
void CapLogits(C* logits, int64_t ld, int64_t others, int64_t vectors, C cap, C* slope) {
  for (int64_t o = 0; o < others; ++o) {
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      const Vec<C> capped = Tanh<C>(Load<C>(logits + o * ld + v));
      if (slope != nullptr) Store<C>(slope + o * ld + v, C(1) - capped * capped);
      Store<C>(logits + o * ld + v, cap * capped);
    }
  }
}

// dS times the soft cap's derivative. The 0 of a pair that does not attend stays 0, whatever its logit was.
template <class C>
void MultiplyBySlope(C* gradient, int64_t ld, int64_t others, int64_t vectors, const C* slope) {
  for (int64_t o = 0; o < others; ++o) {
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      const Vec<C> before = Load<C>(gradient + o * ld + v);
      Store<C>(gradient + o * ld + v, Select<C>(before == C(0), before, before * Load<C>(slope + o * ld + v)));
    }
  }
}

// Makes logits of scores: soft cap (in base-2 units; 0: none), then bias. Returns whether the bias of some pairs may be
// -inf; then x.alone holds the bias. In base-2 units it is -inf below ln(2) times the most negative number, too.
template <class C, class E>
bool AddBias(const Terms& terms, const BiasScratch<C>& x, C cap, int64_t own, int64_t others, C* logits, int64_t ld) {
  if (cap != 0) CapLogits<C>(logits, ld, others, RoundUpToLanes<C>(own) / kLanes<C>, cap, x.slope);
  if (!AddTerms<C, E>(terms, own, others, logits, ld)) return false;
  for (int64_t o = 0; o < others; ++o) Fill<C>(x.alone + o * ld, RoundUpToLanes<C>(own), C(0));
  AddTerms<C, E>(terms, own, others, x.alone, ld);
  return true;
}

// Pairs whose bias is -inf do not attend: takes them out of a tile as PackTile writes it, which is first made for a
// full block.
template <class C>
void MaskQueries(const BiasScratch<C>& x, bool full, int64_t words, int64_t queries, int64_t keys, Lane<C>* tile,
                 int64_t ld) {
  for (int64_t w = 0; full && w < words; ++w) {
    for (int64_t q = 0; q < ld; ++q) tile[w * ld + q] = q < queries ? ~Lane<C>(0) : Lane<C>(0);
  }
  for (int64_t k = 0; k < keys; ++k) {
    Lane<C>* const row = tile + (k >> 5) * ld;
    for (int64_t q = 0; q < queries; ++q) {
      row[q] &= ~(Lane<C>(x.alone[k * ld + q] == -kInfinity<C>) << (k & 31));
    }
  }
}

// The same with the keys along the lanes, of the tile's own words (null: a full block). Returns the words left over.
template <class C>
const uint32_t* MaskKeys(const BiasScratch<C>& x, const uint32_t* tile, int64_t queries, int64_t keys, int64_t ld) {
  for (int64_t q = 0; q < queries; ++q) {
    for (int64_t w = 0; w < ld / 32; ++w) {
      uint32_t masked = 0;
      for (int64_t k = 32 * w; k < Minimum(32 * w + 32, keys); ++k) {
        masked |= uint32_t(x.alone[q * ld + k] == -kInfinity<C>) << (k & 31);
      }
      x.words[q * (ld / 32) + w] = (tile != nullptr ? tile[q * (ld / 32) + w] : ~0u) & ~masked;
    }
  }
  return x.words;
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
