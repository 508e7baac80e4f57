// Matrices of 16-bit elements between shared memory and the registers of a warp, and the product of such (mma.sync).
// Storing needs sm_90.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/element.h"

namespace jax_bsk::device {

// ldmatrix: four 8x8 matrices of 16-bit elements. Lanes 8m .. 8m+7 give the addresses of the rows of matrix m; lane l
// receives elements 2(l%4), 2(l%4)+1 of row l/4 of matrix m in word m.
__device__ __forceinline__ void LoadMatrices(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// As LoadMatrices, each matrix transposed: lane l receives rows 2(l%4), 2(l%4)+1 of column l/4.
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// mma.sync m16n8k16 with float32 accumulation. With g = lane / 4 and t = lane % 4 a lane holds
//   a0..a3: (row g, k 2t..), (row g+8, k 2t..), (row g, k 2t+8..), (row g+8, k 2t+8..)   pairs along k
//   b0, b1: (k 2t.., column g), (k 2t+8.., column g)                                     pairs along k
//   c0..c3: (row g, column 2t), (row g, 2t+1), (row g+8, 2t), (row g+8, 2t+1)
template <typename Element>
__device__ __forceinline__ void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Element, Float16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

namespace sm90 {

// stmatrix: four 8x8 matrices of 16-bit elements, the opposite of LoadMatrices.
__device__ __forceinline__ void StoreMatrices(uint32_t shared, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t shared, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace sm90
}  // namespace jax_bsk::device
