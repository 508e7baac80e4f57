// Host interface of the CUDA decoding kernels, free of XLA: what they can take, and how to launch them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "decode/cuda_limits.h"
#include "decode/params.h"
#include "decode/partials.h"

namespace jax_bsk::decode::cuda {

// Why the kernels cannot take this problem on this device, in one sentence; empty when they can.
std::string ForwardRefusal(const ForwardParams& params, int device);

// Launches on a stream of `device`, for params that are not refused. Nothing is allocated and nothing waits; launches
// and grids depend on shapes only, so calls can be captured in CUDA graphs. `workspace` is PartialLayout's bytes of
// device memory, aligned to 128, written before they are read.
cudaError_t LaunchForward(const ForwardParams& params, void* workspace, int device, cudaStream_t stream);

}  // namespace jax_bsk::decode::cuda
