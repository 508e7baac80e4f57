// Copies of single vectors from global to shared memory (sm_80 and newer).
#pragma once

#include <cstdint>

namespace jax_bsk::device {

// cp.async: copies 16 bytes from global to shared memory without passing registers; writes zeros and reads nothing when
// `valid` is false. Both addresses are 16-byte aligned.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void CopyAsync4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

// Ends a group of this thread's copies: those started since the last one.
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are on their way; a barrier must follow, as below.
template <int kGroups>
__device__ __forceinline__ void WaitForGroups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Waits for all of this thread's copies; a barrier must follow before other threads read what was copied.
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace jax_bsk::device
