// Vectors of JAX_BSK_CPU_VECTOR_BYTES bytes of a compute type C (float or double), by the compilers' vector extension:
// the same source becomes SSE2, NEON, AVX2 or AVX-512.
//
// The headers of csrc/cpu that are inside the namespace JAX_BSK_CPU_ISA, and everything in the cpu folder of an
// operation except its kernels.h, are compiled once per instruction set (isa_*.h) and call no inline function of the
// standard library: the linker merges inline functions of equal names, and would be free to keep the copy built with
// AVX-512 for all.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JAX_BSK_INLINE inline __attribute__((always_inline))
// What is called once a row or once a block: inlined everywhere it doubles the time that a sanitized build takes.
#define JAX_BSK_NO_INLINE __attribute__((noinline))

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  using UnsignedLane = uint32_t;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(JAX_BSK_CPU_VECTOR_BYTES)));
  using UnsignedLane = uint64_t;
};

template <class C>
using Vec = typename Simd<C>::V;  // lanes of C
template <class C>
using IntVec = typename Simd<C>::I;  // as many integers of the same width; also the type of comparisons
template <class C>
using UintVec = typename Simd<C>::U;
template <class C>
using Lane = typename Simd<C>::UnsignedLane;

template <class C>
constexpr int kLanes = JAX_BSK_CPU_VECTOR_BYTES / sizeof(C);

template <class C>
constexpr C kInfinity = static_cast<C>(__builtin_inf());
template <class C>
constexpr C kNaN = static_cast<C>(__builtin_nan(""));

template <class C>
JAX_BSK_INLINE Vec<C> Load(const C* from) {
  Vec<C> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class C>
JAX_BSK_INLINE void Store(C* to, Vec<C> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <class C>
JAX_BSK_INLINE UintVec<C> LoadWords(const Lane<C>* from) {
  UintVec<C> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class C>
JAX_BSK_INLINE Vec<C> Broadcast(C x) {
  return x - Vec<C>{};  // x + 0 would be an addition at run time, for the sake of x = -0; this is a broadcast
}

template <class C>
JAX_BSK_INLINE UintVec<C> BroadcastWord(Lane<C> x) {
  return UintVec<C>{} + x;
}

// a * b + c, rounded once wherever the instruction set can: of a plain expression the compiler decides, and not
// everywhere alike.
template <class C>
JAX_BSK_INLINE Vec<C> MultiplyAdd(Vec<C> a, Vec<C> b, Vec<C> c) {
#if JAX_BSK_CPU_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    return _mm512_fmadd_ps(a, b, c);
  } else {
    return _mm512_fmadd_pd(a, b, c);
  }
#elif JAX_BSK_CPU_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4) {
    return _mm256_fmadd_ps(a, b, c);
  } else {
    return _mm256_fmadd_pd(a, b, c);
  }
#elif defined(__aarch64__)
  Vec<C> result = {};
#pragma GCC unroll 4
  for (int k = 0; k < kLanes<C>; ++k) {
    result[k] = sizeof(C) == 4 ? __builtin_fmaf(a[k], b[k], c[k]) : __builtin_fma(a[k], b[k], c[k]);
  }
  return result;
#else
  return a * b + c;  // SSE2 has no such instruction
#endif
}

// Lanes of `yes` where the mask is all ones, of `no` where it is 0.
template <class C>
JAX_BSK_INLINE Vec<C> Select(IntVec<C> mask, Vec<C> yes, Vec<C> no) {
  return mask ? yes : no;
}

// The second where either is NaN, so Max(new, old) keeps a finite running maximum: a NaN score reaches the sums by
// itself.
template <class C>
JAX_BSK_INLINE Vec<C> Max(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// Interleaves a and b: a0 b0 a1 b1 ..., whose first half is `low`.
template <class C>
JAX_BSK_INLINE void Interleave(Vec<C> a, Vec<C> b, Vec<C>& low, Vec<C>& high) {
  constexpr int n = kLanes<C>;
  if constexpr (n == 2) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (n == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (n == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(n == 16, "one vector of floats holds 4, 8 or 16");
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

template <class C>
JAX_BSK_INLINE Vec<C> Reverse(Vec<C> a) {
  constexpr int n = kLanes<C>;
  if constexpr (n == 2) {
    return __builtin_shufflevector(a, a, 1, 0);
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(a, a, 3, 2, 1, 0);
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, a, 7, 6, 5, 4, 3, 2, 1, 0);
  } else {
    static_assert(n == 16, "one vector of floats holds 4, 8 or 16");
    return __builtin_shufflevector(a, a, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  }
}

// The sum of all lanes: one half is added to the other until one lane is left.
template <class C>
JAX_BSK_INLINE C LaneSum(Vec<C> v) {
  constexpr int n = kLanes<C>;
  if constexpr (n == 16) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  } else if constexpr (n == 8) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  } else if constexpr (n == 4) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  } else {
    static_assert(n == 2, "one vector holds 2, 4, 8 or 16 numbers");
  }
  return v[0] + v[1];
}

// Transposes a square of lanes x lanes in registers: after each of the log2(lanes) rounds of interleaving row i with
// row i + lanes / 2, the position bits of an element have turned by one place.
template <class C>
JAX_BSK_INLINE void TransposeSquare(Vec<C> (&rows)[kLanes<C>]) {
  constexpr int n = kLanes<C>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<C> turned[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) Interleave<C>(rows[i], rows[i + n / 2], turned[2 * i], turned[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = turned[i];
  }
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
