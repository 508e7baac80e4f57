// A part for a tile of many rows: scores are kept transposed, S^T[key][row], as in csrc/attention/cpu/forward.h, keys
// and values are packed.
#pragma once

#include "block.h"
#include "cpu/multiply.h"
#include "partial.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

// Scale and soft cap; scores are in base-2 units. With a soft cap they are kept divided by it up to the tanh.
template <class C>
struct LogitUnits {
  bool capped;
  C packed;  // what queries are multiplied by
  C cap;     // soft cap in base-2 units

  explicit LogitUnits(const ForwardParams& p)
      : capped(p.soft_cap != 0),
        packed(static_cast<C>(capped ? double(p.scale) / p.soft_cap : p.scale * kLog2E)),
        cap(static_cast<C>(p.soft_cap * kLog2E)) {}
};

// r = kTileRows.
template <class C>
struct ManyScratch {
  C* query;    // [head_dim, r]
  C* out;      // [value_dim, r]
  C* scores;   // [kBlock, r]
  C* key;      // [kBlock, head_dim]
  C* value;    // [kBlock, value_dim]
  C* maximum;  // [r]
  C* sum;      // [r]
  C* rescale;  // [r]
  C* rows;     // [r, head_dim]

  ManyScratch(Carver& carver, const Shape& s) {
    const int64_t head_dim = RoundUpToLanes<C>(s.head_dim), value_dim = RoundUpToLanes<C>(s.value_dim);
    query = carver.Take<C>(head_dim * kTileRows);
    out = carver.Take<C>(value_dim * kTileRows);
    scores = carver.Take<C>(kBlock * kTileRows);
    key = carver.Take<C>(kBlock * head_dim);
    value = carver.Take<C>(kBlock * value_dim);
    maximum = carver.Take<C>(kTileRows);
    sum = carver.Take<C>(kTileRows);
    rescale = carver.Take<C>(kTileRows);
    rows = carver.Take<C>(kTileRows * head_dim);
  }
};

template <class C, class E>
JAX_BSK_NO_INLINE void PackPointers(const E* const* from, int64_t rows, int64_t columns, C* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<C>) Store<C>(to + r * ld + c, LoadUpTo<C>(from[r] + c, columns - c));
  }
}

// The queries of a tile's rows as [rows, ld], in the compute type and with the scale in them.
template <class C, class E>
JAX_BSK_NO_INLINE void PackQueries(const ForwardParams& p, const Tile& tile, C factor, C* to, int64_t ld) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const E* const from = static_cast<const E*>(p.query) + RowIndex(p, tile, r) * p.shape.head_dim;
    PackRows<C>(from, 0, 1, p.shape.head_dim, to + r * ld, ld, factor);
  }
}

// Probabilities in place of scores, and maximum and sum up to date.
template <class C>
void SoftmaxColumns(const ManyScratch<C>& x, int64_t keys, int64_t vectors) {
  for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
    C* const scores = x.scores + v;
    const Vec<C> before = Load<C>(x.maximum + v);
    Vec<C> maximum = before;
    for (int64_t k = 0; k < keys; ++k) maximum = Max<C>(Load<C>(scores + k * kTileRows), maximum);
    // A row that has attended to nothing yet subtracts 0, not -inf.
    const Vec<C> shift = Select<C>(maximum == -kInfinity<C>, Vec<C>{}, maximum);
    Vec<C> sum = {};
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<C> probability = Exp2<C>(Load<C>(scores + k * kTileRows) - shift);
      Store<C>(scores + k * kTileRows, probability);
      sum += probability;
    }
    const Vec<C> rescale = Exp2<C>(before - shift);
    Store<C>(x.maximum + v, maximum);
    Store<C>(x.rescale + v, rescale);
    Store<C>(x.sum + v, Load<C>(x.sum + v) * rescale + sum);
  }
}

template <class C>
void CapScores(C* scores, int64_t ld, int64_t rows, int64_t columns, C cap) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<C>) {
      Store<C>(scores + r * ld + c, cap * Tanh<C>(Load<C>(scores + r * ld + c)));
    }
  }
}

// Calls visit(row, key, attends) for all pairs of a block.
template <class E, class Visit>
JAX_BSK_INLINE void ForPairs(const ForwardParams& p, const Tile& tile, const Mask& mask, const Block<E>& block,
                             const Visit& visit) {
  const int64_t group = p.shape.heads / p.shape.kv_heads;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t token = (tile.first_row + r) / group;
    for (int64_t k = 0; k < block.count; ++k) visit(r, k, mask.Attends(token, block.position[k]));
  }
}

template <class C, class E>
void ManyRowsPart(const ForwardParams& p, const Tile& tile, Blocks<E>& blocks, int64_t positions, const E* zeros,
                  const ManyScratch<C>& x, const Partial<C>& result) {
  const Shape& s = p.shape;
  const int64_t vectors = RoundUpToLanes<C>(tile.rows) / kLanes<C>;
  const int64_t head_ld = RoundUpToLanes<C>(s.head_dim), value_ld = RoundUpToLanes<C>(s.value_dim);
  const LogitUnits<C> units(p);
  PackQueries<C, E>(p, tile, units.packed, x.rows, head_ld);
  PackTransposed<C>(x.rows, head_ld, tile.rows, s.head_dim, C(1), x.query, kTileRows);
  Fill<C>(x.out, value_ld * kTileRows, C(0));
  Fill<C>(x.maximum, kTileRows, -kInfinity<C>);
  Fill<C>(x.sum, kTileRows, C(0));

  Block<E> block;
  for (blocks.Next(positions, block); block.count > 0; blocks.Next(positions, block)) {
    positions -= block.count;
    bool spoiled[kBlock], any_spoiled = false;
    if (block.masked) any_spoiled = CleanValues<C>(block, s.value_dim, zeros, spoiled);
    PackPointers<C>(block.key, block.count, s.head_dim, x.key, head_ld);
    PackPointers<C>(block.value, block.count, s.value_dim, x.value, value_ld);

    // --- S^T = K Q^T
    Multiply<C, Operand::kRows, Into::kStore>(x.key, head_ld, x.query, kTileRows, block.count, vectors, s.head_dim,
                                              x.scores, kTileRows);
    if (units.capped) CapScores<C>(x.scores, kTileRows, block.count, vectors * kLanes<C>, units.cap);
    if (block.masked) {
      ForPairs(p, tile, blocks.mask, block, [&](int64_t r, int64_t k, bool attends) {
        C& score = x.scores[k * kTileRows + r];
        score = !attends ? -kInfinity<C> : block.missing[k] ? kNaN<C> : score;
      });
    }

    // --- P^T = 2^(S^T - maximum)
    SoftmaxColumns<C>(x, block.count, vectors);
    if (any_spoiled) {
      ForPairs(p, tile, blocks.mask, block, [&](int64_t r, int64_t k, bool attends) {
        if (spoiled[k]) x.scores[k * kTileRows + r] = attends ? kNaN<C> : C(0);
      });
    }

    // --- O^T = O^T * rescale + V^T P^T
    Multiply<C, Operand::kColumns, Into::kRescale>(x.value, value_ld, x.scores, kTileRows, s.value_dim, vectors,
                                                   block.count, x.out, kTileRows, {}, x.rescale);
  }
  UnpackTransposed<C>(x.out, kTileRows, static_cast<const C*>(nullptr), tile.rows, s.value_dim, result.out, result.ld);
  for (int64_t r = 0; r < vectors * kLanes<C>; ++r) {
    result.maximum[r] = x.maximum[r];
    result.sum[r] = x.sum[r];
  }
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
