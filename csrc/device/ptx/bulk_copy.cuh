// Bulk copies: what the copy engine moves between global and shared memory (TMA, sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/ptx/barrier.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::device::sm90 {

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box of a tensor of rank 4, first element at (c0, c1, c2, c3), innermost first; elements outside become zero.
__device__ __forceinline__ void LoadBox(void* shared, const CUtensorMap& map, Barrier& barrier, int c0, int c1, int c2,
                                        int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(SharedAddress(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same box to the same place of every CTA of the cluster in `mask`; each one's own barrier counts its bytes.
__device__ __forceinline__ void LoadBoxMulticast(void* shared, const CUtensorMap& map, Barrier& barrier, uint16_t mask,
                                                 int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(SharedAddress(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask)
      : "memory");
}
// A box from shared to global memory, as part of this thread's current group of stores; what lies outside the tensor is
// not written.
__device__ __forceinline__ void StoreBox(const CUtensorMap& map, const void* shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(SharedAddress(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
// Contiguous bytes; addresses and count are multiples of 16.
__device__ __forceinline__ void LoadBytes(void* shared, const void* global, Barrier& barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(shared)),
               "l"(global), "r"(bytes), "r"(SharedAddress(&barrier))
               : "memory");
}
// From shared to global memory, as part of this thread's current group of stores; addresses and count are multiples of
// 16. What was written with ordinary stores needs FenceAsyncProxy before.
__device__ __forceinline__ void StoreBytes(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(SharedAddress(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory of all this thread's groups of stores but the last kPending has been read and may be written
// again.
template <int kPending>
__device__ __forceinline__ void WaitForStoresRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all this thread's stores are in global memory.
__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace jax_bsk::device::sm90
