// Forward attention over a block list, sm_80 and newer: online softmax in registers (FlashAttention-2, Dao 2023,
// Algorithm 1), one CTA for each tile of queries of one head.
#pragma once

#include "attention/sm80/config.h"
#include "device/block_list.cuh"
#include "device/mma.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
struct ForwardShared {
  using Element = typename Config::Element;
  device::Tile<Element, Config::kTileQ, Config::kDim> query;  // later the output's staging area
  device::Tile<Element, Config::kTileKv, Config::kDim> key;
  device::Tile<Element, Config::kTileKv, Config::kDim> value;
  uint32_t bad_values[2];  // see device::CleanRows
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 2) ForwardKernel(const __grid_constant__ ForwardParams params) {
  using Element = typename Config::Element;
  constexpr int kM = Config::kRowTiles, kThreads = Config::kThreads, kDim = Config::kDim, kTileKv = Config::kTileKv;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>(shared_bytes);

  // Which tile. Query tiles of one head are neighbours in the grid: they share keys and values in L2.
  const Shape& shape = params.shape;
  const int q_len = static_cast<int>(shape.q_len), heads = static_cast<int>(shape.heads);
  const int block_q = static_cast<int>(shape.block_q), block_kv = static_cast<int>(shape.block_kv);
  const int q_tiles = (q_len + Config::kTileQ - 1) / Config::kTileQ;
  const int q_start = static_cast<int>(blockIdx.x % q_tiles) * Config::kTileQ;
  const int head = static_cast<int>(blockIdx.x / q_tiles) % heads;
  const int batch = static_cast<int>(blockIdx.x / q_tiles) / heads;
  const int kv_heads = static_cast<int>(shape.kv_heads), kv_head = head / (heads / kv_heads);
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int warp_row = thread / 32 * 16 * kM;  // this warp's first row of the tile
  const auto limit = device::ReadLengths(params.lengths, batch, q_len, static_cast<int>(shape.kv_len));
  const int q_rows = max(0, min(limit.query - q_start, Config::kTileQ));  // rows that are within the lengths

  const int query_stride = heads * head_dim, key_stride = kv_heads * head_dim;  // refused beyond 2^31
  const int value_stride = kv_heads * value_dim, out_stride = heads * value_dim;
  const int64_t first_query = batch * shape.q_len + q_start, first_key = batch * shape.kv_len;
  const auto* query = static_cast<const Element*>(params.query) + first_query * query_stride + head * head_dim;
  const auto* keys = static_cast<const Element*>(params.key) + first_key * key_stride + kv_head * head_dim;
  const auto* values = static_cast<const Element*>(params.value) + first_key * value_stride + kv_head * value_dim;

  // Prologue: the queries and the first keys are on their way.
  device::BlockWalker<kTileKv> walker(params.rows, params.tiles, batch, head, q_start / block_q, block_kv, limit.key);
  device::Step step;
  bool more = walker.Next(step) && q_rows > 0;
  const auto read_gate = [&] {
    return device::ReadGate(params.gates, device::GateIndex(params.rows, shape.heads, batch, head, walker.position()));
  };
  float next_gate = Config::kGated && more ? read_gate() : 1.f;
  if (thread < 2) shared.bad_values[thread] = 0;
  if (more) {
    device::LoadTileAsync<kThreads>(shared.query, query, query_stride, q_rows, head_dim, thread);
    device::LoadTileAsync<kThreads>(shared.key, keys + int64_t{step.start} * key_stride, key_stride,
                                    limit.key - step.start, head_dim, thread);
  }
  const device::LogitMap map(params.scale, params.soft_cap);
  device::OnlineSoftmax softmax[kM];
  float out[kM][kDim / 8][4];
  device::Clear(out);

  while (more) {
    const device::Step now = step;
    const float gate = next_gate;
    more = walker.Next(step);
    if (Config::kGated && more) next_gate = read_gate();

    // Keys are here, and nobody reads the previous values any more: fetch these values during Q K^T and the softmax.
    device::WaitForCopies();
    __syncthreads();
    device::LoadTileAsync<kThreads>(shared.value, values + int64_t{now.start} * value_stride, value_stride,
                                    limit.key - now.start, value_dim, thread);
    const bool masked = now.tile >= 0 || now.start + kTileKv > limit.key;
    // Bit c: this thread's row attends to key c of the tile. Read where it is used (and again in the rare case below):
    // held across the products, these eight registers would spill.
    const auto attended = [&](int m, int half) {
      uint64_t bits = device::FirstBits(limit.key - now.start);
      if (now.tile >= 0) {
        const int row = q_start % block_q + warp_row + 16 * m + 8 * half + g;
        const uint32_t* words =
            device::BitTileRow(params.tiles, batch, head, now.tile, row, block_q, block_kv) + now.offset / 32;
        bits &= device::RowBits<kTileKv>(words);
      }
      return bits;
    };

    // Logits.
    float probs[kM][kTileKv / 8][4];
    device::Clear(probs);
    device::MultiplyRows(probs, shared.query, warp_row, shared.key);
    if (!map.plain) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) probs[m][n][e] = map(probs[m][n][e]);
    }
    if (masked) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint64_t bits = attended(m, half) >> (2 * t);
#pragma unroll
          for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (!(bits >> (8 * n + e) & 1)) probs[m][n][2 * half + e] = -device::Infinity();
        }
    }

    // Softmax.
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float rescale[2];
      softmax[m].Update(probs[m], map.multiplier, rescale);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] *= rescale[e / 2];
      if constexpr (Config::kGated) {
#pragma unroll
        for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            // A pair that does not attend stays 0, whatever the gate is.
            if (probs[m][n][e] != 0.f) probs[m][n][e] *= gate;
          }
      }
    }

    // Values are here, and nobody reads these keys any more: fetch the next keys during P V.
    device::WaitForCopies();
    __syncthreads();
    if (more) {
      device::LoadTileAsync<kThreads>(shared.key, keys + int64_t{step.start} * key_stride, key_stride,
                                      limit.key - step.start, head_dim, thread);
    }
    if (now.tile >= 0) {
      // A value that is not finite reaches only the rows that attend to it.
      const uint64_t bad = device::CleanRows<kThreads>(shared.value, shared.bad_values, thread);
      if (bad != 0) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint64_t bits = (attended(m, half) & bad) >> (2 * t);
#pragma unroll
            for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (bits >> (8 * n + e) & 1) probs[m][n][2 * half + e] = device::QuietNan();
          }
      }
    }
    device::MultiplyColumns(out, probs, shared.value);
  }

  // Epilogue: the sink joins the denominator, then out = accumulated / sum, lse = max + log(sum).
  device::WaitForCopies();
  __syncthreads();
  const auto* sinks = static_cast<const float*>(params.sinks);
  const float sink_logit = sinks == nullptr
                               ? -device::Infinity()
                               : __ldg(sinks + device::TableIndex(params.sinks_batch, params.sinks_heads, batch, head));
  const float sink = device::kLog2E * sink_logit;
  auto* out_rows = static_cast<Element*>(params.out) + first_query * out_stride + head * value_dim;
  const int64_t statistics = (int64_t{batch} * heads + head) * shape.q_len + q_start;
  float *lse = static_cast<float*>(params.lse) + statistics,
        *lse_rest = static_cast<float*>(params.lse_rest) + statistics;
  const bool poisoned = walker.poisoned();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    device::RowFinish finish[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + g;
      const float max = fmaxf(softmax[m].max[half], sink), shift = max == -device::Infinity() ? 0.f : max;
      const float rescale = device::Exp2(softmax[m].max[half] - shift);
      const float key_sum = device::QuadSum(softmax[m].sum[half]);
      const float sum = key_sum * rescale + (sink == shift ? 1.f : device::Exp2(sink - shift));  // also of +inf
      const bool valid = row < q_rows;
      finish[half] = {valid && !poisoned && sum != 0.f, rescale / sum, valid && poisoned ? device::QuietNan() : 0.f};
      if (t == 0 && q_start + row < q_len) {
        const auto log_sum = device::LogSum::Of(max, sum);
        lse[row] = device::StoredLse(!valid           ? -device::Infinity()
                                     : poisoned       ? device::QuietNan()
                                     : key_sum == 0.f ? sink_logit  // as it came, not through log2 and back
                                                      : log_sum.value);
        lse_rest[row] = valid && !poisoned && key_sum != 0.f ? log_sum.rest : 0.f;
      }
    }
    device::StoreRows(out[m], finish, shared.query, warp_row + 16 * m, out_rows, out_stride, q_len - q_start,
                      value_dim);
  }
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
