// The gradient of one term of the bias on Hopper (sm_90a): S = Q K^T and dP = dO V^T once more, for 128 x 128 pairs at
// a time. Copy engine, mbarrier pipelines, warpgroup products; three producer warps and two consumer warpgroups.
//
// What a tile of pairs reads is what it costs: 128 KB at 128 dimensions, at 24 bytes per clock and multiprocessor from
// L2. So consecutive tiles share what they can: of two neighbouring diagonals the tiles go to the right and down by
// turns, each with the queries or the keys of the one before, and the tiles of a dense bias go along their row.
#pragma once

#include "attention/sm90/bias_gradient_consumer.cuh"
#include "attention/sm90/bias_gradient_producer.cuh"
#include "attention/sm90/tensor_map.h"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/registers.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    BiasGradientKernel(const __grid_constant__ BiasGradientParams params, const __grid_constant__ PairPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<BiasGradientShared<Config>*>(shared_bytes);
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
      PairSearch<Config>(shared, params, plan).Run();
    } else if (warp == 1) {
      PairLoader<Config>(shared, params, plan).Run();
    } else if (warp == 2) {
      ReadPairStatistics<Config>(shared, params);
    }
  } else {
    device::sm90::RaiseRegisters<Config::kConsumerRegisters>();
    PairConsumer<Config>(shared, params, plan, warpgroup).Run();
  }
}

template <typename Config>
cudaError_t LaunchPairs(const BiasGradientParams& params, const BiasGradientGroups& groups, int grid,
                        cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(BiasGradientShared<Config>));
  static_assert(kBytes <= 227 * 1024);
  const Shape& shape = params.shape;
  PairPlan plan{};
  const auto map = [&](const void* data, int64_t length, int64_t heads, int64_t dim, CUtensorMap* to) {
    return MakeTensorMap(params.dtype, data, shape.batch, length, heads, dim, kPairTile, to);
  };
  if (!map(params.query, shape.q_len, shape.heads, shape.head_dim, &plan.query) ||
      !map(params.dout, shape.q_len, shape.heads, shape.value_dim, &plan.dout) ||
      !map(params.key, shape.kv_len, shape.kv_heads, shape.head_dim, &plan.key) ||
      !map(params.value, shape.kv_len, shape.kv_heads, shape.value_dim, &plan.value)) {
    return cudaErrorInvalidValue;
  }
  const LogitMap logits(params.scale, params.soft_cap);
  plan.groups = groups;
  plan.multiplier = logits.multiplier;
  plan.bias_factor = device::kLog2E / logits.multiplier;
  plan.kept_scale = Drops(params.dropout) ? DropoutScale(params.dropout.threshold) : 1.f;
  const cudaError_t error =
      cudaFuncSetAttribute(BiasGradientKernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  BiasGradientKernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda::sm90
