// Element types of the arrays and their conversion, one vector at a time, to and from the compute type: float16 and
// bfloat16 are computed in float32, float32 and float64 in themselves; results of float64 may be float32.
#pragma once

#include "vector.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

typedef uint16_t HalfWords __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES / 2)));

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// How elements E load into vectors of C, and how vectors round (to nearest even) into E.
template <class C, class E>
struct Elements;

template <class C>
struct Elements<C, C> {
  static JAX_BSK_INLINE Vec<C> Load(const C* from) { return JAX_BSK_CPU_ISA::Load<C>(from); }
  static JAX_BSK_INLINE void Store(C* to, Vec<C> v) { JAX_BSK_CPU_ISA::Store<C>(to, v); }
};

template <>
struct Elements<float, BF16> {
  static JAX_BSK_INLINE Vec<float> Load(const BF16* from) {
    HalfWords half;
    __builtin_memcpy(&half, from, sizeof(half));
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, UintVec<float>) << 16);
  }
  static JAX_BSK_INLINE void Store(BF16* to, Vec<float> v) {
    const UintVec<float> bits = reinterpret_cast<UintVec<float>>(v);
    const UintVec<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UintVec<float> nan = (bits >> 16) | 0x40u;  // rounding up could turn a NaN's bits into infinity
    const HalfWords half = __builtin_convertvector(v != v ? nan : rounded, HalfWords);
    __builtin_memcpy(to, &half, sizeof(half));
  }
};

template <>
struct Elements<float, F16> {
  static JAX_BSK_INLINE Vec<float> Load(const F16* from) {
#if JAX_BSK_CPU_VECTOR_BYTES == 64
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif JAX_BSK_CPU_VECTOR_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    HalfWords half;
    __builtin_memcpy(&half, from, sizeof(half));
    const UintVec<float> bits = __builtin_convertvector(half, UintVec<float>);
    const UintVec<float> sign = (bits & 0x8000u) << 16;
    const UintVec<float> exponent = bits & 0x7c00u;
    const UintVec<float> normal = ((bits & 0x7fffu) << 13) + (112u << 23);  // 112: the biases' difference
    // Subnormals by integer conversion: XLA may run the CPU with subnormal float32 taken for zero.
    const IntVec<float> mantissa = reinterpret_cast<IntVec<float>>(bits & 0x3ffu);
    const Vec<float> small = __builtin_convertvector(mantissa, Vec<float>) * 0x1p-24f;
    const UintVec<float> special = normal + (112u << 23);
    const UintVec<float> size =
        exponent == 0u ? reinterpret_cast<UintVec<float>>(small) : (exponent == 0x7c00u ? special : normal);
    return reinterpret_cast<Vec<float>>(size | sign);
#endif
  }
  static JAX_BSK_INLINE void Store(F16* to, Vec<float> v) {
#if JAX_BSK_CPU_VECTOR_BYTES == 64
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
#elif JAX_BSK_CPU_VECTOR_BYTES == 32
    const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
#else
    const UintVec<float> bits = reinterpret_cast<UintVec<float>>(v);
    const UintVec<float> sign = (bits >> 16) & 0x8000u;
    const UintVec<float> size = bits & 0x7fffffffu;
    const UintVec<float> normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Below 2^-14 the result is a multiple of 2^-24: adding 1/2 leaves it, rounded, in the low bits.
    const UintVec<float> small =
        reinterpret_cast<UintVec<float>>(reinterpret_cast<Vec<float>>(size) + 0.5f) - 0x3f000000u;
    UintVec<float> result = size < (113u << 23) ? small : normal;
    result = size >= 0x477ff000u ? UintVec<float>{} + 0x7c00u : result;  // 65520 and more round to infinity
    result = size > 0x7f800000u ? UintVec<float>{} + 0x7e00u : result;
    const HalfWords half = __builtin_convertvector(result | sign, HalfWords);
    __builtin_memcpy(to, &half, sizeof(half));
#endif
  }
};

template <>
struct Elements<double, float> {
  typedef float Narrow __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES / 2)));

  static JAX_BSK_INLINE void Store(float* to, Vec<double> v) {
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
  }
};

// The first `count` < lanes elements, zero in the rest.
template <class C, class E>
JAX_BSK_NO_INLINE Vec<C> LoadPart(const E* from, int64_t count) {
  E buffer[kLanes<C>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return Elements<C, E>::Load(buffer);
}

template <class C, class E>
JAX_BSK_NO_INLINE void StorePart(E* to, Vec<C> v, int64_t count) {
  E buffer[kLanes<C>];
  Elements<C, E>::Store(buffer, v);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

template <class C, class E>
JAX_BSK_INLINE Vec<C> LoadUpTo(const E* from, int64_t count) {
  return count >= kLanes<C> ? Elements<C, E>::Load(from) : LoadPart<C, E>(from, count);
}

template <class C, class E>
JAX_BSK_INLINE void StoreUpTo(E* to, Vec<C> v, int64_t count) {
  if (count >= kLanes<C>) {
    Elements<C, E>::Store(to, v);
  } else {
    StorePart<C, E>(to, v, count);
  }
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
