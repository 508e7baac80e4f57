// Finds the lines of a bias by distance (sm90/bias_lines.h) before the Hopper kernels run.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"

namespace jax_bsk::attention::cuda {

// Writes the lines of all tables, sm90::BiasLineWords words.
cudaError_t LaunchBiasLines(const Bias& bias, const Shape& shape, float* lines, cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda
