// For small functions that host code, compiled by any compiler, and kernels share.
#pragma once

#if defined(__CUDACC__)
#define JAX_BSK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_BSK_HOST_DEVICE inline __attribute__((always_inline))
#endif
