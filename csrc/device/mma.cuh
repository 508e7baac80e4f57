// The two matrix products of attention, on register accumulators in the layout of mma.sync: a warp owns 16 * kM rows;
// with g = lane / 4 and t = lane % 4, acc[m][n] holds (row 16m + g, columns 8n + 2t, 8n + 2t + 1) and the same for row
// 16m + g + 8. 16-bit elements go through the tensor cores; float32 has the same layout by plain fused multiply-adds,
// because tf32 would lose 13 bits that a user of float32 expects.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/ptx/convert.cuh"
#include "device/ptx/matrix.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"

namespace jax_bsk::device {

template <int kM, int kN8>
__device__ __forceinline__ void Clear(float (&acc)[kM][kN8][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
}

// acc += A B^T over the rows' whole length: A is rows a_row .. of one tile (a_row % 16 == 0), B is another tile's rows.
template <int kM, int kN8, typename TileA, typename TileB>
__device__ __forceinline__ void MultiplyRows(float (&acc)[kM][kN8][4], const TileA& a, int a_row, const TileB& b) {
  using Element = typename TileA::Element;
  static_assert(TileA::kDim == TileB::kDim && TileB::kRows == kN8 * 8);
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<Element, float>) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int chunk = 0; chunk < TileA::kChunks; ++chunk) {
      float4 left[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          left[m][half] = *reinterpret_cast<const float4*>(a.Chunk(a_row + 16 * m + 8 * half + g, chunk));
#pragma unroll
      for (int n = 0; n < kN8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 right = *reinterpret_cast<const float4*>(b.Chunk(8 * n + 2 * t + e, chunk));
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              // Four products are summed apart: one chain over the whole length rounds up to twice as much, beyond the
              // tolerance of float32 in 2 of 984 random cases.
              float part = left[m][half].x * right.x;
              part = fmaf(left[m][half].y, right.y, part);
              part = fmaf(left[m][half].z, right.z, part);
              part = fmaf(left[m][half].w, right.w, part);
              acc[m][n][2 * half + e] += part;
            }
        }
    }
  } else {
    // A's four matrices: rows 0-7 and 8-15 of the first eight columns, then of the next eight. B's (columns of the
    // product are rows here): columns 0-7 and 8-15 of the first eight rows, then of the next eight.
    const typename TileA::Lane a_lane(a, a_row + lane % 16, lane / 16);
    const typename TileB::Lane b_lane(b, lane % 8 + lane / 16 * 8, lane / 8 % 2);
    // Unrolled whole, the loads of 256 columns move so far ahead of their use that the compiler spills.
    constexpr int kUnroll = TileA::kDim > 128 ? 4 : TileA::kDim / 16;
#pragma unroll kUnroll
    for (int k = 0; k < TileA::kDim / 16; ++k) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) LoadMatrices(left[m], a_lane.At(16 * m, 2 * k));
#pragma unroll
      for (int n = 0; n < kN8; n += 2) {
        uint32_t right[4];
        LoadMatrices(right, b_lane.At(8 * n, 2 * k));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          MultiplyAccumulate<Element>(acc[m][n], left[m], right[0], right[1]);
          MultiplyAccumulate<Element>(acc[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
}

// acc += A B: A is an accumulator, rounded to the element type; B's rows are the columns of A.
template <int kM, int kK8, int kN8, typename TileB>
__device__ __forceinline__ void MultiplyColumns(float (&acc)[kM][kN8][4], const float (&a)[kM][kK8][4],
                                                const TileB& b) {
  using Element = typename TileB::Element;
  static_assert(TileB::kDim == kN8 * 8 && TileB::kRows == kK8 * 8);
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<Element, float>) {
    const int t = lane % 4;
#pragma unroll
    for (int k = 0; k < kK8; ++k)
#pragma unroll 1
      for (int owner = 0; owner < 4; ++owner)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // The lane of this quad that holds columns 8k + 2 owner, + 1 of A hands them round.
          float left[kM][2];
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              left[m][half] = __shfl_sync(0xFFFFFFFFu, a[m][k][2 * half + e], owner, 4);
          const int row = 8 * k + 2 * owner + e;
#pragma unroll
          for (int n = 0; n < kN8; ++n) {
            const float2 right = *reinterpret_cast<const float2*>(b.Chunk(row, 2 * n + t / 2) + t % 2 * 8);
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                acc[m][n][2 * half] = fmaf(left[m][half], right.x, acc[m][n][2 * half]);
                acc[m][n][2 * half + 1] = fmaf(left[m][half], right.y, acc[m][n][2 * half + 1]);
              }
          }
        }
  } else {
    // The accumulator layout of two neighbouring column tiles is the left operand's layout for 16 columns.
    const typename TileB::Lane b_lane(b, lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kK8 / 2; ++k) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = a[m][2 * k + i / 2];
          left[m][i] = PackPair<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
#pragma unroll
      for (int n = 0; n < kN8; n += 2) {
        uint32_t right[4];
        LoadMatricesTransposed(right, b_lane.At(16 * k, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          MultiplyAccumulate<Element>(acc[m][n], left[m], right[0], right[1]);
          MultiplyAccumulate<Element>(acc[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
}

}  // namespace jax_bsk::device
