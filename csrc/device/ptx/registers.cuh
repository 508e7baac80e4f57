// Registers of Hopper's warpgroups: how many a thread has, and where values stay.
#pragma once

#include <cstdint>

namespace jax_bsk::device::sm90 {

// The number of registers of a warpgroup's threads.
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Pins values to registers at this point: arithmetic on them is not moved across it.
template <int kCount>
__device__ __forceinline__ void Pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void Pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

}  // namespace jax_bsk::device::sm90
