// Instructions of one thread: addresses, arithmetic, and which thread or lane it is.
#pragma once

#include <cstdint>

namespace jax_bsk::device {

// A pointer into shared memory as the 32-bit address that the instructions below take.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read at this place: what is derived from it is not hoisted out of a loop, where it would hold registers.
__device__ __forceinline__ int ThreadHere() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Asks for the cache line of an address in global memory, to be read soon.
__device__ __forceinline__ void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Adds 1 to the count if x is at least `least`: a comparison and an addition under its predicate, where nvcc makes
// three instructions of `count += x >= least`.
__device__ __forceinline__ void CountAtLeast(int& count, uint32_t x, uint32_t least) {
  asm("{\n.reg .pred p;\nsetp.ge.u32 p, %1, %2;\n@p add.s32 %0, %0, 1;\n}" : "+r"(count) : "r"(x), "r"(least));
}

// 2^x by the special function unit: relative error 2^-22; 2^-inf = 0, NaN stays NaN.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

namespace sm90 {

// True for one lane of a converged warp, always the same one. Takes no register between uses, as a stored lane would.
__device__ __forceinline__ bool ElectLane() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

}  // namespace sm90
}  // namespace jax_bsk::device
