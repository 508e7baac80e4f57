// Backward attention over block lists on Hopper (sm_90a), bit-equal from run to run: bwd_plan.h says how.
#pragma once

#include "attention/bias_lines.h"
#include "attention/sm90/bias_lines.h"
#include "attention/sm90/bwd_consumer.cuh"
#include "attention/sm90/bwd_producer.cuh"
#include "attention/sm90/tensor_map.h"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/registers.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    BackwardKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kWarpgroup, 0);  // uniform, and known to be

  if (threadIdx.x == 0) shared.Init();
  if (threadIdx.x == Config::kConsumerThreads) {
    for (const CUtensorMap* map : {&plan.query, &plan.dout, &plan.key, &plan.value}) {
      device::sm90::PrefetchTensorMap(*map);
    }
  }
  __syncthreads();

  if (warpgroup == Config::kConsumers) {
    device::sm90::LowerRegisters<Config::kProducerRegisters>();
    const int warp = threadIdx.x / 32 - Config::kConsumerThreads / 32;
    if (warp == 0) {
      BackwardScheduler<Config>(shared, params, plan).Run();
    } else if (warp == 1) {
      BackwardLoader<Config>(shared, params, plan).Run();
    } else if (warp == 2) {
      StoreScores<Config>(shared, params, plan);
    } else {
      LoadKeysAndValues<Config>(shared, plan);
    }
  } else {
    device::sm90::RaiseRegisters<Config::kConsumerRegisters>();
    BackwardConsumer<Config>(shared, params, plan, warpgroup).Run();
  }
}

template <typename Config>
cudaError_t LaunchBackward(const BackwardParams& params, const BackwardLayout& layout, void* workspace,
                           int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(BackwardShared<Config>));
  static_assert(kBytes <= BackwardSharedBytes<Config>());
  const Shape& shape = params.shape;
  const auto map = [&](const void* data, int64_t length, int64_t heads, int64_t dim, CUtensorMap* to) {
    // Nothing is read of an empty array, but a map needs an address.
    return MakeTensorMap(params.dtype, length > 0 ? data : workspace, shape.batch, length, heads, dim, 64, to);
  };
  BackwardPlan plan{};
  if (!map(params.query, shape.q_len, shape.heads, shape.head_dim, &plan.query) ||
      !map(params.dout, shape.q_len, shape.heads, shape.value_dim, &plan.dout) ||
      !map(params.key, shape.kv_len, shape.kv_heads, shape.head_dim, &plan.key) ||
      !map(params.value, shape.kv_len, shape.kv_heads, shape.value_dim, &plan.value)) {
    return cudaErrorInvalidValue;
  }
  plan.logits = LogitMap(params.scale, params.soft_cap);
  plan.bias_factor = device::kLog2E / plan.logits.multiplier;
  plan.kept_scale = Drops(params.dropout) ? DropoutScale(params.dropout.threshold) : 1.f;
  plan.slices = static_cast<int>(layout.slices);
  plan.buffers = static_cast<int>(layout.buffers);
  plan.slice_heads = static_cast<int>(layout.slice_heads);
  plan.kv_rows = static_cast<int>(shape.batch * shape.kv_heads);
  plan.group = static_cast<int>(shape.heads / shape.kv_heads);
  plan.entry_subtiles = static_cast<int>(shape.block_q / 64 * (shape.block_kv / 64));
  plan.buffer_subtiles = static_cast<int>(layout.buffer_subtiles);
  plan.key_items = static_cast<int>(layout.slice_heads * layout.key_tiles);
  const int query_items = static_cast<int>(layout.slice_heads * plan.group * shape.q_blocks);
  plan.slice_items = Divider(plan.key_items + query_items);
  plan.work_count = plan.slices * (plan.key_items + query_items);
  plan.key_tiles = Divider(std::max<int64_t>(layout.key_tiles, 1));
  plan.query_blocks = Divider(std::max<int64_t>(shape.q_blocks, 1));
  plan.heads = Divider(shape.heads);
  plan.kv_heads = Divider(shape.kv_heads);
  plan.query_tiles = static_cast<int>((shape.q_len + 63) / 64);
  auto* words = static_cast<int32_t*>(workspace);
  plan.work_counter = words + layout.counters_offset;
  plan.done_keys = plan.work_counter + 1;
  plan.done_queries = plan.done_keys + layout.slices;
  plan.inexact_keys = words + layout.inexact_keys_offset;
  plan.inexact_queries = words + layout.inexact_queries_offset;
  plan.matches = reinterpret_cast<const int2*>(words + layout.matches_offset);
  plan.statistics = static_cast<float*>(workspace) + layout.statistics_offset;
  plan.order = words + layout.order_offset;
  plan.gate_sums = static_cast<float*>(workspace) + layout.gate_sums_offset;
  plan.subtiles = static_cast<char*>(workspace) + layout.subtiles_offset;

  cudaError_t error = cudaFuncSetAttribute(BackwardKernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  if (Config::kExtras && params.bias.distances != nullptr) {
    auto* lines = static_cast<float*>(workspace) + layout.lines_offset;
    error = LaunchBiasLines(params.bias, shape, lines, stream);
    if (error != cudaSuccess) return error;
    plan.bias_lines = {reinterpret_cast<const float2*>(lines), static_cast<int>(BiasLinesOfTable(shape)),
                       static_cast<int>(BiasLineOfZero(shape))};
  }
  const int grid = std::min(plan.work_count, multiprocessors);
  BackwardKernel<Config><<<grid, Config::kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda::sm90
