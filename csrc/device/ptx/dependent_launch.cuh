// A kernel that is launched with cudaLaunchAttributeProgrammaticStreamSerialization may start before the one in front
// of it has ended (sm_90; nothing elsewhere).
#pragma once

namespace jax_bsk::device {

// Says that the kernel behind this one may start as soon as all CTAs have said so or ended.
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel in front has ended and its results can be read.
__device__ __forceinline__ void WaitForKernelBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jax_bsk::device
