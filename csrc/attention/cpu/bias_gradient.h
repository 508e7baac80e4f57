// The gradient of one term of the bias: dS of the pairs that each of its elements was added to, summed. A task owns
// some elements of one example and head of the term (BiasGradientParts), finds the entries that have them in the
// query-major lists of all examples and heads that share the term, one after the other, and computes dS of these
// entries with the keys along the lanes. So sums are made in the same order on any number of threads.
//
// Elements whose task meets a row of a list that cannot be followed are NaN: of a dense term with an element per query
// those of the row's block of queries, of every other term all of the example and head.
#pragma once

#include "backward.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

template <class C>
struct BiasGradientScratch : BackwardScratch<C> {
  C* sum;  // [block_q, block_kv] of the dense term, or [block_q + block_kv] distances of a block
  size_t bytes;

  BiasGradientScratch(const BiasGradientParams& p, void* memory) : BackwardScratch<C>(p, memory) {
    const size_t before = BackwardScratch<C>::bytes;
    Carver carver(memory == nullptr ? nullptr : static_cast<char*>(memory) + before);
    const Shape& s = p.shape;
    sum = carver.Take<C>(s.block_q * s.block_kv + s.block_q + s.block_kv + kLanes<C>);
    bytes = before + carver.Bytes();
  }
};

// One block of queries of one head.
struct QueryBlock {
  int64_t b, h, first, queries;
};

// Loads the rows of Q and dO of a block, and their statistics.
template <class C, class E>
void LoadQueries(const BiasGradientParams& p, const BiasGradientScratch<C>& x, const QueryBlock& at) {
  const Shape& s = p.shape;
  const int64_t row_index = (at.b * s.q_len + at.first) * s.heads + at.h;
  PackRows<C>(static_cast<const E*>(p.query) + row_index * s.head_dim, s.heads * s.head_dim, at.queries, s.head_dim,
              x.other_head, RoundUpToLanes<C>(s.head_dim), LogitUnits<C>(p).packed);
  PackRows<C>(static_cast<const E*>(p.dout) + row_index * s.value_dim, s.heads * s.value_dim, at.queries, s.value_dim,
              x.other_value, RoundUpToLanes<C>(s.value_dim));
  PackStatistics<C>(p, (at.b * s.heads + at.h) * s.q_len + at.first, at.queries, at.queries, x);
  Fill<uint8_t>(x.bad, at.queries, 0);
  if (Drops(p.dropout)) {
    PackQueryWords(p.dropout.keys[at.b * s.heads + at.h], at.first, at.queries, x.dropout.query);
  }
}

// dS of an entry, [query][key] with rows of block_kv, without the soft cap's derivative and the scale.
template <class C, class E>
void EntryGradient(const BiasGradientParams& p, const BiasGradientScratch<C>& x, const QueryBlock& at,
                   const BlockRow& row, int64_t entry, int64_t first_key, int64_t keys) {
  const Shape& s = p.shape;
  const LogitUnits<C> units(p);
  const int64_t kv_head = at.h / (s.heads / s.kv_heads);
  const int64_t key_index = (at.b * s.kv_len + first_key) * s.kv_heads + kv_head;
  const int64_t vectors = RoundUpToLanes<C>(keys) / kLanes<C>;
  const int64_t ld = s.block_kv;
  bool partial = row.tiles[entry] >= 0;
  const uint32_t* tile = partial ? TileWords(p.tiles, s, at.b, at.h, row.tiles[entry]) : nullptr;

  // --- S = Q K^T and dP = dO V^T
  PackTransposed<C>(static_cast<const E*>(p.key) + key_index * s.head_dim, s.kv_heads * s.head_dim, keys, s.head_dim,
                    C(1), x.own_head, ld);
  PackTransposed<C>(static_cast<const E*>(p.value) + key_index * s.value_dim, s.kv_heads * s.value_dim, keys,
                    s.value_dim, C(1), x.own_value, ld);
  Multiply<C, Operand::kRows, Into::kStore>(x.other_head, RoundUpToLanes<C>(s.head_dim), x.own_head, ld, at.queries,
                                            vectors, s.head_dim, x.scores, ld);
  Multiply<C, Operand::kRows, Into::kStore>(x.other_value, RoundUpToLanes<C>(s.value_dim), x.own_value, ld, at.queries,
                                            vectors, s.value_dim, x.gradient, ld);

  // --- S with the bias, m dP
  const Terms terms =
      TermsOfBlock<C, E>(p.bias, s, p.rows, p.bias.row_tiles, at.b, at.h, row, entry, at.first, first_key, false);
  if (AddBias<C, E>(terms, x.bias, units.capped ? units.cap : C(0), keys, at.queries, x.scores, ld)) {
    tile = MaskKeys<C>(x.bias, tile, at.queries, keys, ld);
    partial = true;
  }
  if (Drops(p.dropout)) {
    PackKeyWords(first_key, keys, x.dropout.key);
    DrawFactors<C>(x.dropout, p.dropout.threshold, false, keys, at.queries, ld);
    MultiplyByFactors<C>(x.dropout, x.gradient, ld, at.queries, vectors);
  }

  // --- dS = P * (g * dP - delta)
  const C* const gates = RowGates<const C>(p.gates, p.rows, s, at.b, at.h, row);
  const auto gradient = ChooseKeyGradient<C>(partial, false, gates != nullptr);
  gradient(x, ld, at.queries, vectors, C(0), tile, gates != nullptr ? gates[entry] : C(1));
}

// Adds dS to the elements to[q * step_q + k * step_k] of its pairs; step_k is 0 or 1.
template <class C>
void AddGradient(const C* gradient, int64_t ld, int64_t queries, int64_t keys, C* to, int64_t step_q, int64_t step_k) {
  constexpr int n = kLanes<C>;
  if (step_k == 1 && step_q == 0) {
    for (int64_t k = 0; k < keys; k += n) {
      Vec<C> sum = {};
      for (int64_t q = 0; q < queries; ++q) sum += Load<C>(gradient + q * ld + k);
      StoreUpTo<C>(to + k, LoadUpTo<C>(to + k, keys - k) + sum, keys - k);
    }
  } else if (step_k == 1) {
    for (int64_t q = 0; q < queries; ++q) {
      C* const row = to + q * step_q;
      for (int64_t k = 0; k < keys; k += n) {
        StoreUpTo<C>(row + k, LoadUpTo<C>(row + k, keys - k) + Load<C>(gradient + q * ld + k), keys - k);
      }
    }
  } else {
    C total = 0;
    for (int64_t q = 0; q < queries; ++q) {
      Vec<C> sums = {};
      for (int64_t k = 0; k < keys; k += n) sums += LoadUpTo<C>(gradient + q * ld + k, keys - k);
      C sum = 0;
      for (int k = 0; k < n; ++k) sum += sums[k];
      if (step_q == 0) {
        total += sum;
      } else {
        to[q * step_q] += sum;
      }
    }
    if (step_q == 0) to[0] += total;
  }
}

// Calls use(at, row, entry, first_key, keys), with dS in x.gradient, for every entry of every query block in
// [first_row, rows_end) that `wants` (row, i, entry) chooses: for all examples and heads that have the term's example
// and head `leading`. Returns whether all lists could be followed.
template <class C, class E, class Wants, class Use>
bool VisitEntries(const BiasGradientParams& p, const BiasGradientScratch<C>& x, int64_t term_batch, int64_t term_heads,
                  int64_t leading, int64_t first_row, int64_t rows_end, const Wants& wants, const Use& use) {
  const Shape& s = p.shape;
  bool followed = true;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      if (LeadingIndex(term_batch, term_heads, b, h) != leading) continue;
      const int64_t q_length = QueryLength(p.lengths, s, b), kv_length = KeyLength(p.lengths, s, b);
      for (int64_t i = first_row; i < rows_end; ++i) {
        const QueryBlock at = {b, h, i * s.block_q, Minimum(s.block_q, q_length - i * s.block_q)};
        if (at.queries <= 0) continue;
        const BlockRow row = ReadRow(p.rows, p.tiles.count, b, h, i);
        followed &= !row.poisoned;
        if (row.poisoned) continue;
        bool loaded = false;
        for (int64_t entry = 0; entry < row.count; ++entry) {
          const int64_t first_key = row.ids[entry] * s.block_kv;
          const int64_t keys = Minimum(s.block_kv, kv_length - first_key);
          if (keys <= 0 || !wants(b, h, row, i, entry)) continue;
          if (!loaded) LoadQueries<C, E>(p, x, at);
          loaded = true;
          EntryGradient<C, E>(p, x, at, row, entry, first_key, keys);
          use(at, row, entry, first_key, keys);
        }
      }
    }
  }
  return followed;
}

// Part: a block of the matrix; all of a dimension that is 1.
template <class C, class E>
void DenseGradient(const BiasGradientParams& p, const BiasGradientScratch<C>& x, int64_t leading, int64_t part) {
  const Shape& s = p.shape;
  const Bias& bias = p.bias;
  const bool all_q = bias.dense_q == 1, all_kv = bias.dense_kv == 1;
  const int64_t i = all_q ? 0 : all_kv ? part : part / s.kv_blocks;
  const int64_t j = all_kv ? 0 : all_q ? part : part % s.kv_blocks;
  const int64_t rows = all_q ? 1 : Minimum(s.block_q, s.q_len - i * s.block_q);
  const int64_t columns = all_kv ? 1 : Minimum(s.block_kv, s.kv_len - j * s.block_kv);
  const int64_t ld = all_kv ? 1 : s.block_kv;
  Fill<C>(x.sum, rows * ld, C(0));
  const bool followed = VisitEntries<C, E>(
      p, x, bias.dense_batch, bias.dense_heads, leading, i, all_q ? s.q_blocks : i + 1,
      [&](int64_t, int64_t, const BlockRow& row, int64_t, int64_t entry) { return all_kv || row.ids[entry] == j; },
      [&](const QueryBlock& at, const BlockRow&, int64_t, int64_t, int64_t keys) {
        AddGradient<C>(x.gradient, s.block_kv, at.queries, keys, x.sum, all_q ? 0 : ld, all_kv ? 0 : 1);
      });
  const int64_t first = (leading * bias.dense_q + (all_q ? 0 : i * s.block_q)) * bias.dense_kv + j * s.block_kv;
  const auto write = [&](auto* to) {
    if (followed) {
      UnpackRows<C>(x.sum, ld, rows, columns, to, bias.dense_kv);
    } else {
      FillRows<C>(to, bias.dense_kv, rows, columns, kNaN<C>);
    }
  };
  if (bias.dense_wide) {
    write(static_cast<C*>(p.dbias) + first);
  } else {
    write(static_cast<E*>(p.dbias) + first);
  }
}

JAX_BSK_INLINE int64_t FloorDivide(int64_t a, int64_t b) { return (a - (a < 0 ? b - 1 : 0)) / b; }

// Part: of blocks of equal sides, every BiasGradientParts-th diagonal of blocks, with what lies above the diagonal of
// elements through their first pairs in the first half of the result, and what lies below in the second. Blocks of
// diagonal d then have segment d of the first half, d * block .. d * block + block - 1 from the distance 0 on, and
// segment d - 1 of the second. Of other blocks, everything.
template <class C, class E>
void DistanceGradient(const BiasGradientParams& p, const BiasGradientScratch<C>& x, int64_t leading, int64_t part) {
  const Shape& s = p.shape;
  const int64_t parts = BiasGradientParts(p), count = s.q_len + s.kv_len - 1, block = s.block_kv;
  C* const halves[2] = {static_cast<C*>(p.dbias) + 2 * leading * count,
                        static_cast<C*>(p.dbias) + (2 * leading + 1) * count};
  const auto is_own = [&](int64_t diagonal) { return (diagonal % parts + parts) % parts == part; };
  const auto fill = [&](C value) {
    const int64_t least = 1 - s.q_len;
    for (int64_t segment = FloorDivide(least, block); segment * block < s.kv_len; ++segment) {
      const int64_t begin = segment * block > least ? segment * block : least;
      const int64_t end = Minimum((segment + 1) * block, s.kv_len);
      for (int half = 0; half < 2; ++half) {
        if (is_own(segment + half)) Fill<C>(halves[half] + begin - least, end - begin, value);
      }
    }
  };
  fill(C(0));
  const bool followed = VisitEntries<C, E>(
      p, x, p.bias.distances_batch, p.bias.distances_heads, leading, 0, s.q_blocks,
      [&](int64_t, int64_t, const BlockRow& row, int64_t i, int64_t entry) { return is_own(row.ids[entry] - i); },
      [&](const QueryBlock& at, const BlockRow&, int64_t, int64_t first_key, int64_t keys) {
        const int64_t below = at.queries - 1;
        Fill<C>(x.sum, below + keys, C(0));
        AddGradient<C>(x.gradient, s.block_kv, at.queries, keys, x.sum + below, -1, 1);
        const int64_t first = first_key - at.first - below + s.q_len - 1;
        C* const lower = halves[parts == 1 ? 0 : 1] + first;
        C* const upper = halves[0] + first;
        for (int64_t e = 0; e < below; ++e) lower[e] += x.sum[e];
        for (int64_t e = below; e < below + keys; ++e) upper[e] += x.sum[e];
      });
  if (!followed) fill(kNaN<C>);
}

// Part: every BiasGradientParts-th tile.
template <class C, class E>
void TileGradient(const BiasGradientParams& p, const BiasGradientScratch<C>& x, int64_t leading, int64_t part) {
  const Shape& s = p.shape;
  const Bias& bias = p.bias;
  const int64_t parts = BiasGradientParts(p), elements = bias.tiles_q * bias.tiles_kv;
  C* const dbias = static_cast<C*>(p.dbias) + leading * bias.tiles_count * elements;
  const auto fill = [&](C value) {
    for (int64_t tile = part; tile < bias.tiles_count; tile += parts) Fill<C>(dbias + tile * elements, elements, value);
  };
  const auto tile_of = [&](int64_t b, int64_t h, const BlockRow& row, int64_t entry) {
    const int64_t index = LeadingIndex(p.rows.batch, p.rows.heads, b, h) * p.rows.capacity + row.begin + entry;
    return BiasTileOf(bias.row_tiles, bias.tiles_count, index);
  };
  fill(C(0));
  const bool followed = VisitEntries<C, E>(
      p, x, bias.tiles_batch, bias.tiles_heads, leading, 0, s.q_blocks,
      [&](int64_t b, int64_t h, const BlockRow& row, int64_t, int64_t entry) {
        const int64_t tile = tile_of(b, h, row, entry);
        return tile >= 0 && tile % parts == part;
      },
      [&](const QueryBlock& at, const BlockRow& row, int64_t entry, int64_t, int64_t keys) {
        AddGradient<C>(x.gradient, s.block_kv, at.queries, keys, dbias + tile_of(at.b, at.h, row, entry) * elements,
                       bias.tiles_q == 1 ? 0 : bias.tiles_kv, bias.tiles_kv == 1 ? 0 : 1);
      });
  if (!followed) fill(kNaN<C>);
}

template <class C, class E>
void BiasGradientTask(const BiasGradientParams& p, int64_t task, void* memory) {
  const BiasGradientScratch<C> x(p, memory);
  const int64_t parts = BiasGradientParts(p);
  const auto gradient = p.term == BiasTerm::kDense       ? DenseGradient<C, E>
                        : p.term == BiasTerm::kDistances ? DistanceGradient<C, E>
                                                         : TileGradient<C, E>;
  gradient(p, x, task / parts, task % parts);
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
