// Numbers that kernels share: constants, what is not finite, bits of columns, and sums over lanes.
#pragma once

#include <cstdint>

namespace jax_bsk::device {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2ERest = 1.9259629911e-8f;  // log2(e) less kLog2E
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLn2Rest = -1.9046542999e-9f;  // ln(2) less kLn2
__device__ __forceinline__ float Infinity() { return __int_as_float(0x7F800000); }
__device__ __forceinline__ float QuietNan() { return __int_as_float(0x7FFFFFFF); }

// Bits of the columns below `count` of a 64-column tile.
__device__ __forceinline__ uint64_t FirstBits(int count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(count, 0)) - 1;
}

// Largest, sum over the four lanes that share a row.
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// Largest, sum over the lanes of a warp.
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lanes));
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
  return x;
}

}  // namespace jax_bsk::device
