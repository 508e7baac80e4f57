// Forward: one task computes one block of queries of one head, or few queries of all heads that share keys and values,
// visiting the row's key blocks with an online softmax.
// Scores are kept transposed, S^T[key][query], in base-2 units: Q is packed with scale * log2(e) in it.
//
// Transposed to suit Multiply: with lanes along the queries, S^T = K Q^T and O^T += V^T P^T both broadcast keys and
// values, the softmax runs down the lanes without any reduction across them, and P^T is used as it was computed.
#pragma once

#include "add_bias.h"
#include "block_list.h"
#include "cpu/exponential.h"
#include "cpu/multiply.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "drop.h"
#include "kernels.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

// q = block_q is the width of everything that has the queries along the lanes.
template <class C>
struct ForwardScratch {
  C* query;       // [head_dim, q]
  C* out;         // [value_dim, q]
  C* scores;      // [block_kv, q]
  C* key;         // [block_kv, head_dim]
  C* value;       // [block_kv, value_dim]
  C* maximum;     // [q] running maximum of the scores
  C* sum;         // [q] running sum of 2^(score - maximum)
  C* rescale;     // [q]
  Lane<C>* tile;  // [block_kv / 32, q]
  uint8_t* bad;   // [block_kv]
  BiasScratch<C> bias;
  DropoutScratch<C> dropout;
  size_t bytes;

  ForwardScratch(const ForwardParams& p, void* memory) {
    const Shape& s = p.shape;
    Carver carver(memory);
    const int64_t head_dim = RoundUpToLanes<C>(s.head_dim);
    const int64_t value_dim = RoundUpToLanes<C>(s.value_dim);
    query = carver.Take<C>(head_dim * s.block_q);
    out = carver.Take<C>(value_dim * s.block_q);
    scores = carver.Take<C>(s.block_kv * s.block_q);
    key = carver.Take<C>(s.block_kv * head_dim);
    value = carver.Take<C>(s.block_kv * value_dim);
    maximum = carver.Take<C>(s.block_q);
    sum = carver.Take<C>(s.block_q);
    rescale = carver.Take<C>(s.block_q);
    tile = carver.Take<Lane<C>>(s.block_kv / 32 * s.block_q);
    bad = carver.Take<uint8_t>(s.block_kv);
    bias.Take(p, false, carver);
    dropout.Take(p, carver);
    bytes = carver.Bytes();
  }
};

// Scale and soft cap in the precision of the compute type.
template <class C, class Params>
double Scale(const Params& p) {
  return sizeof(C) == sizeof(double) ? p.scale_f64 : double(p.scale);
}
template <class C, class Params>
double SoftCap(const Params& p) {
  return sizeof(C) == sizeof(double) ? p.soft_cap_f64 : double(p.soft_cap);
}

// Constants of the scores, of the forward and the backward alike: their scores are equal to the last bit. With a soft
// cap scores are kept divided by it up to the tanh.
template <class C>
struct LogitUnits {
  bool capped;
  C packed;  // what queries are multiplied by
  C cap;     // soft cap in base-2 units

  template <class Params>
  explicit LogitUnits(const Params& p)
      : capped(p.soft_cap != 0),
        packed(static_cast<C>(capped ? Scale<C>(p) / SoftCap<C>(p) : Scale<C>(p) * kLog2E)),
        cap(static_cast<C>(SoftCap<C>(p) * kLog2E)) {}
};

// Turns a block of scores into probabilities in place, and brings maximum and sum up to date. `cap` is the soft cap in
// base-2 units; with it the scores come divided by the cap.
template <class C, bool kPartial, bool kSoftCap>
void SoftmaxBlock(const ForwardScratch<C>& x, int64_t ld, int64_t keys, int64_t vectors, C cap) {
  for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
    C* const scores = x.scores + v;
    const Vec<C> before = Load<C>(x.maximum + v);
    Vec<C> maximum = before;
    for (int64_t k = 0; k < keys; ++k) {
      Vec<C> score = Load<C>(scores + k * ld);
      if constexpr (kSoftCap) score = cap * Tanh<C>(score);
      if constexpr (kPartial) {
        score = Select<C>(QueriesAttend<C>(x.tile + v, ld, k), score, Broadcast<C>(-kInfinity<C>));
      }
      if constexpr (kSoftCap || kPartial) Store<C>(scores + k * ld, score);
      maximum = Max<C>(score, maximum);
    }
    // A row that has attended to nothing yet subtracts 0, not -inf.
    const Vec<C> shift = Select<C>(maximum == -kInfinity<C>, Vec<C>{}, maximum);
    Vec<C> sum = {};
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<C> probability = Exp2<C>(Load<C>(scores + k * ld) - shift);
      Store<C>(scores + k * ld, probability);
      sum += probability;
    }
    const Vec<C> rescale = Exp2<C>(before - shift);
    Store<C>(x.maximum + v, maximum);
    Store<C>(x.rescale + v, rescale);
    Store<C>(x.sum + v, Load<C>(x.sum + v) * rescale + sum);
  }
}

// Multiplies probabilities by their block's gate. Pairs that do not attend keep their 0, also where it is not finite.
template <class C>
void GateBlock(const ForwardScratch<C>& x, int64_t ld, int64_t keys, int64_t vectors, C gate, bool partial) {
  const bool finite = gate - gate == 0;
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      Vec<C> probability = Load<C>(x.scores + k * ld + v) * gate;
      if (partial && !finite) probability = Select<C>(QueriesAttend<C>(x.tile + v, ld, k), probability, Vec<C>{});
      Store<C>(x.scores + k * ld + v, probability);
    }
  }
}

// Sets bad[row] for every packed row that holds an infinity or a NaN and, being the operand of a product in which some
// weights are 0 because the pair is masked out, replaces that row by zeros: 0 * NaN would reach rows that do not attend
// to it. The caller puts NaN into the weights of those that do. Returns whether there was any.
template <class C>
bool CleanRows(C* data, int64_t ld, int64_t rows, int64_t columns, uint8_t* bad) {
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) {
    Vec<C> sum = {};
    for (int64_t c = 0; c < columns; c += kLanes<C>) sum += Load<C>(data + r * ld + c) * C(0);
    C lanes[kLanes<C>];
    Store<C>(lanes, sum);
    bool finite = true;
    for (int k = 0; k < kLanes<C>; ++k) finite &= lanes[k] == C(0);
    if (finite) continue;
    any = true;
    bad[r] = 1;
    for (int64_t c = 0; c < columns; c += kLanes<C>) Store<C>(data + r * ld + c, Vec<C>{});
  }
  return any;
}

// Probabilities of the keys whose value is not finite: NaN for the queries that attend to them, else 0.
template <class C>
void SpoilKeys(C* weights, int64_t ld, int64_t vectors, const Lane<C>* tile, const uint8_t* bad, int64_t keys) {
  for (int64_t k = 0; k < keys; ++k) {
    if (!bad[k]) continue;
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      Store<C>(weights + k * ld + v, Select<C>(QueriesAttend<C>(tile + v, ld, k), Broadcast<C>(kNaN<C>), Vec<C>{}));
    }
  }
}

template <class C, class E>
void ForwardTask(const ForwardParams& p, int64_t task, void* memory) {
  const Shape& s = p.shape;
  const ForwardScratch<C> x(p, memory);

  // --- Where: batch b, head h and those after it, query block i. Late query blocks first: under a causal mask they are
  // the longest. A row is query * heads + head.
  const int64_t heads = HeadsOfTask(p);
  const int64_t i = s.q_blocks - 1 - task % s.q_blocks;
  const int64_t h = task / s.q_blocks % (s.heads / heads) * heads;
  const int64_t b = task / s.q_blocks / (s.heads / heads);
  const int64_t kv_head = h / (s.heads / s.kv_heads);
  const int64_t first = i * s.block_q;
  const int64_t rows = Minimum(s.block_q, s.q_len - first);
  const int64_t queries = Clamp(QueryLength(p.lengths, s, b) - first, rows);
  const int64_t kv_length = KeyLength(p.lengths, s, b);
  const int64_t vectors = RoundUpToLanes<C>(queries * heads) / kLanes<C>;
  const int64_t ld = s.block_q;
  const int64_t key_stride = s.kv_heads * s.head_dim;
  const int64_t value_stride = s.kv_heads * s.value_dim;
  const int64_t out_stride = s.heads * s.value_dim;
  const E* const keys = static_cast<const E*>(p.key) + (b * s.kv_len * s.kv_heads + kv_head) * s.head_dim;
  const E* const values = static_cast<const E*>(p.value) + (b * s.kv_len * s.kv_heads + kv_head) * s.value_dim;
  E* const out = static_cast<E*>(p.out) + ((b * s.q_len + first) * s.heads + h) * s.value_dim;
  C* const lse = static_cast<C*>(p.lse) + (b * s.heads + h) * s.q_len + first;
  C* const lse_rest = static_cast<C*>(p.lse_rest) + (b * s.heads + h) * s.q_len + first;

  // --- Rows beyond the example's length, and rows whose list is broken.
  for (int64_t j = 0; j < heads; ++j) {
    FillRows<C>(out + queries * out_stride + j * s.value_dim, out_stride, rows - queries, s.value_dim, C(0));
    Fill<C>(lse + j * s.q_len + queries, rows - queries, kNoLogSumExp<C>);
    Fill<C>(lse_rest + j * s.q_len, rows, C(0));
  }
  if (queries == 0) return;
  const BlockRow row = ReadRow(p.rows, p.tiles.count, b, h, i);
  if (row.poisoned) {
    for (int64_t j = 0; j < heads; ++j) {
      FillRows<C>(out + j * s.value_dim, out_stride, queries, s.value_dim, kNaN<C>);
      Fill<C>(lse + j * s.q_len, queries, kNaN<C>);
    }
    return;
  }

  // --- Start: Q^T with the scale in it, nothing attended to yet.
  const LogitUnits<C> units(p);
  const E* const query = static_cast<const E*>(p.query) + ((b * s.q_len + first) * s.heads + h) * s.head_dim;
  PackTransposed<C>(query, {s.heads * s.head_dim, heads, s.head_dim}, queries * heads, s.head_dim, units.packed,
                    x.query, ld);
  Fill<C>(x.out, RoundUpToLanes<C>(s.value_dim) * ld, C(0));
  Fill<C>(x.maximum, ld, -kInfinity<C>);
  Fill<C>(x.sum, ld, C(0));
  const C* const gates = RowGates<const C>(p.gates, p.rows, s, b, h, row);
  const bool biased = HasBias(p.bias), drops = Drops(p.dropout);
  if (drops) PackQueryWords(p.dropout.keys[b * s.heads + h], first, queries, x.dropout.query);

  for (int64_t entry = 0; entry < row.count; ++entry) {
    const int64_t first_key = row.ids[entry] * s.block_kv;
    const int64_t n_keys = Minimum(s.block_kv, kv_length - first_key);
    if (n_keys <= 0) continue;
    bool partial = row.tiles[entry] >= 0;

    // --- Load: rows of K and V in the compute type; the tile of a partial block.
    const E* const key_block = keys + first_key * key_stride;
    const int64_t key_ld = RoundUpToLanes<C>(s.head_dim);
    const int64_t value_ld = RoundUpToLanes<C>(s.value_dim);
    PackRows<C>(key_block, key_stride, n_keys, s.head_dim, x.key, key_ld);
    PackRows<C>(values + first_key * value_stride, value_stride, n_keys, s.value_dim, x.value, value_ld);
    if (partial) {
      PackTile<C>(TileWords(p.tiles, s, b, h, row.tiles[entry]), s.block_kv / 32, queries, ld, x.tile, heads);
    }

    // --- Meanwhile the next block of keys and values comes nearer.
    Ahead next_keys, next_values;
    if (entry + 1 < row.count) {
      const int64_t next_key = row.ids[entry + 1] * s.block_kv;
      const int64_t count = Clamp(kv_length - next_key, s.block_kv);
      next_keys.Add(keys + next_key * key_stride, key_stride, count, s.head_dim);
      next_values.Add(values + next_key * value_stride, value_stride, count, s.value_dim);
    }

    // --- S^T = K Q^T
    Multiply<C, Operand::kRows, Into::kStore>(x.key, key_ld, x.query, ld, n_keys, vectors, s.head_dim, x.scores, ld,
                                              next_keys);

    // --- The bias joins S^T, after the soft cap. Pairs for which it is -inf do not attend.
    if (biased) {
      const Terms terms =
          TermsOfBlock<C, E>(p.bias, s, p.rows, p.bias.row_tiles, b, h, row, entry, first, first_key, true);
      if (AddBias<C, E>(terms, x.bias, units.capped ? units.cap : C(0), queries, n_keys, x.scores, ld)) {
        MaskQueries<C>(x.bias, !partial, s.block_kv / 32, queries, n_keys, x.tile, ld);
        partial = true;
      }
    }
    bool spoiled = false;
    if (partial) {
      Fill<uint8_t>(x.bad, n_keys, 0);
      spoiled = CleanRows<C>(x.value, value_ld, n_keys, s.value_dim, x.bad);
    }

    // --- P^T = 2^(S^T - maximum), whose sum knows nothing of the gates and of dropout
    const bool to_cap = units.capped && !biased;
    const auto softmax = partial ? (to_cap ? SoftmaxBlock<C, true, true> : SoftmaxBlock<C, true, false>)
                                 : (to_cap ? SoftmaxBlock<C, false, true> : SoftmaxBlock<C, false, false>);
    softmax(x, ld, n_keys, vectors, units.cap);
    if (gates != nullptr) GateBlock<C>(x, ld, n_keys, vectors, gates[entry], partial);
    if (drops) {
      PackKeyWords(first_key, n_keys, x.dropout.key);
      DrawFactors<C>(x.dropout, p.dropout.threshold, true, queries, n_keys, ld);
      MultiplyByFactors<C>(x.dropout, x.scores, ld, n_keys, vectors);
    }
    if (spoiled) SpoilKeys<C>(x.scores, ld, vectors, x.tile, x.bad, n_keys);

    // --- O^T = O^T * rescale + V^T P^T
    Multiply<C, Operand::kColumns, Into::kRescale>(x.value, value_ld, x.scores, ld, s.value_dim, vectors, n_keys, x.out,
                                                   ld, next_values, x.rescale);
  }

  // --- Finish: the sink joins the denominator; log-sum-exp in natural units; O = O^T / sum.
  for (int64_t r = 0; r < vectors * kLanes<C>; ++r) {
    const int64_t j = r % heads, index = j * s.q_len + r / heads;
    C sink = -kInfinity<C>;
    if (p.sinks != nullptr) sink = static_cast<const C*>(p.sinks)[LeadingIndex(p.sinks_batch, p.sinks_heads, b, h + j)];
    const double maximum = x.maximum[r] * kLn2;
    const double sum = x.sum[r];
    double total = sum;
    double shift = maximum;
    // This is what rounding took from `maximum`.
    double lost = __builtin_fma(double(x.maximum[r]), kLn2, -maximum) + x.maximum[r] * kLn2Rest;
    if (sink != -kInfinity<C>) {
      if (sink > maximum) shift = sink, lost = 0;
      total = sum == 0 ? 0 : sum * __builtin_exp(maximum - shift);
      const double own = sink == shift ? 1 : __builtin_exp(sink - shift);  // also of +inf
      // A sink of NaN makes the row NaN, also where it attends to no key.
      x.rescale[r] = static_cast<C>(sum == 0 && own == own ? 0 : __builtin_exp(maximum - shift) / (total + own));
      total += own;
    } else {
      x.rescale[r] = static_cast<C>(sum == 0 ? 0 : 1 / sum);
    }
    if (r >= queries * heads) continue;
    lse[index] = total == 0 ? kNoLogSumExp<C> : static_cast<C>(shift + __builtin_log(total));
    const double rest = (shift - lse[index]) + __builtin_log(total) + lost;
    lse_rest[index] = rest - rest == 0 ? static_cast<C>(rest) : C(0);
  }
  UnpackTransposed<C>(x.out, ld, x.rescale, queries * heads, s.value_dim, out, {out_stride, heads, s.value_dim});
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
