// Host interface of the CUDA block-sparse products, free of XLA: what they can take, and how to launch them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "matmul/cuda_limits.h"
#include "matmul/params.h"
#include "matmul/workspace.h"

namespace jax_bsk::matmul::cuda {

// Why the kernels cannot take this problem on this device, in one sentence; empty when they can.
std::string ProductRefusal(const ProductParams& params, int device);
std::string SampledRefusal(const SampledParams& params, int device);

// Launch on a stream of `device`, for params that are not refused. Nothing is allocated and nothing waits; launches and
// grids depend on shapes only, so calls can be captured in CUDA graphs. Problems without elements launch nothing.
// `workspace` is ProductWorkspace(params) or SampledWorkspace(params) words of device memory for the launch to use,
// written before they are read.
cudaError_t LaunchProduct(const ProductParams& params, int32_t* workspace, int device, cudaStream_t stream);
// The same by either kernel, for checks and timings that compare them: LaunchProduct takes the narrow one where
// IsNarrow(params), by the width alone. The narrow one takes any width, 64 columns at a time, and no workspace.
bool IsNarrow(const ProductParams& params);
cudaError_t LaunchNarrow(const ProductParams& params, int device, cudaStream_t stream);
cudaError_t LaunchWide(const ProductParams& params, int32_t* workspace, int device, cudaStream_t stream);
cudaError_t LaunchSampled(const SampledParams& params, int32_t* workspace, int device, cudaStream_t stream);

}  // namespace jax_bsk::matmul::cuda
