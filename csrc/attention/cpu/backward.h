// Backward in two kinds of tasks, each owning what it writes: dQ of one block of queries over the query-major list, and
// dK, dV of one block of keys over the key-major list, looping over the query heads of its group. The scores are
// computed in both (7 products where a fused loop needs 5), and in return there is no sum across tasks: no atomics, no
// workspace, the same bits for any number of threads.
//
// The two are mirror images: dQ keeps the queries along the lanes, as the forward does, dK and dV the keys. With
//   P = 2^(S - lse),  dS = P * (g * dP - delta),  dP = dO V^T,  g the block's gate or 1,
// and lse the sum of two numbers (params.h), and S the forward's to the last bit: queries have the scale in both. So P
// is right however large S is.
//
// each needs S and dP with its own side along the lanes (products of rows), then sums dS or P times the other side's
// rows (products of columns). dK and dV, which have the
// weights g * P of the values, also sum the gates' own gradients P * dP.
//
// A bias is added to S beforehand, with the soft cap (add_bias.h), and dropout multiplies dP and the weights (drop.h):
// so the kernels between know of neither.
#pragma once

#include "forward.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

// `own` is the side along the lanes, w lanes wide; `other` the side whose blocks are visited, o rows.
template <class C>
struct BackwardScratch {
  C* own_head;     // [head_dim, w] Q^T (scaled) or K^T
  C* own_value;    // [value_dim, w] dO^T or V^T
  C* other_head;   // [o, head_dim] K or Q (scaled)
  C* other_value;  // [o, value_dim] V or dO
  C* scores;       // [o, w] S, then P
  C* gradient;     // [o, w] dP, then dS
  C* d_head;       // [head_dim, w] dQ^T or dK^T
  C* d_value;      // [value_dim, w] dV^T, key-major only
  C* lse;          // [max(w, o)] in base-2 units, +inf for P = 0
  C* lse_rest;     // [max(w, o)] what rounding took from it
  C* delta;        // [max(w, o)]
  C* factor;       // [w] of the results
  Lane<C>* tile;   // [block_kv / 32, w]
  uint8_t* bad;    // [o]
  C* d_gate;       // [w] sums of P * dP along the other side, key-major only
  BiasScratch<C> bias;
  DropoutScratch<C> dropout;
  size_t bytes;

  template <class Params>
  BackwardScratch(const Params& p, void* memory) {
    const Shape& s = p.shape;
    Carver carver(memory);
    const int64_t head_dim = RoundUpToLanes<C>(s.head_dim);
    const int64_t value_dim = RoundUpToLanes<C>(s.value_dim);
    const int64_t block = s.block_q > s.block_kv ? s.block_q : s.block_kv;
    own_head = carver.Take<C>(head_dim * block);
    own_value = carver.Take<C>(value_dim * block);
    other_head = carver.Take<C>(head_dim * block);
    other_value = carver.Take<C>(value_dim * block);
    scores = carver.Take<C>(s.block_q * s.block_kv);
    gradient = carver.Take<C>(s.block_q * s.block_kv);
    d_head = carver.Take<C>(head_dim * block);
    d_value = carver.Take<C>(value_dim * block);
    lse = carver.Take<C>(block);
    lse_rest = carver.Take<C>(block);
    delta = carver.Take<C>(block);
    factor = carver.Take<C>(block);
    tile = carver.Take<Lane<C>>(s.block_kv / 32 * s.block_q);
    bad = carver.Take<uint8_t>(block);
    d_gate = carver.Take<C>(block);
    bias.Take(p, true, carver);
    dropout.Take(p, carver);
    bytes = carver.Bytes();
  }
};

// The constants of the logits and of the gradients.
template <class C>
struct GradientUnits : LogitUnits<C> {
  C dquery;  // what dQ is multiplied by in the end
  C dkey;    // what dK is, whose queries are multiplied by `packed` already

  explicit GradientUnits(const BackwardParams& p)
      : LogitUnits<C>(p),
        dquery(static_cast<C>(Scale<C>(p))),
        dkey(static_cast<C>(this->capped ? SoftCap<C>(p) : kLn2)) {}
};

// The statistics of `count` queries, padded with P = 0 up to `lanes`. An lse of kNoLogSumExp (or -inf) means that
// nothing was attended to, so P is to be 0; a delta that is not finite counts as lse = NaN.
template <class C, class Params>
void PackStatistics(const Params& p, int64_t first, int64_t count, int64_t lanes, const BackwardScratch<C>& x) {
  const C *lse = static_cast<const C*>(p.lse) + first, *lse_rest = static_cast<const C*>(p.lse_rest) + first,
          *delta = static_cast<const C*>(p.delta) + first;
  for (int64_t r = 0; r < lanes; ++r) {
    const bool valid = r < count;
    const bool finite = valid && delta[r] - delta[r] == 0;
    const bool attends = valid && !(lse[r] <= kNoLogSumExp<C>);
    const C base2 = attends ? static_cast<C>(lse[r] * kLog2E) : kInfinity<C>;
    const double lost = attends ? __builtin_fma(double(lse[r]), kLog2E, -double(base2)) + lse[r] * kLog2ERest : 0;
    const double rest = attends ? lost + lse_rest[r] * kLog2E : 0;
    x.lse[r] = valid && !finite ? kNaN<C> : base2;
    x.lse_rest[r] = rest - rest == 0 ? static_cast<C>(rest) : C(0);
    x.delta[r] = finite ? delta[r] : 0;
  }
}

// A query's statistics, in all lanes, or a query a lane.
template <class C>
struct Statistics {
  Vec<C> lse, rest, delta;
};

// 2^(score - lse), at most 1, whatever the compiler made of products that it computes anew; NaN stays NaN.
template <class C>
JAX_BSK_INLINE Vec<C> Probability(Vec<C> score, const Statistics<C>& of) {
  const Vec<C> x = (score - of.lse) - of.rest;
  return Exp2<C>(Select<C>(x > C(0), Vec<C>{}, x));
}

// P and dS of one vector of pairs from S and dP.
template <class C, bool kSoftCap>
JAX_BSK_INLINE void PairGradient(Vec<C>& score, Vec<C>& gradient, const Statistics<C>& of, C cap) {
  if constexpr (kSoftCap) {
    const Vec<C> capped = Tanh<C>(score);
    score = Probability<C>(cap * capped, of);
    gradient = score * (gradient - of.delta) * (C(1) - capped * capped);
  } else {
    score = Probability<C>(score, of);
    gradient = score * (gradient - of.delta);
  }
}

// dS in place of dP, with the queries along the lanes. P is not needed any more. Pairs masked out get 0, and those of a
// bad key NaN where they attend.
template <class C, bool kPartial, bool kSoftCap, bool kGated>
void QueryGradient(const BackwardScratch<C>& x, int64_t ld, int64_t keys, int64_t vectors, C cap, C gate) {
  for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
    const Statistics<C> of = {Load<C>(x.lse + v), Load<C>(x.lse_rest + v), Load<C>(x.delta + v)};
    for (int64_t k = 0; k < keys; ++k) {
      Vec<C> score = Load<C>(x.scores + k * ld + v);
      Vec<C> gradient = Load<C>(x.gradient + k * ld + v);
      if constexpr (kGated) gradient *= gate;
      PairGradient<C, kSoftCap>(score, gradient, of, cap);
      if constexpr (kPartial) {
        if (x.bad[k]) gradient = Broadcast<C>(kNaN<C>);
        gradient = Select<C>(QueriesAttend<C>(x.tile + v, ld, k), gradient, Vec<C>{});
      }
      Store<C>(x.gradient + k * ld + v, gradient);
    }
  }
}

// The values' weights (P, times the gate) in place of S and dS in place of dP, with the keys along the lanes. With a
// gate also each key's sum of P * dP.
template <class C, bool kPartial, bool kSoftCap, bool kGated>
void KeyGradient(const BackwardScratch<C>& x, int64_t ld, int64_t queries, int64_t vectors, C cap, const uint32_t* tile,
                 C gate) {
  if constexpr (kGated) Fill<C>(x.d_gate, vectors * kLanes<C>, C(0));
  for (int64_t q = 0; q < queries; ++q) {
    const Statistics<C> of = {Broadcast<C>(x.lse[q]), Broadcast<C>(x.lse_rest[q]), Broadcast<C>(x.delta[q])};
    for (int64_t v = 0; v < vectors * kLanes<C>; v += kLanes<C>) {
      Vec<C> score = Load<C>(x.scores + q * ld + v);
      Vec<C> gradient = Load<C>(x.gradient + q * ld + v);
      Vec<C> d_gate = gradient;
      if constexpr (kGated) gradient *= gate;
      PairGradient<C, kSoftCap>(score, gradient, of, cap);
      if constexpr (kGated) {
        d_gate *= score;
        score *= gate;
      }
      if constexpr (kPartial) {
        if (x.bad[q]) score = gradient = d_gate = Broadcast<C>(kNaN<C>);
        const IntVec<C> attend = KeysAttend<C>(tile + q * (ld / 32), v);
        score = Select<C>(attend, score, Vec<C>{});
        gradient = Select<C>(attend, gradient, Vec<C>{});
        if constexpr (kGated) d_gate = Select<C>(attend, d_gate, Vec<C>{});
      }
      if constexpr (kGated) Store<C>(x.d_gate + v, Load<C>(x.d_gate + v) + d_gate);
      Store<C>(x.scores + q * ld + v, score);
      Store<C>(x.gradient + q * ld + v, gradient);
    }
  }
}

template <class C>
auto ChooseQueryGradient(bool partial, bool soft_cap, bool gated) {
  constexpr decltype(&QueryGradient<C, false, false, false>) kAll[2][2][2] = {
      {{QueryGradient<C, false, false, false>, QueryGradient<C, false, false, true>},
       {QueryGradient<C, false, true, false>, QueryGradient<C, false, true, true>}},
      {{QueryGradient<C, true, false, false>, QueryGradient<C, true, false, true>},
       {QueryGradient<C, true, true, false>, QueryGradient<C, true, true, true>}}};
  return kAll[partial][soft_cap][gated];
}

template <class C>
auto ChooseKeyGradient(bool partial, bool soft_cap, bool gated) {
  constexpr decltype(&KeyGradient<C, false, false, false>) kAll[2][2][2] = {
      {{KeyGradient<C, false, false, false>, KeyGradient<C, false, false, true>},
       {KeyGradient<C, false, true, false>, KeyGradient<C, false, true, true>}},
      {{KeyGradient<C, true, false, false>, KeyGradient<C, true, false, true>},
       {KeyGradient<C, true, true, false>, KeyGradient<C, true, true, true>}}};
  return kAll[partial][soft_cap][gated];
}

template <class C, class E>
void BackwardQueryTask(const BackwardParams& p, int64_t task, void* memory) {
  const Shape& s = p.shape;
  const BackwardScratch<C> x(p, memory);
  const GradientUnits<C> units(p);

  // --- Where: as in the forward.
  const int64_t i = s.q_blocks - 1 - task % s.q_blocks;
  const int64_t h = task / s.q_blocks % s.heads;
  const int64_t b = task / s.q_blocks / s.heads;
  const int64_t kv_head = h / (s.heads / s.kv_heads);
  const int64_t first = i * s.block_q;
  const int64_t rows = Minimum(s.block_q, s.q_len - first);
  const int64_t queries = Clamp(QueryLength(p.lengths, s, b) - first, rows);
  const int64_t kv_length = KeyLength(p.lengths, s, b);
  const int64_t vectors = RoundUpToLanes<C>(queries) / kLanes<C>;
  const int64_t ld = s.block_q;
  const int64_t head_ld = RoundUpToLanes<C>(s.head_dim);
  const int64_t value_ld = RoundUpToLanes<C>(s.value_dim);
  const int64_t row_index = (b * s.q_len + first) * s.heads + h;
  const int64_t query_stride = s.heads * s.head_dim;
  const int64_t key_stride = s.kv_heads * s.head_dim;
  const int64_t value_stride = s.kv_heads * s.value_dim;
  const E* const keys = static_cast<const E*>(p.key) + (b * s.kv_len * s.kv_heads + kv_head) * s.head_dim;
  const E* const values = static_cast<const E*>(p.value) + (b * s.kv_len * s.kv_heads + kv_head) * s.value_dim;
  const int64_t statistics = (b * s.heads + h) * s.q_len + first;
  E* const dquery = static_cast<E*>(p.dquery) + row_index * s.head_dim;

  // --- Rows beyond the example's length, and rows whose list is broken.
  FillRows<C>(dquery + queries * query_stride, query_stride, rows - queries, s.head_dim, C(0));
  if (queries == 0) return;
  const BlockRow row = ReadRow(p.rows, p.tiles.count, b, h, i);
  if (row.poisoned) return FillRows<C>(dquery, query_stride, queries, s.head_dim, kNaN<C>);

  // --- Start: Q^T, dO^T and the statistics of this block of queries.
  PackTransposed<C>(static_cast<const E*>(p.query) + row_index * s.head_dim, query_stride, queries, s.head_dim,
                    units.packed, x.own_head, ld);
  PackTransposed<C>(static_cast<const E*>(p.dout) + row_index * s.value_dim, s.heads * s.value_dim, queries,
                    s.value_dim, C(1), x.own_value, ld);
  PackStatistics<C>(p, statistics, queries, ld, x);
  Fill<C>(x.d_head, head_ld * ld, C(0));
  Fill<C>(x.factor, ld, units.dquery);
  const C* const gates = RowGates<const C>(p.row_gates, p.rows, s, b, h, row);
  const bool biased = HasBias(p.bias), drops = Drops(p.dropout);
  if (drops) PackQueryWords(p.dropout.keys[b * s.heads + h], first, queries, x.dropout.query);

  for (int64_t entry = 0; entry < row.count; ++entry) {
    const int64_t first_key = row.ids[entry] * s.block_kv;
    const int64_t n_keys = Minimum(s.block_kv, kv_length - first_key);
    if (n_keys <= 0) continue;
    bool partial = row.tiles[entry] >= 0;

    // --- Load: rows of K and V in the compute type; the tile of a partial block.
    PackRows<C>(keys + first_key * key_stride, key_stride, n_keys, s.head_dim, x.other_head, head_ld);
    PackRows<C>(values + first_key * value_stride, value_stride, n_keys, s.value_dim, x.other_value, value_ld);
    if (partial) {
      PackTile<C>(TileWords(p.tiles, s, b, h, row.tiles[entry]), s.block_kv / 32, queries, ld, x.tile);
    }

    // --- Meanwhile the next block of keys and values comes nearer.
    Ahead next_keys, next_values;
    if (entry + 1 < row.count) {
      const int64_t next_key = row.ids[entry + 1] * s.block_kv;
      const int64_t count = Clamp(kv_length - next_key, s.block_kv);
      next_keys.Add(keys + next_key * key_stride, key_stride, count, s.head_dim);
      next_values.Add(values + next_key * value_stride, value_stride, count, s.value_dim);
    }

    // --- S^T = K Q^T and dP^T = V dO^T
    Multiply<C, Operand::kRows, Into::kStore>(x.other_head, head_ld, x.own_head, ld, n_keys, vectors, s.head_dim,
                                              x.scores, ld, next_keys);
    Multiply<C, Operand::kRows, Into::kStore>(x.other_value, value_ld, x.own_value, ld, n_keys, vectors, s.value_dim,
                                              x.gradient, ld, next_values);

    // --- S^T with the bias, m dP^T
    if (biased) {
      const Terms terms =
          TermsOfBlock<C, E>(p.bias, s, p.rows, p.bias.row_tiles, b, h, row, entry, first, first_key, true);
      if (AddBias<C, E>(terms, x.bias, units.capped ? units.cap : C(0), queries, n_keys, x.scores, ld)) {
        MaskQueries<C>(x.bias, !partial, s.block_kv / 32, queries, n_keys, x.tile, ld);
        partial = true;
      }
    }
    if (partial) {
      Fill<uint8_t>(x.bad, n_keys, 0);
      CleanRows<C>(x.other_head, head_ld, n_keys, s.head_dim, x.bad);
    }
    if (drops) {
      PackKeyWords(first_key, n_keys, x.dropout.key);
      DrawFactors<C>(x.dropout, p.dropout.threshold, true, queries, n_keys, ld);
      MultiplyByFactors<C>(x.dropout, x.gradient, ld, n_keys, vectors);
    }

    // --- dS^T = P^T * (g * dP^T - delta)
    const auto gradient = ChooseQueryGradient<C>(partial, units.capped && !biased, gates != nullptr);
    gradient(x, ld, n_keys, vectors, units.cap, gates != nullptr ? gates[entry] : C(1));
    if (units.capped && biased) MultiplyBySlope<C>(x.gradient, ld, n_keys, vectors, x.bias.slope);

    // --- dQ^T += K^T dS^T
    Multiply<C, Operand::kColumns, Into::kAdd>(x.other_head, head_ld, x.gradient, ld, s.head_dim, vectors, n_keys,
                                               x.d_head, ld);
  }

  // --- Finish: dQ = scale * dQ^T
  UnpackTransposed<C>(x.d_head, ld, x.factor, queries, s.head_dim, dquery, query_stride);
}

// Gradients of the gates that no column writes, by the first one: 0 for those of no entry of a column, NaN for those of
// an entry that several have.
template <class C>
void FinishGates(const BackwardParams& p, int64_t b, int64_t h) {
  const BlockList& list = p.cols;
  const int32_t* const offsets = RowOffsets(list, b, h);
  C* const dgates = static_cast<C*>(p.dgates) + (b * p.shape.heads + h) * list.capacity;
  if (InOrder(offsets, list.rows)) {
    int64_t end = 0;
    for (int64_t row = 0; row < list.rows; ++row) {
      const ListRange range = ReadRange(offsets + row, list.capacity);
      if (!range.sound) continue;
      Fill<C>(dgates + end, range.begin - end, C(0));
      end = range.begin + range.count;
    }
    Fill<C>(dgates + end, list.capacity - end, C(0));
  } else {
    for (int64_t entry = 0; entry < list.capacity; ++entry) {
      const int64_t owners = CountOwners(offsets, list.rows, list.capacity, entry);
      if (owners != 1) dgates[entry] = owners == 0 ? C(0) : kNaN<C>;
    }
  }
}

template <class C, class E>
void BackwardKeyTask(const BackwardParams& p, int64_t task, void* memory) {
  const Shape& s = p.shape;
  const BackwardScratch<C> x(p, memory);
  const GradientUnits<C> units(p);

  // --- Where: batch b, kv head, block j of keys. Early blocks first: under a causal mask they are the longest.
  const int64_t j = task % s.kv_blocks;
  const int64_t kv_head = task / s.kv_blocks % s.kv_heads;
  const int64_t b = task / s.kv_blocks / s.kv_heads;
  const int64_t group = s.heads / s.kv_heads;
  const int64_t first = j * s.block_kv;
  const int64_t rows = Minimum(s.block_kv, s.kv_len - first);
  const int64_t keys = Clamp(KeyLength(p.lengths, s, b) - first, rows);
  const int64_t q_length = QueryLength(p.lengths, s, b);
  const int64_t vectors = RoundUpToLanes<C>(keys) / kLanes<C>;
  const int64_t ld = s.block_kv;
  const int64_t head_ld = RoundUpToLanes<C>(s.head_dim);
  const int64_t value_ld = RoundUpToLanes<C>(s.value_dim);
  const int64_t row_index = (b * s.kv_len + first) * s.kv_heads + kv_head;
  const int64_t key_stride = s.kv_heads * s.head_dim;
  const int64_t value_stride = s.kv_heads * s.value_dim;
  const int64_t query_stride = s.heads * s.head_dim;
  const int64_t dout_stride = s.heads * s.value_dim;
  E* const dkey = static_cast<E*>(p.dkey) + row_index * s.head_dim;
  E* const dvalue = static_cast<E*>(p.dvalue) + row_index * s.value_dim;

  // --- Rows beyond the example's length.
  FillRows<C>(dkey + keys * key_stride, key_stride, rows - keys, s.head_dim, C(0));
  FillRows<C>(dvalue + keys * value_stride, value_stride, rows - keys, s.value_dim, C(0));
  const bool gated = p.dgates != nullptr;  // whose entries are written here, if only with 0
  const bool biased = HasBias(p.bias), drops = Drops(p.dropout);
  if (keys == 0 && !gated) return;
  for (int64_t i = 0; gated && j == 0 && i < group; ++i) FinishGates<C>(p, b, kv_head * group + i);

  // --- Start: K^T, V^T.
  PackTransposed<C>(static_cast<const E*>(p.key) + row_index * s.head_dim, key_stride, keys, s.head_dim, C(1),
                    x.own_head, ld);
  PackTransposed<C>(static_cast<const E*>(p.value) + row_index * s.value_dim, value_stride, keys, s.value_dim, C(1),
                    x.own_value, ld);
  Fill<C>(x.d_head, head_ld * ld, C(0));
  Fill<C>(x.d_value, value_ld * ld, C(0));
  if (drops) PackKeyWords(first, keys, x.dropout.key);

  bool poisoned = false;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const BlockRow row = ReadRow(p.cols, p.tiles.count, b, h, j);
    const C* const gates = RowGates<const C>(p.col_gates, p.cols, s, b, h, row);
    C* const dgates = RowGates<C>(p.dgates, p.cols, s, b, h, row);
    // An entry that other columns have, too, is not written here. Only with offsets that are out of order are there
    // any.
    const int32_t* const offsets = RowOffsets(p.cols, b, h);
    const bool exclusive = !gated || InOrder(offsets, p.cols.rows);
    const auto is_own = [&](int64_t entry) {
      return gated && (exclusive || CountOwners(offsets, p.cols.rows, p.cols.capacity, row.begin + entry) == 1);
    };
    if (row.poisoned) {
      poisoned = true;
      if (!gated) break;
      for (int64_t entry = 0; entry < row.count; ++entry) {
        if (is_own(entry)) dgates[entry] = keys > 0 ? kNaN<C> : C(0);
      }
      continue;  // the other heads' gates have gradients of their own
    }
    const int64_t statistics = (b * s.heads + h) * s.q_len;
    const E* const query = static_cast<const E*>(p.query) + (b * s.q_len * s.heads + h) * s.head_dim;
    const E* const dout = static_cast<const E*>(p.dout) + (b * s.q_len * s.heads + h) * s.value_dim;

    for (int64_t entry = 0; entry < row.count; ++entry) {
      const int64_t first_query = row.ids[entry] * s.block_q;
      const int64_t queries = Minimum(s.block_q, q_length - first_query);
      const bool own = is_own(entry);
      if (own) dgates[entry] = 0;
      if (queries <= 0 || keys == 0) continue;
      bool partial = row.tiles[entry] >= 0;

      // --- Load: rows of Q and dO in the compute type, and their statistics.
      PackRows<C>(query + first_query * query_stride, query_stride, queries, s.head_dim, x.other_head, head_ld,
                  units.packed);
      PackRows<C>(dout + first_query * dout_stride, dout_stride, queries, s.value_dim, x.other_value, value_ld);
      PackStatistics<C>(p, statistics + first_query, queries, queries, x);
      const uint32_t* tile = nullptr;
      if (partial) tile = TileWords(p.tiles, s, b, h, row.tiles[entry]);

      // --- Meanwhile the next block of queries comes nearer.
      Ahead next_queries, next_douts;
      if (entry + 1 < row.count) {
        const int64_t next_query = row.ids[entry + 1] * s.block_q;
        const int64_t count = Clamp(q_length - next_query, s.block_q);
        next_queries.Add(query + next_query * query_stride, query_stride, count, s.head_dim);
        next_douts.Add(dout + next_query * dout_stride, dout_stride, count, s.value_dim);
      }

      // --- S = Q K^T and dP = dO V^T
      Multiply<C, Operand::kRows, Into::kStore>(x.other_head, head_ld, x.own_head, ld, queries, vectors, s.head_dim,
                                                x.scores, ld, next_queries);
      Multiply<C, Operand::kRows, Into::kStore>(x.other_value, value_ld, x.own_value, ld, queries, vectors, s.value_dim,
                                                x.gradient, ld, next_douts);

      // --- S with the bias, m dP
      if (biased) {
        const Terms terms =
            TermsOfBlock<C, E>(p.bias, s, p.cols, p.bias.col_tiles, b, h, row, entry, first_query, first, false);
        if (AddBias<C, E>(terms, x.bias, units.capped ? units.cap : C(0), keys, queries, x.scores, ld)) {
          tile = MaskKeys<C>(x.bias, tile, queries, keys, ld);
          partial = true;
        }
      }
      if (partial) {
        Fill<uint8_t>(x.bad, queries, 0);
        CleanRows<C>(x.other_head, head_ld, queries, s.head_dim, x.bad);
        CleanRows<C>(x.other_value, value_ld, queries, s.value_dim, x.bad);
      }
      if (drops) {
        PackQueryWords(p.dropout.keys[b * s.heads + h], first_query, queries, x.dropout.query);
        DrawFactors<C>(x.dropout, p.dropout.threshold, false, keys, queries, ld);
        MultiplyByFactors<C>(x.dropout, x.gradient, ld, queries, vectors);
      }

      // --- P = 2^(S - lse), dS = P * (g * dP - delta); of the lanes beyond the keys nothing joins the gate's gradient
      const auto gradient = ChooseKeyGradient<C>(partial, units.capped && !biased, gated);
      gradient(x, ld, queries, vectors, units.cap, tile, gated ? gates[entry] : C(1));
      if (units.capped && biased) MultiplyBySlope<C>(x.gradient, ld, queries, vectors, x.bias.slope);
      if (drops) MultiplyByFactors<C>(x.dropout, x.scores, ld, queries, vectors);
      if (gated) {
        double sum = 0;
        for (int64_t k = 0; k < keys; ++k) sum += x.d_gate[k];
        if (own) dgates[entry] = static_cast<C>(sum);
      }

      // --- dV^T += dO^T (g * P) and dK^T += Q^T dS
      Multiply<C, Operand::kColumns, Into::kAdd>(x.other_value, value_ld, x.scores, ld, s.value_dim, vectors, queries,
                                                 x.d_value, ld);
      Multiply<C, Operand::kColumns, Into::kAdd>(x.other_head, head_ld, x.gradient, ld, s.head_dim, vectors, queries,
                                                 x.d_head, ld);
    }
  }

  if (poisoned) {
    FillRows<C>(dkey, key_stride, keys, s.head_dim, kNaN<C>);
    FillRows<C>(dvalue, value_stride, keys, s.value_dim, kNaN<C>);
    return;
  }

  // --- Finish: dK = dK^T in natural units, dV = dV^T
  Fill<C>(x.factor, ld, units.dkey);
  UnpackTransposed<C>(x.d_head, ld, x.factor, keys, s.head_dim, dkey, key_stride);
  Fill<C>(x.factor, ld, C(1));
  UnpackTransposed<C>(x.d_value, ld, x.factor, keys, s.value_dim, dvalue, value_stride);
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
