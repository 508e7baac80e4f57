// What CUDA handlers say when a launch is refused or fails.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "ffi/checks.h"

namespace jax_bsk {

inline ffi::Error LaunchResult(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal("jax_bsk: " + std::string(name) + " did not launch: " + cudaGetErrorString(error));
}

}  // namespace jax_bsk
