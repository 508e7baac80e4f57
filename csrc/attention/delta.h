// The row sums that the backward is given, delta = rowsum(dO o O) - dlse, on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"

namespace jax_bsk::attention::cuda {

// For params that are not refused, of any head size and alignment. Nothing is launched where there are no rows.
cudaError_t LaunchDeltaKernel(const DeltaParams& params, cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda
