// Host interface of the CUDA attention kernels, free of XLA: what they can take, and how to launch them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "attention/cuda_limits.h"
#include "attention/params.h"
#include "attention/workspace.h"

namespace jax_bsk::attention::cuda {

// Which forward kernel. The choice is a matter of speed alone: each takes every problem that is not refused, kRows128
// only blocks of 128 queries, the Hopper kernels only 16-bit types on compute capability 9.0. Checks name them. Where
// the named kernel has no variant for a call's head size, gates, soft cap, biases and dropout, the portable one runs.
// kFewQueries is what few_queries.h says, and kPortable for other problems.
enum class ForwardKernel { kAutomatic, kPortable, kRows64, kRows64Feeder, kRows128, kFewQueries };

// Which backward kernels, likewise: kKeys64 and kKeys128 are Hopper's with tiles of as many keys; kKeys128 takes
// key/value blocks of 128 and head sizes up to 128 only.
enum class BackwardKernel { kAutomatic, kPortable, kKeys64, kKeys128 };

// Which kernel for the gradient of a bias, likewise.
enum class BiasGradientKernel { kAutomatic, kPortable };

// Why the kernels cannot take this problem on this device, in one sentence; empty when they can.
std::string ForwardRefusal(const ForwardParams& params, int device);
std::string DeltaRefusal(const DeltaParams& params, int device);
std::string BackwardRefusal(const BackwardParams& params, int device);
std::string BiasGradientRefusal(const BiasGradientParams& params, int device);

// Launch on a stream of `device`, for params that are not refused. Nothing is allocated and nothing waits; launches and
// grids depend on shapes only, so calls can be captured in CUDA graphs. Problems without elements launch nothing; those
// with results but nothing to attend to get zeros (-inf in lse) from the kernels. `workspace` is
// ForwardWorkspace's words of device memory for the launch to use, written before they are read.
cudaError_t LaunchForward(const ForwardParams& params, int32_t* workspace, int device, cudaStream_t stream,
                          ForwardKernel kernel = ForwardKernel::kAutomatic);

// The same; its workspace is `bytes` of device memory, at least BackwardWorkspace(params) (of which only the shapes
// count), aligned to 16. With more it is faster, until dS of all visited blocks fits.
int64_t BackwardWorkspace(const BackwardParams& params);
cudaError_t LaunchBackward(const BackwardParams& params, void* workspace, int64_t bytes, int device,
                           cudaStream_t stream, BackwardKernel kernel = BackwardKernel::kAutomatic);

// The row sums that the backward is given, which need no workspace.
cudaError_t LaunchDelta(const DeltaParams& params, int device, cudaStream_t stream);

// The gradient of one term of the bias, which needs no workspace.
cudaError_t LaunchBiasGradient(const BiasGradientParams& params, int device, cudaStream_t stream,
                               BiasGradientKernel kernel = BiasGradientKernel::kAutomatic);

}  // namespace jax_bsk::attention::cuda
