// Clusters: CTAs that run side by side and reach into each other's shared memory (sm_90).
#pragma once

#include <cstdint>

#include "device/ptx/barrier.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::device::sm90 {

__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all CTAs of the cluster.
__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The address, in another CTA of the cluster, of what lies at this place of its shared memory.
__device__ __forceinline__ uint32_t ClusterAddress(const void* pointer, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(pointer)), "r"(rank));
  return address;
}
// Says that what this thread read of its own shared memory may be overwritten by another CTA's copies: of the order of
// what it wrote there nothing is said (a release at cluster scope is a fence: 470 instead of 600 TFLOP/s).
__device__ __forceinline__ void ArriveAt(Barrier& barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(ClusterAddress(&barrier, rank)) : "memory");
}
// A word into another CTA's shared memory, and an arrival at a barrier there that says so, for WaitForWord. (st.async,
// which does both, was seen to complete its barrier before the word could be read.)
__device__ __forceinline__ void SendWord(int& word, Barrier& barrier, int rank, int value) {
  asm volatile(
      "st.shared::cluster.s32 [%0], %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%2];" ::"r"(ClusterAddress(&word, rank)),
      "r"(value), "r"(ClusterAddress(&barrier, rank))
      : "memory");
}
// Waits for such a word.
__device__ __forceinline__ int WaitForWord(const int& word, Barrier& barrier, uint32_t parity) {
  int value;
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "@p bra done%=;\n"
      "bra wait%=;\n"
      "done%=: ld.volatile.shared.s32 %0, [%3];\n}"
      : "=r"(value)
      : "r"(SharedAddress(&barrier)), "r"(parity), "r"(SharedAddress(&word))
      : "memory");
  return value;
}

// Loads from such an address; a SyncCluster stands between them and what was written there.
__device__ __forceinline__ int LoadFromCluster(uint32_t address) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float4 LoadFourFromCluster(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

}  // namespace jax_bsk::device::sm90
