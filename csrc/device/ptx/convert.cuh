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

// Two elements of a cache of one byte each, the low half of `pair`, as a word of 16-bit elements: exactly.
template <typename Element, typename Cache>
__device__ __forceinline__ uint32_t Widen(uint32_t pair) {
  uint32_t halves;
  if constexpr (std::is_same_v<Cache, Int8>) {
    // With the sign flipped a byte u is x + 128, and 0x64uu is 1024 + u.
    uint32_t biased;
    asm("prmt.b32 %0, %1, %2, 0x4140;" : "=r"(biased) : "r"(pair ^ 0x80808080u), "r"(0x64646464u));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(biased), "r"(0x64806480u));
  } else {
    static_assert(std::is_same_v<Cache, Float8E4M3>);
#if __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}"
        : "=r"(halves)
        : "r"(pair));
#else
    halves = 0;  // not launched there
#endif
  }
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const auto low = static_cast<uint16_t>(halves), high = static_cast<uint16_t>(halves >> 16);
    return PackPair<BFloat16>(ToFloat(Float16{low}), ToFloat(Float16{high}));
  } else {
    return halves;
  }
}

}  // namespace jax_bsk::device
