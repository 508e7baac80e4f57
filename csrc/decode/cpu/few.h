// A part for a tile of few rows, where reading keys and values is most of the work: they are used where they lie, with
// the lanes along the head, and nothing is packed. A score is then a sum across lanes, of which as many are made at
// once as there are lanes: of a group of rows by a few keys.
#pragma once

#include "block.h"
#include "many.h"
#include "partial.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

// Rows of a group: each group reads a block's keys again, from a cache.
template <class C>
constexpr int kGroupRows = kLanes<C> < 4 ? kLanes<C> : 4;

template <class C>
struct FewScratch {
  C* query;   // [kFewRows, head_dim]
  C* scores;  // [kFewRows, kBlock]

  FewScratch(Carver& carver, const Shape& s) {
    query = carver.Take<C>(kFewRows * s.head_dim);
    scores = carver.Take<C>(kFewRows * kBlock);
  }
};

// Whether a tile is for this file.
template <class C>
bool HasFewRows(const Shape& s, int64_t rows) {
  return rows <= kFewRows && s.head_dim % kLanes<C> == 0 && s.value_dim % kLanes<C> == 0;
}

// Lane i of the result is the sum of all lanes of sums[i]: each round adds halves of two vectors, whose lanes alternate
// from then on.
template <class C>
JAX_BSK_INLINE Vec<C> SumLanes(Vec<C> (&sums)[kLanes<C>]) {
#pragma GCC unroll 4
  for (int n = kLanes<C> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      Vec<C> low, high;
      Interleave<C>(sums[i], sums[i + n], low, high);
      sums[i] = low + high;
    }
  }
  return sums[0];
}

// The lines of a row, into the second-level cache.
template <class E>
JAX_BSK_INLINE void Prefetch(const E* row, int64_t columns) {
  const char* const first = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < columns * static_cast<int64_t>(sizeof(E)); byte += 64) {
    __builtin_prefetch(first + byte, 0, 2);
  }
}

// scores[row][key] of a group of rows. Meanwhile the keys of the next block come nearer.
template <class C, class E, int kRows>
JAX_BSK_NO_INLINE void FewScores(const C* query, int64_t head_dim, const Block<E>& block, const Block<E>* next,
                                 C* scores) {
  constexpr int kKeys = kLanes<C> / kRows;
  for (int64_t k = 0; k < kBlock; k += kKeys) {
    const E* keys[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      keys[i] = block.key[k + i];
      if (next != nullptr) Prefetch(next->key[k + i], head_dim);
    }
    Vec<C> sums[kLanes<C>] = {};
    for (int64_t d = 0; d < head_dim; d += kLanes<C>) {
      Vec<C> rows[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) rows[r] = Load<C>(query + r * head_dim + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec<C> key = Elements<C, E>::Load(keys[i] + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r * kKeys + i] += rows[r] * key;
      }
    }
    C lanes[kLanes<C>];
    Store<C>(lanes, SumLanes<C>(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores + r * kBlock + k, lanes + r * kKeys, kKeys * sizeof(C));
  }
}

// out[row] = out[row] * rescale[row] + sum over keys of weights[row][key] * value[key], of a group of rows and as many
// columns as there are vectors. The first of the groups and columns brings the next block's values nearer.
template <class C, class E, int kRows, int kVectors>
JAX_BSK_INLINE void FewValueColumns(const C* weights, const C* rescale, const Block<E>& block, int64_t column,
                                    const Block<E>* next, int64_t value_dim, C* out, int64_t ld) {
  Vec<C> sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < kBlock; ++k) {
    if (next != nullptr) Prefetch(next->value[k], value_dim);
    Vec<C> values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) values[v] = Elements<C, E>::Load(block.value[k] + column + v * kLanes<C>);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<C> weight = Broadcast<C>(weights[r * kBlock + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weight * values[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      C* const to = out + r * ld + column + v * kLanes<C>;
      Store<C>(to, Load<C>(to) * rescale[r] + sums[r][v]);
    }
  }
}

template <class C, class E, int kRows>
JAX_BSK_NO_INLINE void FewValues(const C* weights, const C* rescale, const Block<E>& block, const Block<E>* next,
                                 int64_t value_dim, C* out, int64_t ld) {
  constexpr int kVectors = kTileVectors;
  int64_t column = 0;
  for (; column + kVectors * kLanes<C> <= value_dim; column += kVectors * kLanes<C>) {
    FewValueColumns<C, E, kRows, kVectors>(weights, rescale, block, column, next, value_dim, out, ld);
    next = nullptr;
  }
  for (; column < value_dim; column += kLanes<C>) {
    FewValueColumns<C, E, kRows, 1>(weights, rescale, block, column, next, value_dim, out, ld);
    next = nullptr;
  }
}

// Probabilities in place of a row's scores, [kBlock], and its maximum and sum up to date. Returns what the sums so far
// are multiplied by.
template <class C>
C SoftmaxRow(C* scores, C& row_maximum, C& row_sum) {
  C lanes[kLanes<C>];
  Vec<C> largest = Load<C>(scores);
  for (int64_t k = kLanes<C>; k < kBlock; k += kLanes<C>) largest = Max<C>(Load<C>(scores + k), largest);
  Store<C>(lanes, largest);
  const C before = row_maximum;
  C maximum = before;
  for (int i = 0; i < kLanes<C>; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
  const C shift = maximum == -kInfinity<C> ? C(0) : maximum;
  Vec<C> sums = {};
  for (int64_t k = 0; k < kBlock; k += kLanes<C>) {
    const Vec<C> probability = Exp2<C>(Load<C>(scores + k) - shift);
    Store<C>(scores + k, probability);
    sums += probability;
  }
  Store<C>(lanes, sums);
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += lanes[i];
  Store<C>(lanes, Exp2<C>(Broadcast<C>(before - shift)));
  row_maximum = maximum;
  row_sum = row_sum * lanes[0] + sum;
  return lanes[0];
}

template <int kRows>
struct Group {
  static constexpr int rows = kRows;
};

// Calls visit(first row, Group) for groups that together have all rows, and perhaps some of padding.
template <class C, class Visit>
JAX_BSK_INLINE void ForGroups(int64_t rows, const Visit& visit) {
  for (int64_t first = 0; first < rows;) {
    if (rows - first == 1) {
      visit(first, Group<1>());
      first += 1;
    } else if (rows - first == 2 || kGroupRows<C> == 2) {
      visit(first, Group<2>());
      first += 2;
    } else {
      visit(first, Group<kGroupRows<C>>());
      first += kGroupRows<C>;
    }
  }
}

template <class C, class E>
void FewRowsPart(const ForwardParams& p, const Tile& tile, Blocks<E>& blocks, int64_t positions, const E* zeros,
                 const FewScratch<C>& x, const Partial<C>& result) {
  const Shape& s = p.shape;
  const LogitUnits<C> units(p);
  Fill<C>(x.query, kFewRows * s.head_dim, C(0));
  PackQueries<C, E>(p, tile, units.packed, x.query, s.head_dim);
  result.Clear();

  Block<E> two[2];
  Block<E>*block = &two[0], *next = &two[1];
  blocks.Next(positions, *block);
  while (block->count > 0) {
    positions -= block->count;
    blocks.Next(positions, *next);
    const Block<E>* const ahead = next->count > 0 ? next : nullptr;
    bool spoiled[kBlock], any_spoiled = false;
    if (block->masked) any_spoiled = CleanValues<C>(*block, s.value_dim, zeros, spoiled);
    C rescale[kFewRows] = {};

    // --- S = Q K^T
    ForGroups<C>(tile.rows, [&](int64_t r, auto group) {
      FewScores<C, E, decltype(group)::rows>(x.query + r * s.head_dim, s.head_dim, *block, r == 0 ? ahead : nullptr,
                                             x.scores + r * kBlock);
    });
    if (units.capped) CapScores<C>(x.scores, kBlock, tile.rows, kBlock, units.cap);
    if (block->masked) {
      ForPairs(p, tile, blocks.mask, *block, [&](int64_t r, int64_t k, bool attends) {
        C& score = x.scores[r * kBlock + k];
        score = !attends ? -kInfinity<C> : block->missing[k] ? kNaN<C> : score;
      });
      for (int64_t r = 0; r < tile.rows; ++r) {
        Fill<C>(x.scores + r * kBlock + block->count, kBlock - block->count, -kInfinity<C>);
      }
    }

    // --- P = 2^(S - maximum)
    for (int64_t r = 0; r < tile.rows; ++r) {
      rescale[r] = SoftmaxRow<C>(x.scores + r * kBlock, result.maximum[r], result.sum[r]);
    }
    if (any_spoiled) {
      ForPairs(p, tile, blocks.mask, *block, [&](int64_t r, int64_t k, bool attends) {
        if (spoiled[k]) x.scores[r * kBlock + k] = attends ? kNaN<C> : C(0);
      });
    }

    // --- O = O * rescale + P V
    ForGroups<C>(tile.rows, [&](int64_t r, auto group) {
      FewValues<C, E, decltype(group)::rows>(x.scores + r * kBlock, rescale + r, *block, r == 0 ? ahead : nullptr,
                                             s.value_dim, result.out + r * result.ld, result.ld);
    });
    Block<E>* const used = block;
    block = next;
    next = used;
  }
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
