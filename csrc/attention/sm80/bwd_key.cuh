// dK and dV of the portable backward: a CTA has 64 keys of one key/value head and walks the key-major lists of its
// query heads.
#pragma once

#include "attention/sm80/bwd_pairs.cuh"
#include "attention/sm80/config.h"
#include "attention/sm80/extras.cuh"
#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/copy_async.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
struct KeyShared {
  using Element = typename Config::Element;
  device::Tile<Element, kTile, Config::kDim> key;    // later the staging area of dK
  device::Tile<Element, kTile, Config::kDim> value;  // later the staging area of dV
  device::Tile<Element, Config::kKeyTileQ, Config::kDim> query;
  device::Tile<Element, Config::kKeyTileQ, Config::kDim> dout;
  RowStatistics rows[Config::kKeyTileQ];    // of the queries
  uint32_t attended[Config::kKeyTileQ][2];  // [query][key / 32], with a bit tile or extras
  uint32_t bad_queries[2];                  // see device::CleanRows
  uint32_t bad_douts[2];
  // For want of registers: the place of the current step's gate; each thread's P o dP, of the 64 x 64 pairs that the
  // step is part of.
  int gate;
  float gate_sums[Config::kMayBeExtended ? Config::kKeyThreads : 1];
  int next_tile;    // see ForSelected
  BiasViews views;  // of the step's entry
};

// The steps of every query head of a group, one head after the other.
template <int kTileQ>
class GroupWalker {
 public:
  __device__ GroupWalker(const BackwardParams& params, int batch, int first_head, int last_head, int kv_block,
                         int limit)
      : batch_(batch),
        head_(first_head),
        last_head_(last_head),
        kv_block_(kv_block),
        walker_(params.cols, params.tiles, batch, first_head, kv_block, static_cast<int>(params.shape.block_q), limit) {
  }

  // False after the last head's row, or when a row is poisoned.
  __device__ bool Next(lists::Step& step, int& head) {
    while (!walker_.Next(step)) {
      if (walker_.poisoned() || head_ == last_head_) return false;
      ++head_;
      walker_.Restart(batch_, head_, kv_block_);
    }
    head = head_;
    return true;
  }
  __device__ bool poisoned() const { return walker_.poisoned(); }
  __device__ int64_t position() const { return walker_.position(); }

 private:
  int batch_, head_, last_head_, kv_block_;
  lists::BlockWalker<kTileQ> walker_;
};

// The first of four words, one a warp, for 64 x 64 pairs of a visited block: see attention/gates.h.
__device__ __forceinline__ int64_t GateSumIndex(const Shape& shape, int gate, int kv_start, int q_offset) {
  const int q_subtiles = static_cast<int>(shape.block_q) / 64, kv_subtiles = static_cast<int>(shape.block_kv) / 64;
  return 4 * ((int64_t{gate} * kv_subtiles + kv_start / 64 % kv_subtiles) * q_subtiles + q_offset / 64);
}

// NaN for the gates of every block that visits these keys, as their dK and dV are: the steps ended before their time.
template <int kThreads>
__device__ __forceinline__ void SpoilGateSums(const BackwardParams& params, float* gate_sums, int batch, int kv_head,
                                              int kv_start, int thread) {
  const Shape& shape = params.shape;
  const int group = static_cast<int>(shape.heads / shape.kv_heads);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const lists::ListRow row = lists::FindRow(params.cols, batch, head, kv_start / static_cast<int>(shape.block_kv));
    for (int entry = thread; entry < row.length; entry += kThreads) {
      const int gate = lists::GateIndex(params.cols, shape.heads, batch, head, row.begin + entry);
      gate_sums[GateSumIndex(shape, gate, kv_start, 0)] = device::QuietNan();
    }
  }
}

// A tile of keys as dK and dV see it: 64 keys of one key/value head, and the arrays of its queries.
template <typename Config>
struct KeyTile {
  using Element = typename Config::Element;
  static constexpr int kThreads = Config::kKeyThreads;

  const BackwardParams& params;
  int batch, kv_head;
  int kv_start;  // the first key
  int kv_rows;   // keys that are within the lengths
  int group;     // query heads of the key/value head
  lists::LengthLimits limit;
  int query_stride, dout_stride;  // elements from one position to the next; refused beyond 2^31

  __device__ __forceinline__ KeyTile(const BackwardParams& params, int number) : params(params) {
    const Shape& shape = params.shape;
    const int kv_len = static_cast<int>(shape.kv_len), kv_heads = static_cast<int>(shape.kv_heads);
    const int heads = static_cast<int>(shape.heads);
    const int kv_tiles = (kv_len + kTile - 1) / kTile;
    kv_start = static_cast<int>(number % kv_tiles) * kTile;
    kv_head = static_cast<int>(number / kv_tiles) % kv_heads;
    batch = static_cast<int>(number / kv_tiles) / kv_heads;
    group = heads / kv_heads;
    limit = lists::ReadLengths(params.lengths, batch, static_cast<int>(shape.q_len), kv_len);
    kv_rows = max(0, min(limit.key - kv_start, kTile));
    query_stride = heads * static_cast<int>(shape.head_dim), dout_stride = heads * static_cast<int>(shape.value_dim);
  }

  // Prologue and epilogue both compute these: kept in between, they would spill at 256 dimensions.
  __device__ __forceinline__ int KeyStride() const {
    return static_cast<int>(params.shape.kv_heads) * static_cast<int>(params.shape.head_dim);
  }
  __device__ __forceinline__ int ValueStride() const {
    return static_cast<int>(params.shape.kv_heads) * static_cast<int>(params.shape.value_dim);
  }
  // Elements before the tile's first key, and before its value.
  __device__ __forceinline__ int64_t KeyOffset() const {
    return (batch * params.shape.kv_len + kv_start) * KeyStride() + kv_head * static_cast<int>(params.shape.head_dim);
  }
  __device__ __forceinline__ int64_t ValueOffset() const {
    return (batch * params.shape.kv_len + kv_start) * ValueStride() +
           kv_head * static_cast<int>(params.shape.value_dim);
  }

  // Start a thread's part of the copies.
  __device__ __forceinline__ void LoadKeysAndValues(KeyShared<Config>& shared, int thread) const {
    device::LoadTileAsync<kThreads>(shared.key, static_cast<const Element*>(params.key) + KeyOffset(), KeyStride(),
                                    kv_rows, static_cast<int>(params.shape.head_dim), thread);
    device::LoadTileAsync<kThreads>(shared.value, static_cast<const Element*>(params.value) + ValueOffset(),
                                    ValueStride(), kv_rows, static_cast<int>(params.shape.value_dim), thread);
  }
  __device__ __forceinline__ void LoadQueries(KeyShared<Config>& shared, const lists::Step& step, int head,
                                              int thread) const {
    const int head_dim = static_cast<int>(params.shape.head_dim);
    device::LoadTileAsync<kThreads>(shared.query,
                                    static_cast<const Element*>(params.query) +
                                        (batch * params.shape.q_len + step.start) * query_stride + head * head_dim,
                                    query_stride, limit.query - step.start, head_dim, thread);
  }
  __device__ __forceinline__ void LoadDouts(KeyShared<Config>& shared, const lists::Step& step, int head,
                                            int thread) const {
    const int value_dim = static_cast<int>(params.shape.value_dim);
    device::LoadTileAsync<kThreads>(shared.dout,
                                    static_cast<const Element*>(params.dout) +
                                        (batch * params.shape.q_len + step.start) * dout_stride + head * value_dim,
                                    dout_stride, limit.query - step.start, value_dim, thread);
  }

  // The statistics of the query that this thread has to fetch.
  __device__ __forceinline__ RowStatistics Statistics(const lists::Step& step, int head, int thread) const {
    if (thread >= Config::kKeyTileQ || step.start + thread >= limit.query) return RowStatistics::None();
    const int heads = static_cast<int>(params.shape.heads);
    return ReadStatistics(params, (int64_t{batch} * heads + head) * params.shape.q_len + step.start + thread);
  }

  // The word that this thread has to fetch for KeyShared::attended.
  __device__ __forceinline__ uint32_t AttendedWord(const lists::Step& step, int head, int thread) const {
    const int block_q = static_cast<int>(params.shape.block_q), block_kv = static_cast<int>(params.shape.block_kv);
    uint32_t word = Config::kMayBeExtended ? ~0u : 0;
    if (step.tile >= 0 && thread < 2 * Config::kKeyTileQ) {
      word =
          __ldg(lists::BitTileRow(params.tiles, batch, head, step.tile, step.offset + thread / 2, block_q, block_kv) +
                kv_start % block_kv / 32 + thread % 2);
    }
    // Queries past the length may have any logits, and with a bias any probabilities; keys past it have rows of their
    // own in the products, but not in the gate's sum.
    if (step.start + thread / 2 >= limit.query) word = 0;
    if (Config::kMayBeExtended) word &= static_cast<uint32_t>(device::FirstBits(kv_rows - 32 * (thread % 2)));
    return word;
  }
};

// Scores are transposed here: rows are keys, columns queries. Of them a thread has rows warp_row + g and + 8, and of
// every eight columns 2t and 2t + 1 (device/mma.cuh).
template <typename Config>
struct KeyThread {
  using Scores = float[1][Config::kKeyTileQ / 8][4];
  using Gradient = float[1][Config::kDim / 8][4];

  int thread, warp, warp_row, g, t;
  bool makes_dvalue, makes_dkey;

  __device__ __forceinline__ explicit KeyThread(int thread)
      : thread(thread),
        warp(thread / 32 % 4),
        warp_row(warp * 16),
        g(thread % 32 / 4),
        t(thread % 4),
        makes_dvalue(!Config::kSplit || thread < 128),
        makes_dkey(!Config::kSplit || thread >= 128) {}
  __device__ __forceinline__ int Column(int n, int e) const { return 8 * n + 2 * t + e % 2; }
  // True if a key is attended to by the query of a column.
  __device__ __forceinline__ bool Attends(const KeyShared<Config>& shared, int column, int e) const {
    const int bit = (warp_row + 8 * (e / 2) + g) % 32;
    return shared.attended[column][warp_row / 32] >> bit & 1;
  }
};

// A row's rest is read anew for each pair: kept for the two that need it, it would spill.
template <typename Config>
__device__ __forceinline__ float RestOf(const KeyShared<Config>& shared, int query) {
  return *static_cast<const volatile float*>(&shared.rows[query].rest);
}

// S^T and dP^T to P^T and dS^T, in place. `bad`: queries whose row, or output gradient, is not finite.
template <typename Config>
__device__ __forceinline__ void MakeGradients(const KeyShared<Config>& shared, const KeyThread<Config>& own,
                                              const LogitMap& map, bool masked, uint64_t bad,
                                              typename KeyThread<Config>::Scores& scores,
                                              typename KeyThread<Config>::Scores& dscores) {
#pragma unroll
  for (int n = 0; n < Config::kKeyTileQ / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      PairGradient(scores[0][n][e], dscores[0][n][e], shared.rows[own.Column(n, e)], RestOf(shared, own.Column(n, e)),
                   1.f, map);
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < Config::kKeyTileQ / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = own.Column(n, e);
      if (bad >> column & 1) scores[0][n][e] = dscores[0][n][e] = device::QuietNan();
      if (!own.Attends(shared, column, e)) scores[0][n][e] = dscores[0][n][e] = 0.f;
    }
}

// The same with gates, biases and dropout. Afterwards the probabilities have the gate and the pair's weight in them.
// Returns the sum of P o dP over the thread's pairs, which is the gate's gradient. extras_of(column): PairExtras of the
// kExtrasN8 columns of eight that begin there.
template <typename Config, typename Extras>
__device__ __forceinline__ float MakeExtendedGradients(const KeyShared<Config>& shared, const KeyThread<Config>& own,
                                                       const LogitMap& map, float gate, const Extras& extras_of,
                                                       uint64_t bad, typename KeyThread<Config>::Scores& scores,
                                                       typename KeyThread<Config>::Scores& dscores) {
  float sum = 0.f;
#pragma unroll
  for (int first = 0; first < Config::kKeyTileQ / 8; first += kExtrasN8) {
    const auto extras = extras_of(8 * first);
#pragma unroll
    for (int n = 0; n < kExtrasN8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = own.Column(first + n, e);
        const float weight = extras.Weight(n, e);
        float &prob = scores[0][first + n][e], &dscore = dscores[0][first + n][e], dprob = weight * dscore;
        PairGradient(prob, dscore, shared.rows[column], RestOf(shared, column), gate * weight, map,
                     [&](float x) { return extras.Logit(x, n, e); });
        if (bad >> column & 1) prob = dscore = dprob = device::QuietNan();
        if (!own.Attends(shared, column, e)) prob = dscore = dprob = 0.f;
        sum = fmaf(prob, dprob, sum);
        if (prob != 0.f) prob *= gate * weight;
      }
  }
  return sum;
}

// Adds a step's sum to that of the 64 x 64 pairs it is part of. With the last step of these, `next` being no longer one
// of them, their sum is stored, and the next begins at 0.
template <typename Config>
__device__ __forceinline__ void AddToGateSum(KeyShared<Config>& shared, const KeyTile<Config>& tile,
                                             const KeyThread<Config>& own, float sum, float* gate_sums,
                                             const lists::Step& now, bool more, const lists::Step& next) {
  sum += shared.gate_sums[own.thread];
  if (own.makes_dkey && (!more || next.start != now.start + Config::kKeyTileQ || next.start % 64 == 0)) {
    sum = device::WarpSum(sum);
    if (own.thread % 32 == 0) {
      gate_sums[GateSumIndex(tile.params.shape, shared.gate, tile.kv_start, now.offset) + own.warp] = sum;
    }
    sum = 0.f;
  }
  shared.gate_sums[own.thread] = sum;
}

// One tile of queries of one head: dV += P^T dO, dK += dS^T Q. The tile's output gradients are on their way when it
// begins, and those of `next`, of head `next_head`, when it ends.
template <typename Config>
__device__ __forceinline__ void KeyGradientStep(KeyShared<Config>& shared, const KeyTile<Config>& tile,
                                                const KeyThread<Config>& own, const LogitMap& map, float* gate_sums,
                                                const lists::Step& now, int head, bool more, const lists::Step& next,
                                                int next_head, typename KeyThread<Config>::Gradient& dvalue,
                                                typename KeyThread<Config>::Gradient& dkey) {
  constexpr int kThreads = Config::kKeyThreads, kTileQ = Config::kKeyTileQ;
  const int thread = own.thread;

  // Output gradients are here, and nobody reads anything else of the previous step any more: fetch the queries, their
  // statistics and their masks during V dO^T.
  device::WaitForCopies();
  __syncthreads();
  tile.LoadQueries(shared, now, head, thread);
  if (HasBias<Config>(tile.params.bias)) {
    shared.views.WriteHead(tile.params.bias, tile.params.shape, tile.batch, head, thread);
    shared.views.WriteBlock(tile.params.bias, tile.params.shape, now.start, tile.kv_start, thread);
  }
  const RowStatistics row = tile.Statistics(now, head, thread);
  const uint32_t word = tile.AttendedWord(now, head, thread);
  uint64_t bad = 0;
  if (now.tile >= 0) bad = device::CleanRows<kThreads>(shared.dout, shared.bad_douts, thread);
  typename KeyThread<Config>::Scores dscores;
  device::Clear(dscores);
  if (own.makes_dkey) device::MultiplyRows(dscores, shared.value, own.warp_row, shared.dout);
  if (thread < kTileQ) shared.rows[thread] = row;
  if (thread < 2 * kTileQ) shared.attended[thread / 2][thread % 2] = word;

  // Queries are here.
  device::WaitForCopies();
  __syncthreads();
  if (now.tile >= 0) bad |= device::CleanRows<kThreads>(shared.query, shared.bad_queries, thread);
  typename KeyThread<Config>::Scores scores;
  device::Clear(scores);
  device::MultiplyRows(scores, shared.key, own.warp_row, shared.query);
  const bool gated = HasGates<Config>(tile.params.dgates);
  if (Config::kAlwaysExtended || gated || HasBiasOrDropout<Config>(tile.params)) {
    // Not earlier, for want of registers.
    const float gate = gated ? lists::ReadGate(tile.params.col_gates, shared.gate) : 1.f;
    const auto extras_of = [&](int column) {
      return PairExtras<Config, true>(tile.params, shared.views, map, tile.batch, head,
                                      tile.kv_start + own.warp_row + own.g, now.start + column + 2 * own.t);
    };
    const float sum = MakeExtendedGradients(shared, own, map, gate, extras_of, bad, scores, dscores);
    if (gated) AddToGateSum(shared, tile, own, sum, gate_sums, now, more, next);
  } else {
    MakeGradients(shared, own, map, now.tile >= 0, bad, scores, dscores);
  }
  if (own.makes_dvalue) device::MultiplyColumns(dvalue, scores, shared.dout);

  // Nobody reads these output gradients any more: fetch the next during dS^T Q.
  __syncthreads();
  if (more) tile.LoadDouts(shared, next, next_head, thread);
  if (own.makes_dkey) device::MultiplyColumns(dkey, dscores, shared.query);
}

// dK and dV of 64 keys of one key/value head; the query heads of the group are visited in turn.
template <typename Config>
__device__ __forceinline__ void KeyGradientTile(KeyShared<Config>& shared, const BackwardParams& params,
                                                float* gate_sums, const int number) {
  using Element = typename Config::Element;

  // ---- Position, and what this warp makes of it
  const KeyTile<Config> tile(params, number);
  const int thread = static_cast<int>(threadIdx.x);
  const KeyThread<Config> own(thread);

  // ---- Prologue: keys, values and the first output gradients are on their way.
  const int first_head = tile.kv_head * tile.group;
  GroupWalker<Config::kKeyTileQ> walker(params, tile.batch, first_head, first_head + tile.group - 1,
                                        tile.kv_start / static_cast<int>(params.shape.block_kv), tile.limit.query);
  lists::Step step;
  int head = 0;
  bool more = walker.Next(step, head) && tile.kv_rows > 0;
  if constexpr (Config::kMayBeExtended) shared.gate_sums[thread] = 0.f;
  if (thread < 2) shared.bad_queries[thread] = shared.bad_douts[thread] = 0;
  if (more) {
    tile.LoadKeysAndValues(shared, thread);
    tile.LoadDouts(shared, step, head, thread);
  }
  const LogitMap map(params.scale, params.soft_cap);
  constexpr int kAccumulators = Config::kSplit ? 1 : 2;
  typename KeyThread<Config>::Gradient gradients[kAccumulators];
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) device::Clear(gradients[i]);
  auto& dvalue = gradients[0];
  auto& dkey = gradients[kAccumulators - 1];

  // ---- Steps: a tile of queries each
  while (more) {
    const lists::Step now = step;
    const int now_head = head;
    if (HasGates<Config>(params.dgates) && thread == 0) {
      shared.gate = lists::GateIndex(params.cols, params.shape.heads, tile.batch, head, walker.position());
    }
    if (HasBias<Config>(params.bias)) {
      shared.views.ReadTile(params.bias, params.bias.col_tiles, walker.position(), thread);
    }
    more = walker.Next(step, head);
    KeyGradientStep(shared, tile, own, map, gate_sums, now, now_head, more, step, head, dvalue, dkey);
  }

  // ---- Epilogue. Keys at and past the length get 0.
  device::WaitForCopies();
  __syncthreads();
  if (HasGates<Config>(params.dgates)) {
    if (walker.poisoned() && tile.kv_rows > 0) {
      SpoilGateSums<Config::kKeyThreads>(params, gate_sums, tile.batch, tile.kv_head, tile.kv_start, thread);
    }
  }
  const int rows = static_cast<int>(params.shape.kv_len) - tile.kv_start;
  if (own.makes_dvalue) {
    const TwoRows ends(own.warp_row + own.g, tile.kv_rows, walker.poisoned(), 1.f);
    device::StoreRows(dvalue[0], ends.finish, shared.value, own.warp_row,
                      static_cast<Element*>(params.dvalue) + tile.ValueOffset(), tile.ValueStride(), rows,
                      static_cast<int>(params.shape.value_dim));
  }
  if (own.makes_dkey) {
    const TwoRows ends(own.warp_row + own.g, tile.kv_rows, walker.poisoned(), params.scale);
    device::StoreRows(dkey[0], ends.finish, shared.key, own.warp_row,
                      static_cast<Element*>(params.dkey) + tile.KeyOffset(), tile.KeyStride(), rows,
                      static_cast<int>(params.shape.head_dim));
  }
}

}  // namespace jax_bsk::attention::cuda::sm80
