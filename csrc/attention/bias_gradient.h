// The gradient of one term of the bias on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/launch.h"
#include "attention/params.h"
#include "device/host.h"

namespace jax_bsk::attention::cuda {

// How the work is divided. A CTA owns a part of the result, its slot, and adds up all that belongs there in a fixed
// order, so that no two write one element and results are bit-equal from run to run.
struct BiasGradientPlan {
  // What a slot keeps of the sum of its 64 x 64 pairs: all of them, the sums over their keys, over their queries, over
  // both, or along the diagonals.
  enum class Keep { kPairs, kQueries, kKeys, kNothing, kDiagonals };
  Keep keep;
  int tables_batch, tables_heads;  // of the result
  int64_t slots;                   // of each of its tables
  // Of the tiles alone. Where they are broadcast inside a block, a slot has `range` neighbouring tiles of `length`
  // numbers each.
  int range = 1, length = 0;

  explicit BiasGradientPlan(const BiasGradientParams& params);
  int64_t ctas() const { return slots * tables_batch * tables_heads; }
};

// Bytes of dbias.
int64_t BiasGradientBytes(const BiasGradientParams& params);

// Writes all of dbias, on the current device, which is the one of `facts`. The kernel is a matter of speed alone:
// Hopper's is sm90/bias_gradient.cuh, and the portable one takes every problem that is not refused.
cudaError_t LaunchBiasGradientKernel(const BiasGradientParams& params, const device::DeviceFacts& facts,
                                     cudaStream_t stream, BiasGradientKernel kernel);

}  // namespace jax_bsk::attention::cuda
