// Accumulators of a warpgroup product to rows of a result.
#pragma once

#include "device/ptx/convert.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// The first of a thread's two rows among the 64 of its warpgroup's accumulators; the second is eight further.
__device__ __forceinline__ int RowOf(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// True if this thread's part of one of its rows is finite.
template <int kCount>
__device__ __forceinline__ bool RowIsFinite(const float (&sums)[kCount], int half) {
  float probe = 0.f;  // NaN if anything is not
#pragma unroll
  for (int n = 0; n < kCount / 4; ++n) probe += 0.f * sums[4 * n + 2 * half] + 0.f * sums[4 * n + 2 * half + 1];
  return probe == 0.f;
}

// 64 accumulated rows to `rows` + row * stride, each as `finish` has it; rows from `stored` on and columns from `dim`
// on (a multiple of 8) are not written. A row's four lanes swap words so that they store 32 contiguous bytes, four
// columns a lane.
template <typename Element, int kCount>
__device__ __forceinline__ void StoreRows(const float (&sums)[kCount], const device::RowFinish (&finish)[2], int stored,
                                          Element* rows, int64_t stride, int dim, int thread) {
  const int lane = thread % 4, column = lane % 2 * 8 + lane / 2 * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = RowOf(thread) + 8 * half;
    Element* target = rows + row * stride + column;
#pragma unroll
    for (int n = 0; n < kCount / 4; n += 2) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = sums + 4 * (n + i) + 2 * half;
        words[i] = device::PackPair<Element>(finish[half](pair[0]), finish[half](pair[1]));
      }
      const bool odd = lane % 2;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[0] : words[1], 1);
      if (row < stored && n * 8 + column < dim) {
        *reinterpret_cast<uint2*>(target + n * 8) =
            odd ? make_uint2(received, words[1]) : make_uint2(words[0], received);
      }
    }
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
