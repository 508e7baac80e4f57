// Where rows go when their keys, or a part of them, are summed; and the kernel that merges the parts of a row in their
// order, and fills the rows that no unit has.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "decode/cuda/config.h"
#include "decode/cuda/units.cuh"
#include "device/numbers.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/thread.cuh"
#include "device/softmax.cuh"

namespace jax_bsk::decode::cuda {

__device__ __forceinline__ void AddScaled(float4& sum, const float4& x, float factor) {
  sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
  sum.z = fmaf(x.z, factor, sum.z), sum.w = fmaf(x.w, factor, sum.w);
}

template <typename Element>
__device__ __forceinline__ void StoreFour(Element* to, const float4& x) {
  if constexpr (sizeof(Element) == 4) {
    *reinterpret_cast<float4*>(to) = x;
  } else {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(device::PackPair<Element>(x.x, x.y), device::PackPair<Element>(x.z, x.w));
  }
}

// The end of a row: its sink joins the denominator.
struct RowEnd {
  bool empty;           // the output is 0, whatever was accumulated
  float factor;         // of the accumulated output
  float lse, lse_rest;  // and what rounding took from it

  // Largest and sum of the row's probabilities, in units of log2; `sink_logit` is -inf without a sink.
  __device__ __forceinline__ RowEnd(float max, float sum, float sink_logit, float value_scale) {
    const float sink = device::kLog2E * sink_logit;
    const float top = fmaxf(max, sink), shift = top == -device::Infinity() ? 0.f : top;
    const float rescale = device::Exp2(max - shift);
    const float total = sum * rescale + (sink == shift ? 1.f : device::Exp2(sink - shift));  // also of +inf
    empty = total == 0.f;
    factor = rescale / total * value_scale;
    const auto log_sum = device::LogSum::Of(top, total);
    lse = device::StoredLse(sum == 0.f ? sink_logit : log_sum.value);  // a sink as it came
    lse_rest = sum == 0.f ? 0.f : log_sum.rest;
  }
  __device__ __forceinline__ float4 operator()(const float4& x) const {
    if (empty) return make_float4(0.f, 0.f, 0.f, 0.f);
    return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
  }
};

__device__ __forceinline__ float SinkLogit(const KernelParams& params, int group, int head) {
  if (params.sinks == nullptr) return -device::Infinity();
  return __ldg(params.sinks + group * params.sink_group_stride + head * params.sink_head_stride);
}

// Stores the log-sum-exp of a row of the output.
template <typename Config>
__device__ __forceinline__ void StoreLse(const KernelParams& params, int group, int token, int head, float lse,
                                         float lse_rest) {
  if constexpr (Config::kListed) {
    const int64_t index = (group * params.shape.heads + head) * params.tokens + token;
    params.lse[index] = lse, params.lse_rest[index] = lse_rest;
  } else {
    params.lse[(int64_t{group} * params.tokens + token) * params.shape.heads + head] = lse;
  }
}

// The index of a row's first part.
__device__ __forceinline__ int64_t FirstPart(const KernelParams& params, bool is_short, int group, int sequence,
                                             int query, int token, int head) {
  int64_t place = int64_t{group} * params.tokens + token;
  if (is_short && params.short_places != params.tokens) {
    place = int64_t{group} * params.short_places + sequence * params.short_queries + query;
  }
  return (place * params.shape.heads + head) * (is_short ? params.short_parts : params.long_parts);
}

// Stores four columns of a row of a unit.
template <typename Config>
struct RowStore {
  const KernelParams& params;
  const Unit& unit;

  __device__ __forceinline__ RowStore(const KernelParams& params, const Unit& unit) : params(params), unit(unit) {}

  __device__ __forceinline__ void operator()(int row, int column, const float4& x, float max, float sum) const {
    using Element = typename Config::Element;
    if (column >= params.value_dim) return;
    const int query = params.by_group_heads.Quotient(unit.row + row), token = unit.first_token + query;
    const int head = unit.kv_head * params.group_heads + params.by_group_heads.Rest(unit.row + row);
    if (unit.parts == 1) {
      const RowEnd end(max, sum, SinkLogit(params, unit.group, head), params.value_scale);
      const int64_t index = (int64_t{unit.group} * params.tokens + token) * params.shape.heads + head;
      StoreFour(static_cast<Element*>(params.out) + index * params.value_dim + column, end(x));
      if (column == 0) StoreLse<Config>(params, unit.group, token, head, end.lse, end.lse_rest);
    } else {
      const int64_t index = unit.part + FirstPart(params, unit.is_short, unit.group, unit.sequence, query, token, head);
      auto* out = (unit.is_short ? params.short_out : params.long_out) + index * params.partial_dim + column;
      *reinterpret_cast<float4*>(out) = x;
      if (column == 0) (unit.is_short ? params.short_stats : params.long_stats)[index] = make_float2(max, sum);
    }
  }
};

// A row's sum, relative to its largest logit so far.
template <int kColumns>
struct RowSum {
  float4 out[kColumns] = {};
  float max = -device::Infinity(), sum = 0.f;

  __device__ __forceinline__ void Add(const float4 (&x)[kColumns], const float2& stats) {
    const float top = fmaxf(max, stats.x), shift = top == -device::Infinity() ? 0.f : top;
    const float old = device::Exp2(max - shift), factor = device::Exp2(stats.x - shift);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      out[i] = make_float4(out[i].x * old, out[i].y * old, out[i].z * old, out[i].w * old);
      AddScaled(out[i], x[i], factor);
    }
    sum = fmaf(stats.y, factor, sum * old);
    max = top;
  }
};

// A row of the output for each kRowWarps warps, which take its parts in turn.
template <typename Config, int kRowWarps>
__global__ void __launch_bounds__(Config::kThreads) MergeKernel(const __grid_constant__ KernelParams params) {
  using Element = typename Config::Element;
  constexpr int kRows = Config::kWarps / kRowWarps, kColumns = (Config::kDim + 127) / 128;  // four a lane each
  __shared__ float4 shares[kRowWarps > 1 ? Config::kWarps : 1][kColumns][32];
  __shared__ float2 share_stats[Config::kWarps];
  const Shape& shape = params.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t index = int64_t{blockIdx.x} * kRows + warp / kRowWarps;
  if (index >= shape.groups * shape.tokens * shape.heads) return;
  const int head = static_cast<int>(index % shape.heads);
  const int token = static_cast<int>(index / shape.heads % shape.tokens);
  const int group = static_cast<int>(index / shape.heads / shape.tokens);
  const int dim = params.value_dim;
  auto* out = static_cast<Element*>(params.out) + index * dim;
  const auto fill = [&](float value, float lse) {
    if (warp % kRowWarps != 0) return;
    for (int column = 4 * lane; column < dim; column += 128) {
      StoreFour(out + column, make_float4(value, value, value, value));
    }
    if (lane == 0) StoreLse<Config>(params, group, token, head, device::StoredLse(lse), 0.f);
  };

  // ---- The token's sequence: the last one that does not begin behind it
  int low = 0;
  bool inside = true;
  if constexpr (!Config::kListed) {
    const int32_t* offsets = params.cu_q_lens + group * (params.seqs + 1);
    const int count = min(max(__ldg(params.num_seqs + group), 0), params.seqs);
    int high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (__ldg(offsets + middle) <= token ? low : high) = middle;
    }
    inside = count > 0 && token >= __ldg(offsets) && token < __ldg(offsets + count);
  }

  // ---- Its tile's parts
  const Sequence sequence = Sequence::Read<Config>(params, group, inside ? low : 0);
  const RowTiles tiles = RowTiles::Of<Config>(params, sequence);
  const int query = token - sequence.first, row = query * params.group_heads + params.by_group_heads.Rest(head);
  const int height = tiles.Height<Config>(), first_row = row / height * height;
  const Steps steps = Steps::Of<Config>(params, sequence, params.by_group_heads.Quotient(first_row),
                                        params.by_group_heads.Quotient(min(first_row + height, tiles.rows) - 1));
  const int parts = Parts::Of<Config>(params, tiles, steps.count).count;
  if (Config::kListed) inside = query < sequence.q_len;

  // ---- What the forward wrote
  device::WaitForKernelBefore();
  if (!Config::kListed && params.bad_groups[group] != 0) return fill(device::QuietNan(), device::QuietNan());
  if (!inside) return fill(0.f, -device::Infinity());
  if (sequence.kv_len < 0) return fill(device::QuietNan(), device::QuietNan());
  if (parts == 1) return;

  // ---- The sum of a warp's parts, in their order
  const int64_t first = FirstPart(params, tiles.is_short, group, low, query, token, head);
  const float2* stats = (tiles.is_short ? params.short_stats : params.long_stats) + first;
  const float* partial = (tiles.is_short ? params.short_out : params.long_out) + first * params.partial_dim;
  RowSum<kColumns> total;
  constexpr int kUnroll = kColumns == 1 ? 4 : 1;  // with two, one kernel spills
#pragma unroll kUnroll
  for (int part = warp % kRowWarps; part < parts; part += kRowWarps) {
    float4 x[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = 4 * lane + 128 * i;
      if (column < dim) {
        x[i] = *reinterpret_cast<const float4*>(partial + int64_t{part} * params.partial_dim + column);
      }
    }
    total.Add(x, stats[part]);
  }

  // ---- Of all warps
  if constexpr (kRowWarps > 1) {
    static_assert(kRows == 1);  // a CTA's warps are all here
#pragma unroll
    for (int i = 0; i < kColumns; ++i) shares[warp][i][lane] = total.out[i];
    if (lane == 0) share_stats[warp] = make_float2(total.max, total.sum);
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < kRowWarps; ++w) {
      float4 x[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) x[i] = shares[w][i][lane];
      total.Add(x, share_stats[w]);
    }
  }
  const RowEnd end(total.max, total.sum, SinkLogit(params, group, head), params.value_scale);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = 4 * lane + 128 * i;
    if (column < dim) StoreFour(out + column, end(total.out[i]));
  }
  if (lane == 0) StoreLse<Config>(params, group, token, head, end.lse, end.lse_rest);
}

// Launches it behind the forward, on the same stream. On Hopper its CTAs start while the forward's last ones end.
template <typename Config>
cudaError_t LaunchMerge(const KernelParams& params, bool overlapped, cudaStream_t stream) {
  const Shape& shape = params.shape;
  const int64_t rows = shape.groups * shape.tokens * shape.heads;
  const bool many_parts = std::max(params.short_parts, params.long_parts) >= 8;
  const int64_t ctas = many_parts ? rows : (rows + Config::kWarps - 1) / Config::kWarps;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(ctas), config.blockDim = Config::kThreads, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = overlapped ? 1 : 0;
  return many_parts ? cudaLaunchKernelEx(&config, MergeKernel<Config, Config::kWarps>, params)
                    : cudaLaunchKernelEx(&config, MergeKernel<Config, 1>, params);
}

}  // namespace jax_bsk::decode::cuda
