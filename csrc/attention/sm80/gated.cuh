// Whether a kernel has gates: compiled in, compiled out, or a branch at run time (config.h says which, and why).
#pragma once

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
__device__ __forceinline__ bool HasGates(const void* gates) {
  return Config::kAlwaysGated || (Config::kMayBeGated && gates != nullptr);
}

}  // namespace jax_bsk::attention::cuda::sm80
