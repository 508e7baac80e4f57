// Online softmax of the Hopper forward, on the accumulators of one 64-row product: this thread's rows g and g + 8 of
// its warp's sixteen.
//
// The row maximum is taken off the critical path. Exponentials are formed relative to a *reference* that need not be
// the maximum: it is exact after the first tile and after every masked one, and between them it only has to stay within
// 2^kSlack of the largest exponential. Whether it does is read off the row sums, which are needed anyhow; only where a
// sum says no is a maximum looked for (Raise, from the exponentials; or, past 2^kTrust, where they may have overflowed,
// from logits that are computed once more). A reference below the maximum loses nothing: float32, and the 16-bit
// probabilities, have the same relative precision there, and 2^kSlack is far from float16's largest number. (Only a
// gate of more than 64 can overflow it: then the row is one of those that fwd_exact_rows.cuh puts right.)
//
// FlashAttention-4 skips rescaling below a threshold, but still forms the maximum, and so did the kernel that this one
// started from, beside the exponentials.
#pragma once

#include "attention/softmax.cuh"
#include "device/numbers.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::attention::cuda::sm90 {

struct RowSoftmax {
  static constexpr float kSlack = 1024.f;                  // 2^10
  static constexpr float kTrust = 1.2676506002282294e30f;  // 2^100: less has not overflowed

  float reference[2];  // in units of log2; -inf while a row has attended to nothing
  float sum[2];        // of this thread's columns, relative to the reference

  __device__ __forceinline__ void Clear() {
    reference[0] = reference[1] = -device::Infinity();
    sum[0] = sum[1] = 0.f;
  }

  // Makes the references the maxima of the rows so far, logits (x) included; `rescale` is what it does to sums and
  // outputs.
  template <int kCount>
  __device__ __forceinline__ void RaiseToLogits(const float (&x)[kCount], float multiplier, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float a = x[2 * half], b = x[2 * half + 1];
#pragma unroll
      for (int n = 1; n < kCount / 4; ++n) {
        a = fmaxf(a, x[4 * n + 2 * half]);
        b = fmaxf(b, x[4 * n + 2 * half + 1]);
      }
      const float raised = fmaxf(reference[half], device::QuadMax(fmaxf(a, b)) * multiplier);
      rescale[half] = device::Exp2(reference[half] - Shift(raised));
      reference[half] = raised;
      sum[half] *= rescale[half];
    }
  }

  // True if any of the warp's references is -inf.
  __device__ __forceinline__ bool Fresh() const {
    return __any_sync(0xFFFFFFFFu, fminf(reference[0], reference[1]) == -device::Infinity());
  }

  // Logits to exponentials relative to the references; returns their sums.
  template <int kCount>
  __device__ __forceinline__ void Exponentials(float (&x)[kCount], float multiplier, float (&total)[2]) {
    const float shift[2] = {Shift(reference[0]), Shift(reference[1])};
    float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = device::Exp2(fmaf(x[i], multiplier, -shift[i % 4 / 2]));
      part[i % 4] += x[i];
    }
    total[0] = part[0] + part[1];
    total[1] = part[2] + part[3];
  }

  // True if a reference of the warp lags too far.
  __device__ __forceinline__ static bool Lags(const float (&total)[2]) {
    return __any_sync(0xFFFFFFFFu, fmaxf(total[0], total[1]) > kSlack);
  }
  __device__ __forceinline__ void Add(const float (&total)[2]) {
    sum[0] += total[0];
    sum[1] += total[1];
  }

  // Raises lagging references by the power of two that brings the largest exponential to [1, 2), and with them the
  // exponentials, by a factor that is exact. Does nothing and returns false if an exponential may have overflowed.
  template <int kCount>
  __device__ __forceinline__ bool Raise(float (&x)[kCount], float (&total)[2], float (&rescale)[2]) {
    float largest[2] = {1.f, 1.f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], x[i]);
    if (__any_sync(0xFFFFFFFFu, fmaxf(largest[0], largest[1]) > kTrust)) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int exponent = (__float_as_int(device::QuadMax(largest[half])) >> 23) - 127;  // 0 .. 100
      rescale[half] = __int_as_float((127 - exponent) << 23);
      reference[half] += static_cast<float>(exponent);
      sum[half] *= rescale[half];
      total[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] *= rescale[i % 4 / 2];
      total[i % 4 / 2] += x[i];
    }
    return true;
  }

  // -inf - -inf would be NaN.
  __device__ static __forceinline__ float Shift(float reference) {
    return reference == -device::Infinity() ? 0.f : reference;
  }
};

}  // namespace jax_bsk::attention::cuda::sm90
