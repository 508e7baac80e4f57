// Order of memory accesses: against the copy engine and wgmma, and between CTAs (sm_90).
#pragma once

#include <cstdint>

namespace jax_bsk::device::sm90 {

// Orders this thread's ordinary accesses to shared memory before what the copy engine and wgmma do with it later: its
// writes, which they read, and loads whose values nothing has waited for, when the copy engine writes there next.
__device__ __forceinline__ void FenceAsyncProxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders ordinary and asynchronous accesses to global memory as well.
__device__ __forceinline__ void FenceAsyncProxyGlobal() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Words of global memory that CTAs signal with.
__device__ __forceinline__ int LoadAcquire(const int32_t* word) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void AddRelease(int32_t* word, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

}  // namespace jax_bsk::device::sm90
