// 2^x and tanh on vectors. Largest relative errors measured, in units of half the epsilon: Exp2 1.7 (1.2 with AVX-512),
// Tanh 2.8.
#pragma once

#include "vector.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLog2ERest = 2.0355273740931033e-17;  // log2(e) less kLog2E
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLn2Rest = 2.3190468138462996e-17;  // ln(2) less kLn2

template <class C>
struct ExpConstants;

// `poly` interpolates (2^f - 1) / f at the Chebyshev nodes of [-1/2, 1/2]; relative error 4e-9 and 8e-20.
template <>
struct ExpConstants<float> {
  static constexpr float poly[] = {0.693147188f,    0.2402265076f,   0.05550357114f,
                                   0.009618082557f, 0.001339086336f, 0.0001545316295f};
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float smallest = -126.0f;  // below, 2^x would be subnormal: slow to multiply, and worth nothing here
  static constexpr float largest = 128.0f;
  static constexpr int bias = 127;
  static constexpr int mantissa_bits = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double poly[] = {0.693147180559945309,   0.240226506959100712,    0.055504108664821627,
                                    0.00961812910762847949, 0.00133335581464064707,  0.000154035303933707334,
                                    1.52527338415567726e-5, 1.32154868087055628e-6,  1.01780570877339411e-7,
                                    7.05489730415549928e-9, 4.45581790833606449e-10, 2.57293241773623042e-11};
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double smallest = -1022.0;
  static constexpr double largest = 1024.0;
  static constexpr int bias = 1023;
  static constexpr int mantissa_bits = 52;
};

// 1 + f * poly(f), by Horner.
template <class C>
JAX_BSK_INLINE Vec<C> Exp2Fraction(Vec<C> f) {
  using K = ExpConstants<C>;
  constexpr int n = sizeof(K::poly) / sizeof(C);
  Vec<C> y = Broadcast<C>(K::poly[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) y = y * f + K::poly[i];
  return y * f + C(1);
}

// 2^x. Exactly 0 for -inf and wherever the result would be subnormal, +inf beyond the largest, NaN for NaN.
template <class C>
JAX_BSK_INLINE Vec<C> Exp2(Vec<C> x) {
  using K = ExpConstants<C>;
#if JAX_BSK_CPU_VECTOR_BYTES == 64
  // vscalef multiplies by a power of two of any size, so neither end needs clamping. (The maskz
  // forms compile to the plain instructions; g++ 12 warns of its own header's uninitialised variable in the others.)
  if constexpr (sizeof(C) == 4) {
    const __m512 n = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(K::smallest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(keep, Exp2Fraction<C>(x - n), n);
  } else {
    const __m512d n = _mm512_maskz_roundscale_pd(0xff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask8 keep = _mm512_cmp_pd_mask(x, _mm512_set1_pd(K::smallest), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_pd(keep, Exp2Fraction<C>(x - n), n);
  }
#else
  x = x > K::largest ? Broadcast<C>(K::largest) : x;  // keeps NaN
  const Vec<C> shifted = x + K::round;
  const Vec<C> fraction = Exp2Fraction<C>(x - (shifted - K::round));
  // The low bits of `shifted` are the integer; moved up they become the exponent of 2^n. The product (and not an
  // addition to the exponent bits) keeps NaN a NaN; n = 128 gives infinity.
  const UintVec<C> bits = (reinterpret_cast<UintVec<C> >(shifted) + Lane<C>(K::bias)) << K::mantissa_bits;
  const Vec<C> result = fraction * reinterpret_cast<Vec<C> >(bits);
  return x < K::smallest ? Vec<C>{} : result;
#endif
}

template <class C>
struct TanhConstants;

// Interpolates (tanh(x) / x - 1) / x^2 as a polynomial in x^2 up to x = 0.625; relative error 5e-10 and 2e-21.
template <>
struct TanhConstants<float> {
  static constexpr float poly[] = {-0.3333333317f, 0.1333330356f,    -0.05395925958f,
                                   0.02176891865f, -0.008343945516f, 0.002292744816f};
};

template <>
struct TanhConstants<double> {
  static constexpr double poly[] = {-0.333333333333333333,    0.133333333333333328,      -0.0539682539682530754,
                                    0.0218694885360964705,    -0.00886323552788245834,   0.0035921279948771645,
                                    -0.00145583382790420779,  0.00059002233290232577,    -0.000239096427705947486,
                                    0.0000967668921000281198, -0.0000387990421816612783, 0.0000148328975484175581,
                                    -4.77083464851976678e-6,  9.17154940265454197e-7};
};

// The polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that formula beyond.
template <class C>
JAX_BSK_INLINE Vec<C> Tanh(Vec<C> x) {
  using K = TanhConstants<C>;
  constexpr int n = sizeof(K::poly) / sizeof(C);
  const Vec<C> square = x * x;
  Vec<C> near = Broadcast<C>(K::poly[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) near = near * square + K::poly[i];
  near = near * square * x + x;
  const Vec<C> size = x < C(0) ? -x : x;
  const Vec<C> far = C(1) - C(2) / (Exp2<C>(size * C(2 * kLog2E)) + C(1));
  return size < C(0.625) ? near : (x < C(0) ? -far : far);
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
