// Barriers of Hopper: mbarriers, by which warps and the copy engine wait for each other, and named barriers.
#pragma once

#include <cstdint>
#include <cstdio>

#include "device/ptx/thread.cuh"

namespace jax_bsk::device::sm90 {

// An mbarrier in shared memory. It completes a phase when its count of arrivals and its announced bytes are in;
// phases alternate in parity, and a fresh barrier counts as having completed one of parity 1.
using Barrier = uint64_t;

__device__ __forceinline__ void InitBarrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void Arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(&barrier)) : "memory");
}
// Lets the phase wait for `bytes` of bulk copies more, without arriving.
__device__ __forceinline__ void Expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(bytes)
               : "memory");
}
// Arrives, and lets the phase wait for `bytes` of bulk copies as well.
__device__ __forceinline__ void ArriveExpecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. Built with JAX_BSK_DEBUG_BARRIERS, a wait of about a second names
// itself and stops the kernel: it finds a deadlock in minutes.
__device__ __forceinline__ void Wait(Barrier& barrier, uint32_t parity) {
#ifdef JAX_BSK_DEBUG_BARRIERS
  const long long start = clock64();
  while (true) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(SharedAddress(&barrier)), "r"(parity)
                 : "memory");
    if (done) return;
    if (clock64() - start > 2000000000ll) {
      if (threadIdx.x % 32 == 0) {
        printf("stuck: cta %d thread %d, barrier at shared %u, parity %u\n", blockIdx.x, threadIdx.x,
               SharedAddress(&barrier) & 0xFFFFFFu, parity);
      }
      __nanosleep(100000000);
      asm volatile("trap;");
    }
  }
#else
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done%=;\n"
      "bra wait%=;\n"
      "done%=:\n}" ::"r"(SharedAddress(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Named barriers 1..15 among `threads` threads, for groups smaller than the CTA.
__device__ __forceinline__ void SyncNamed(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void ArriveNamed(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jax_bsk::device::sm90
