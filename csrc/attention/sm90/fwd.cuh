// Forward attention over a block list on Hopper (sm_90a): copy engine, mbarrier pipelines, warpgroup products, one or
// two producer warps, two helper warps where there may be biases, and one or two consumer warpgroups.
#pragma once

#include <numeric>

#include "attention/bias_lines.h"
#include "attention/sm90/bias_lines.h"
#include "attention/sm90/fwd_consumer.cuh"
#include "attention/sm90/fwd_feeder.cuh"
#include "attention/sm90/fwd_helper.cuh"
#include "attention/sm90/fwd_producer.cuh"
#include "attention/sm90/tensor_map.h"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/registers.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    ForwardKernel(const __grid_constant__ ForwardParams params, const __grid_constant__ ForwardPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kWarpgroup, 0);  // uniform, and known to be

  if (threadIdx.x == 0) shared.Init();
  if constexpr (Config::kExtras) shared.ramp.Init();
  if (threadIdx.x == Config::kConsumerThreads) {
    for (const CUtensorMap* map : {&plan.query, &plan.key, &plan.value}) {
      device::sm90::PrefetchTensorMap(*map);
    }
  }
  __syncthreads();

  if constexpr (Config::kFeeder) {
    if (warpgroup == Config::kConsumers) {
      ForwardFeeder<Config>(shared, params, plan).Run();
    } else {
      ForwardConsumer<Config>(shared, params, plan, 0).RunFed();
    }
  } else if (warpgroup == Config::kConsumers) {
    if constexpr (Config::kMoveRegisters) device::sm90::LowerRegisters<Config::kProducerRegisters>();
    const int warp = threadIdx.x / 32 - Config::kConsumerThreads / 32;
    if (warp == 0) {
      ForwardScheduler<Config>(shared, params, plan).Run();
    } else if (warp == 1) {
      ForwardLoader<Config>(shared, params, plan).Run();
    } else if constexpr (Config::kExtras) {
      ForwardHelper<Config>(shared, params, plan, warp - 2).Run();
    }
  } else {
    if constexpr (Config::kMoveRegisters) device::sm90::RaiseRegisters<Config::kConsumerRegisters>();
    ForwardConsumer<Config>(shared, params, plan, warpgroup).Run();
  }
}

template <typename Config>
cudaError_t LaunchForward(const ForwardParams& params, int32_t* workspace, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(ForwardShared<Config>));
  static_assert(kBytes <= ForwardSharedBytes<Config>());
  const Shape& shape = params.shape;
  const int kv_rows = static_cast<int>(std::min<int64_t>(shape.block_kv, Config::kTileKv));
  // No key is read where there is none, but a map needs an address.
  const void* key = shape.kv_len > 0 ? params.key : params.query;
  const void* value = shape.kv_len > 0 ? params.value : params.query;
  ForwardPlan plan{};
  auto* lines = reinterpret_cast<float*>(workspace);
  workspace += BiasLineWords(shape, DistanceTables(params.bias));
  plan.inexact_tiles = workspace + 1;
  plan.logits = LogitMap(params.scale, params.soft_cap);
  plan.bias_factor = device::kLog2E / plan.logits.multiplier;
  plan.from_end = Config::kExtras && params.bias.distances != nullptr;
  plan.walk_step = plan.from_end ? -1 : 1;
  plan.kept_scale = Drops(params.dropout) ? DropoutScale(params.dropout.threshold) : 1.f;
  const bool encoded =
      MakeTensorMap(params.dtype, params.query, shape.batch, shape.q_len, shape.heads, shape.head_dim, Config::kTileQ,
                    &plan.query) &&
      MakeTensorMap(params.dtype, key, shape.batch, shape.kv_len, shape.kv_heads, shape.head_dim, kv_rows, &plan.key) &&
      MakeTensorMap(params.dtype, value, shape.batch, shape.kv_len, shape.kv_heads, shape.value_dim, kv_rows,
                    &plan.value);
  if (!encoded) return cudaErrorInvalidValue;

  cudaError_t error = cudaFuncSetAttribute(ForwardKernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  if (Config::kExtras && params.bias.distances != nullptr) {
    error = LaunchBiasLines(params.bias, shape, lines, stream);
    if (error != cudaSuccess) return error;
    plan.bias_lines = {reinterpret_cast<const float2*>(lines), static_cast<int>(BiasLinesOfTable(shape)),
                       static_cast<int>(BiasLineOfZero(shape))};
  }
  plan.past_end = static_cast<int>(std::max<int64_t>(shape.kv_blocks * shape.block_kv, 1));  // 1: maps have a row
  plan.bit_bytes = Config::kTileQ * static_cast<int>(shape.block_kv) / 8;
  plan.bit_words = shape.block_q * shape.block_kv / 32;
  const int64_t q_tiles = (shape.q_len + Config::kTileQ - 1) / Config::kTileQ;
  plan.q_tiles = Divider(q_tiles);
  plan.heads = Divider(shape.heads);
  plan.group = Divider(shape.heads / shape.kv_heads);
  plan.tiles = static_cast<int>(q_tiles * shape.heads * shape.batch);
  unsigned grid = static_cast<unsigned>(plan.tiles);
  if (Config::kFeeder) {
    // Persistent, too, but each CTA has the same number of tiles: what a counter balances is less than what clearing
    // it before the launch costs short rows.
    if (grid > static_cast<unsigned>(Config::kCtas * multiprocessors)) {
      grid = static_cast<unsigned>(Config::kCtas * multiprocessors);
      // Otherwise a CTA's tiles would be the same few of every head: under a causal mask all long, or all short.
      while (std::gcd(static_cast<int64_t>(grid), q_tiles) > 1) --grid;
    }
  }
  if (Config::kConsumers == 2 && plan.tiles > multiprocessors) {
    // Persistent CTAs that take the next tile when they are done: +5 % to +22 % over one tile a CTA for random lists.
    grid = static_cast<unsigned>(multiprocessors);
    plan.tile_counter = workspace;
    error = cudaMemsetAsync(workspace, 0, sizeof(*workspace), stream);
    if (error != cudaSuccess) return error;
  }
  ForwardKernel<Config><<<grid, Config::kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda::sm90
