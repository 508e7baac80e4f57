// Dropout's factors of a block of pairs: 0 where a pair is dropped, else Dropout's scale. `own` is along the lanes, as
// in add_bias.h. ../dropout.h says which pairs share a word.
#pragma once

#include "block_list.h"
#include "cpu/scratch.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

// Null without dropout.
template <class C>
struct DropoutScratch {
  uint32_t* query = nullptr;  // [block_q / 2] what the queries contribute to the words
  uint32_t* key = nullptr;    // [block_kv / 2]
  uint32_t* word = nullptr;   // [w / 2] words of one row
  C* factor = nullptr;        // [o, w]

  template <class Params>
  void Take(const Params& p, Carver& carver) {
    if (!Drops(p.dropout)) return;
    const Shape& s = p.shape;
    query = carver.Take<uint32_t>(s.block_q / 2);
    key = carver.Take<uint32_t>(s.block_kv / 2);
    word = carver.Take<uint32_t>((s.block_q > s.block_kv ? s.block_q : s.block_kv) / 2);
    factor = carver.Take<C>(s.block_q * s.block_kv);
  }
};

// Of the 16 positions from a multiple of 16 on, 8 have words of their own.
JAX_BSK_INLINE int64_t WordsOf(int64_t positions) { return (positions + 15) / 16 * 8; }

JAX_BSK_INLINE int64_t PositionOfWord(int64_t first, int64_t word) { return first + (word >> 3) * 16 + (word & 7); }

inline void PackQueryWords(uint32_t head_key, int64_t first, int64_t queries, uint32_t* to) {
  for (int64_t i = 0; i < WordsOf(queries); ++i) {
    to[i] = DropoutQueryWord(head_key, static_cast<int>(PositionOfWord(first, i)));
  }
}

inline void PackKeyWords(int64_t first, int64_t keys, uint32_t* to) {
  for (int64_t i = 0; i < WordsOf(keys); ++i) to[i] = DropoutKeyWord(static_cast<int>(PositionOfWord(first, i)));
}

// The factors of `own` x `others` pairs, from the words packed before.
template <class C>
JAX_BSK_NO_INLINE void DrawFactors(const DropoutScratch<C>& x, int threshold, bool queries_along_lanes, int64_t own,
                                   int64_t others, int64_t ld) {
  const uint32_t* const own_words = queries_along_lanes ? x.query : x.key;
  const uint32_t* const other_words = queries_along_lanes ? x.key : x.query;
  const int64_t words = WordsOf(own);
  const C scale = sizeof(C) == sizeof(double) ? C(256) / C(256 - threshold) : C(DropoutScale(threshold));
  for (int64_t first = 0; first < others; first += 16) {
    for (int64_t row = first; row < Minimum(first + 8, others); ++row) {
      const uint32_t other_word = other_words[first / 2 + (row - first)];
      for (int64_t i = 0; i < words; ++i) x.word[i] = DropoutWord(own_words[i], other_word);
      for (int64_t o = row; o < Minimum(row + 16, others); o += 8) {
        for (int half = 0; half < 2; ++half) {
          const int own_place = 8 * half, other_place = static_cast<int>(o & 8);
          const int byte =
              queries_along_lanes ? DropoutByte(own_place, other_place) : DropoutByte(other_place, own_place);
          for (int64_t i = 0; i < words; i += 8) {
            C* const to = x.factor + o * ld + 2 * i + 8 * half;
            for (int k = 0; k < 8; ++k) to[k] = IsDropped(x.word[i + k], byte, threshold) ? C(0) : scale;
          }
        }
      }
    }
  }
}

template <class C>
void MultiplyByFactors(const DropoutScratch<C>& x, C* pairs, int64_t ld, int64_t others, int64_t vectors) {
  for (int64_t o = 0; o < others; ++o) {
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      Store<C>(pairs + o * ld + v, Load<C>(pairs + o * ld + v) * Load<C>(x.factor + o * ld + v));
    }
  }
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
