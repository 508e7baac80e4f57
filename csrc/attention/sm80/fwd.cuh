// Forward attention over a block list, sm_80 and newer: online softmax in registers (FlashAttention-2, Dao 2023,
// Algorithm 1), one CTA for each tile of queries of one head.
#pragma once

#include "attention/sm80/config.h"
#include "attention/sm80/extras.cuh"
#include "attention/sm80/query_tile.cuh"
#include "attention/softmax.cuh"
#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
struct ForwardShared {
  using Element = typename Config::Element;
  device::Tile<Element, Config::kTileQ, Config::kDim> query;  // later the output's staging area
  device::Tile<Element, Config::kTileKv, Config::kDim> key;
  device::Tile<Element, Config::kTileKv, Config::kDim> value;
  uint32_t bad_values[2];  // see device::CleanRows
  BiasViews views;         // of the step's entry
};

// A thread's share of its warp's rows: it has, of each 16, rows g and g + 8, and of every eight columns 2t and 2t + 1
// (device/mma.cuh).
template <typename Config>
struct ForwardThread {
  static constexpr int kM = Config::kRowTiles;  // of 16 rows
  using Logits = float[kM][Config::kTileKv / 8][4];
  using Out = float[kM][Config::kDim / 8][4];

  int warp_row;  // the warp's first row of the tile
  int g, t;

  __device__ __forceinline__ explicit ForwardThread(int thread)
      : warp_row(thread / 32 * 16 * kM), g(thread % 32 / 4), t(thread % 4) {}
  __device__ __forceinline__ int Row(int m, int half) const { return warp_row + 16 * m + 8 * half + g; }
};

// x of every pair (LogitMap), where that is not the product.
template <int kM, int kN8>
__device__ __forceinline__ void MapLogits(const LogitMap& map, float (&logits)[kM][kN8][4]) {
  if (map.plain) return;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) logits[m][n][e] = map(logits[m][n][e]);
}

// Puts `value` into the pairs whose bit is set in bits(m, half), which has one for each key.
template <typename Config, typename Bits>
__device__ __forceinline__ void Replace(typename ForwardThread<Config>::Logits& logits,
                                        const ForwardThread<Config>& own, float value, const Bits& bits_of) {
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t bits = bits_of(m, half) >> (2 * own.t);
#pragma unroll
      for (int n = 0; n < Config::kTileKv / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (bits >> (8 * n + e) & 1) logits[m][n][2 * half + e] = value;
    }
}

// Logits become probabilities relative to the running maximum, which what was accumulated so far follows.
template <typename Config>
__device__ __forceinline__ void Softmax(typename ForwardThread<Config>::Logits& probs,
                                        typename ForwardThread<Config>::Out& out,
                                        OnlineSoftmax (&softmax)[Config::kRowTiles], float multiplier) {
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m) {
    float rescale[2];
    softmax[m].Update(probs[m], multiplier, rescale);
#pragma unroll
    for (int n = 0; n < Config::kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[m][n][e] *= rescale[e / 2];
  }
}

// Adds the biases of a step's pairs to their x.
template <typename Config>
__device__ __forceinline__ void AddBiases(typename ForwardThread<Config>::Logits& logits,
                                          const ForwardShared<Config>& shared, const ForwardParams& params,
                                          const QueryTile<typename Config::Element, Config::kTileQ>& tile,
                                          const ForwardThread<Config>& own, const LogitMap& map,
                                          const lists::Step& now) {
  const float factor = BiasFactor(map);
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m)
#pragma unroll
    for (int first = 0; first < Config::kTileKv / 8; first += kExtrasN8) {
      float bias[kExtrasN8][4];
      SumBiases<typename Config::Element, false>(bias, shared.views, params.shape, tile.q_start + own.Row(m, 0),
                                                 now.start + 8 * first + 2 * own.t);
#pragma unroll
      for (int n = 0; n < kExtrasN8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          logits[m][first + n][e] = BiasedLogit(logits[m][first + n][e], bias[n][e], factor);
        }
    }
}

// Probabilities become the factors of values: after the softmax, so that the log-sum-exp knows nothing of it. What
// dropout leaves is scaled in StoreForward: times a factor, a row's largest probability, 1, would not be exact in 16
// bits.
template <typename Config>
__device__ __forceinline__ void Weigh(typename ForwardThread<Config>::Logits& probs, const ForwardParams& params,
                                      const QueryTile<typename Config::Element, Config::kTileQ>& tile,
                                      const ForwardThread<Config>& own, const lists::Step& now, float gate) {
  if (HasGates<Config>(params.gates)) {
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < Config::kTileKv / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // A pair that does not attend stays 0, whatever the gate is.
          if (probs[m][n][e] != 0.f) probs[m][n][e] *= gate;
        }
  }
  if (HasDropout<Config>(params.dropout)) {
    const int threshold = params.dropout.threshold;
    const uint32_t head_key = __ldg(params.dropout.keys + tile.batch * params.shape.heads + tile.head);
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
      DropoutWords<false, Config::kTileKv / 8> words;
      words.Make(head_key, tile.q_start + own.Row(m, 0), now.start + 2 * own.t);
#pragma unroll
      for (int n = 0; n < Config::kTileKv / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (words.IsDropped(n, e, threshold)) probs[m][n][e] = 0.f;
    }
  }
}

// The end of a row: what becomes of its accumulated output, and its statistics.
struct RowEnd {
  device::RowFinish finish;
  float lse, lse_rest;

  // `max` and `sum` are OnlineSoftmax's of this thread. The sink joins the denominator. `valid`: the row is within the
  // lengths.
  __device__ __forceinline__ RowEnd(float running_max, float running_sum, float sink_logit, bool valid, bool poisoned) {
    const float sink = device::kLog2E * sink_logit;
    const float max = fmaxf(running_max, sink), shift = max == -device::Infinity() ? 0.f : max;
    const float rescale = device::Exp2(running_max - shift);
    const float key_sum = device::QuadSum(running_sum);
    const float sum = key_sum * rescale + (sink == shift ? 1.f : device::Exp2(sink - shift));  // also of +inf
    finish = {valid && !poisoned && sum != 0.f, rescale / sum, valid && poisoned ? device::QuietNan() : 0.f};
    const auto log_sum = LogSum::Of(max, sum);
    lse = StoredLse(!valid           ? -device::Infinity()
                    : poisoned       ? device::QuietNan()
                    : key_sum == 0.f ? sink_logit  // as it came, not through log2 and back
                                     : log_sum.value);
    lse_rest = valid && !poisoned && key_sum != 0.f ? log_sum.rest : 0.f;
  }
};

// out = accumulated / sum, lse = max + log(sum).
template <typename Config>
__device__ __forceinline__ void StoreForward(const ForwardParams& params,
                                             const QueryTile<typename Config::Element, Config::kTileQ>& tile,
                                             const ForwardThread<Config>& own,
                                             const typename ForwardThread<Config>::Out& out,
                                             const OnlineSoftmax (&softmax)[Config::kRowTiles], bool poisoned,
                                             ForwardShared<Config>& shared) {
  using Element = typename Config::Element;
  const int value_dim = static_cast<int>(params.shape.value_dim);
  const int rows = static_cast<int>(params.shape.q_len) - tile.q_start;
  const auto* sinks = static_cast<const float*>(params.sinks);
  const int64_t sink_index = lists::TableIndex(params.sinks_batch, params.sinks_heads, tile.batch, tile.head);
  const float sink_logit = sinks == nullptr ? -device::Infinity() : __ldg(sinks + sink_index);
  auto* out_rows = static_cast<Element*>(params.out) + tile.first_query * tile.out_stride + tile.head * value_dim;
  const int64_t statistics = tile.Statistics(params.shape);
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m) {
    device::RowFinish finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own.Row(m, half);
      const RowEnd end(softmax[m].max[half], softmax[m].sum[half], sink_logit, row < tile.q_rows, poisoned);
      finish[half] = end.finish;
      if (HasDropout<Config>(params.dropout)) finish[half].scale *= DropoutScale(params.dropout.threshold);
      if (own.t == 0 && row < rows) {
        static_cast<float*>(params.lse)[statistics + row] = end.lse;
        static_cast<float*>(params.lse_rest)[statistics + row] = end.lse_rest;
      }
    }
    device::StoreRows(out[m], finish, shared.query, own.warp_row + 16 * m, out_rows, tile.out_stride, rows, value_dim);
  }
}

// One tile of keys and values: out += P V. Its keys are on their way when it begins, and those of `next` when it ends.
template <typename Config>
__device__ __forceinline__ void ForwardStep(ForwardShared<Config>& shared, const ForwardParams& params,
                                            const QueryTile<typename Config::Element, Config::kTileQ>& tile,
                                            const TileLoader<Config::kThreads>& load, const ForwardThread<Config>& own,
                                            const LogitMap& map, float gate, const lists::Step& now, bool more,
                                            const lists::Step& next, OnlineSoftmax (&softmax)[Config::kRowTiles],
                                            typename ForwardThread<Config>::Out& out) {
  constexpr int kTileKv = Config::kTileKv;

  if (HasBias<Config>(params.bias)) {  // nobody reads those of the previous step any more
    shared.views.WriteBlock(params.bias, params.shape, tile.q_start, now.start, load.thread);
  }
  // Keys are here, and nobody reads the previous values any more: fetch these values during Q K^T and the softmax.
  device::WaitForCopies();
  __syncthreads();
  load.Values(shared.value, tile, now);
  // Read where it is used (and again in the rare case below): held across the products, these eight registers would
  // spill.
  const auto attended = [&](int m, int half) {
    return AttendedKeys<kTileKv>(params.tiles, params.shape, tile, own.Row(m, half), now);
  };
  typename ForwardThread<Config>::Logits probs;
  device::Clear(probs);
  device::MultiplyRows(probs, shared.query, own.warp_row, shared.key);
  MapLogits(map, probs);
  if (HasBias<Config>(params.bias)) AddBiases<Config>(probs, shared, params, tile, own, map, now);
  if (now.tile >= 0 || now.start + kTileKv > tile.limit.key) {
    Replace<Config>(probs, own, -device::Infinity(), [&](int m, int half) { return ~attended(m, half); });
  }
  Softmax<Config>(probs, out, softmax, map.multiplier);
  Weigh<Config>(probs, params, tile, own, now, gate);

  // Values are here, and nobody reads these keys any more: fetch the next keys during P V.
  device::WaitForCopies();
  __syncthreads();
  if (more) load.Keys(shared.key, tile, next);
  if (now.tile >= 0) {
    // A value that is not finite reaches only the rows that attend to it.
    const uint64_t bad = device::CleanRows<Config::kThreads>(shared.value, shared.bad_values, load.thread);
    if (bad != 0) {
      Replace<Config>(probs, own, device::QuietNan(), [&](int m, int half) { return attended(m, half) & bad; });
    }
  }
  device::MultiplyColumns(out, probs, shared.value);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 2) ForwardKernel(const __grid_constant__ ForwardParams params) {
  using Thread = ForwardThread<Config>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>(shared_bytes);

  // ---- Position
  const QueryTile<typename Config::Element, Config::kTileQ> tile(params, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const Thread own(thread);
  const int block_q = static_cast<int>(params.shape.block_q), block_kv = static_cast<int>(params.shape.block_kv);
  const TileLoader<Config::kThreads> load(params.shape, thread);

  // ---- Prologue: the queries and the first keys are on their way.
  lists::BlockWalker<Config::kTileKv> walker(params.rows, params.tiles, tile.batch, tile.head, tile.q_start / block_q,
                                             block_kv, tile.limit.key);
  lists::Step step;
  bool more = walker.Next(step) && tile.q_rows > 0;
  const bool gated = HasGates<Config>(params.gates);
  const auto read_gate = [&] {
    return lists::ReadGate(params.gates,
                           lists::GateIndex(params.rows, params.shape.heads, tile.batch, tile.head, walker.position()));
  };
  float next_gate = gated && more ? read_gate() : 1.f;
  if (HasBias<Config>(params.bias)) {
    shared.views.WriteHead(params.bias, params.shape, tile.batch, tile.head, thread);
  }
  if (thread < 2) shared.bad_values[thread] = 0;
  if (more) {
    load.Queries(shared.query, tile);
    load.Keys(shared.key, tile, step);
  }
  const LogitMap map(params.scale, params.soft_cap);
  OnlineSoftmax softmax[Config::kRowTiles];
  typename Thread::Out out;
  device::Clear(out);

  // ---- Steps: a tile of keys and values each
  while (more) {
    const lists::Step now = step;
    const float gate = next_gate;
    if (HasBias<Config>(params.bias)) {
      shared.views.ReadTile(params.bias, params.bias.row_tiles, walker.position(), thread);
    }
    more = walker.Next(step);
    if (gated && more) next_gate = read_gate();
    ForwardStep<Config>(shared, params, tile, load, own, map, gate, now, more, step, softmax, out);
  }

  // ---- Epilogue
  device::WaitForCopies();
  __syncthreads();
  StoreForward<Config>(params, tile, own, out, softmax, walker.poisoned(), shared);
}

template <typename Config>
cudaError_t LaunchForward(const ForwardParams& params, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(ForwardShared<Config>));
  static_assert(kBytes <= ForwardSharedBytes<Config>());
  const cudaError_t error =
      cudaFuncSetAttribute(ForwardKernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const Shape& shape = params.shape;
  const int64_t q_tiles = (shape.q_len + Config::kTileQ - 1) / Config::kTileQ;
  const auto grid = static_cast<unsigned>(q_tiles * shape.heads * shape.batch);
  ForwardKernel<Config><<<grid, Config::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda::sm80
