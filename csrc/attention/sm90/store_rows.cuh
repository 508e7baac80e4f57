// Accumulators of a warpgroup product to rows of a result.
#pragma once

#include "device/ptx.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// 64 accumulated rows, scaled, to `rows` + row * stride; rows from `valid` on become 0, rows from `stored` on and
// columns from `dim` on (a multiple of 8) are not written. Returns whether this thread's part of the valid rows is
// finite. Each row's four lanes swap words so that they store 32 contiguous bytes, four columns a lane.
template <typename Element, int kDim>
__device__ __forceinline__ bool StoreRows(const float (&sums)[kDim / 2], float scale, int valid, int stored,
                                          Element* rows, int stride, int dim, int thread) {
  const int lane = thread % 4, column = lane % 2 * 8 + lane / 2 * 4;
  float probe = 0.f;  // NaN if anything is not finite
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    const bool keep = row < valid;
    Element* target = rows + int64_t{row} * stride + column;
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = sums + 4 * (n + i) + 2 * half;
        const float low = keep ? pair[0] * scale : 0.f, high = keep ? pair[1] * scale : 0.f;
        probe += 0.f * low + 0.f * high;
        words[i] = device::PackPair<Element>(low, high);
      }
      const bool odd = lane % 2;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[0] : words[1], 1);
      if (row < stored && n * 8 + column < dim) {
        *reinterpret_cast<uint2*>(target + n * 8) =
            odd ? make_uint2(received, words[1]) : make_uint2(words[0], received);
      }
    }
  }
  return probe == 0.f;
}

}  // namespace jax_bsk::attention::cuda::sm90
