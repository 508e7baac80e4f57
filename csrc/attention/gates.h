// Gradients of gates: the kernels of dK and dV leave the sums of P o dP over 64 x 64 pairs, which are put together
// here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/params.h"

namespace jax_bsk::attention::cuda {

// Words of the sums, [batch, heads, cols.capacity, block_kv / 64, block_q / 64, 4 warps]; 0 without gates. Each is
// written by one CTA and none is added to, so that gradients are bit-equal from run to run, and what a first kernel
// wrote another may correct.
inline int64_t GateSumCount(const BackwardParams& params) {
  const Shape& shape = params.shape;
  if (params.dgates == nullptr) return 0;
  return shape.batch * shape.heads * params.cols.capacity * (shape.block_kv / 64) * (shape.block_q / 64) * 4;
}

// Before the kernels: zeros, for blocks that no kernel visits. After them: dgates.
cudaError_t ClearGateSums(const BackwardParams& params, float* sums, cudaStream_t stream);
cudaError_t LaunchSumGates(const BackwardParams& params, const float* sums, cudaStream_t stream);

// Whether this build holds code for the current device. (Its kernel here tells, which is compiled for every target.)
bool HoldsCodeForDevice();

}  // namespace jax_bsk::attention::cuda
