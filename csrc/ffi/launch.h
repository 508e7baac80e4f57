// Parts that the CUDA handlers share: how their calls are bound, and what they say when a launch fails.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "ffi/buffers.h"
#include "ffi/checks.h"

namespace jax_bsk {

// Binds the context arguments: stream and device.
inline auto BindCudaContext() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>();
}

// Binds a call with a workspace, which comes behind the other results.
template <typename Buffers, typename Attributes>
auto BindCudaCall() {
  return BindCall<Buffers, Attributes>(BindCudaContext()).template Ret<Operand>();
}

inline ffi::Error LaunchResult(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal("jax_bsk: " + std::string(name) + " did not launch: " + cudaGetErrorString(error));
}

}  // namespace jax_bsk
