// Conversions between float32 and the 16-bit element types, which have no headers of CUDA's here (device/element.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/element.h"

namespace jax_bsk::device {

// Two numbers, rounded to the nearest elements, as a word.
template <typename Element>
__device__ __forceinline__ uint32_t PackPair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<Element, Float16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

__device__ __forceinline__ float ToFloat(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float ToFloat(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

// Four elements of a cache of one byte each as float16, exactly: bytes 0 and 1, then 2 and 3; or (kAlternate) bytes 0
// and 2, then 1 and 3.
template <typename Cache, bool kAlternate>
__device__ __forceinline__ void Widen(uint32_t bytes, uint32_t (&pairs)[2]) {
  if constexpr (std::is_same_v<Cache, Int8>) {
    // With the sign flipped a byte u is x + 128, and 0x64uu is 1024 + u.
    const uint32_t flipped = bytes ^ 0x80808080u;
    uint32_t first, second;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(first) : "r"(flipped), "r"(0x64646464u), "n"(kAlternate ? 0x4240 : 0x4140));
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(second) : "r"(flipped), "r"(0x64646464u), "n"(kAlternate ? 0x4341 : 0x4342));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(pairs[0]) : "r"(first), "r"(0x64806480u));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(pairs[1]) : "r"(second), "r"(0x64806480u));
  } else {
    static_assert(std::is_same_v<Cache, Float8E4M3>);
    const uint32_t ordered = kAlternate ? __byte_perm(bytes, 0, 0x3120) : bytes;
#if __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "r"(ordered));
#else
    pairs[0] = pairs[1] = ordered;  // not launched there
#endif
  }
}

}  // namespace jax_bsk::device
