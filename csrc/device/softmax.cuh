// From products q.k to logits in units of log2, the log-sum-exp of rows, and the online softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/numbers.cuh"
#include "device/ptx/thread.cuh"
#include "logits.h"

namespace jax_bsk::device {

// A row's log-sum-exp as it is stored: see kNoLogSumExp.
__device__ __forceinline__ float StoredLse(float lse) { return lse == -Infinity() ? kNoLogSumExp<float> : lse; }

// logits * log2(e) = multiplier * x, with multiplier > 0 and
//   x = q.k                             plainly (`plain`), the scale folded into the multiplier;
//   x = q.k * before                    for a scale that is not positive, else max(x) would not find the largest logit;
//   x = tanh(q.k * before)              with a soft cap.
// A masked pair may therefore be x = -inf in every case.
struct LogitMap {
  float before;
  float multiplier;
  bool plain;
  bool capped;

  LogitMap() = default;
  __host__ __device__ LogitMap(float scale, float soft_cap) {
    capped = soft_cap != 0.f;
    plain = !capped && scale > kLeastPlainScale;
    before = capped ? scale / fabsf(soft_cap) : scale;
    multiplier = kLog2E * (capped ? fabsf(soft_cap) : plain ? scale : 1.f);
  }

  // x of a pair when not plain.
  __device__ float operator()(float product) const {
    const float x = product * before;
    // Accurate near zero as well: 1 - 2 / (e^2x + 1) errs by 2^-23 there, which the cap multiplies into lse.
    return capped ? tanhf(x) : x;
  }
  // Derivative of the logit by scale * q.k, from x.
  __device__ float Slope(float x) const { return capped ? 1.f - x * x : 1.f; }
};

// The natural logarithm of sum * 2^max, rounded, and what rounding took from it.
struct LogSum {
  float value;
  float rest;

  __device__ static LogSum Of(float max, float sum) {
    // Rounded here, and not part of a fused operation below.
    const float product = __fmul_rn(max, kLn2), log_sum = logf(sum), value = fmaf(max, kLn2, log_sum);
    const float lost = fmaf(max, kLn2, -product) + max * kLn2Rest;  // by the product
    const float rest = ((product - value) + log_sum) + lost;        // the difference is exact where value is large
    return {value, isfinite(rest) ? rest : 0.f};
  }
};

// Running softmax of a thread's two rows of one m16 tile, in units of log2.
struct OnlineSoftmax {
  float max[2] = {-Infinity(), -Infinity()};  // of the row
  float sum[2] = {0.f, 0.f};                  // over this thread's columns only; QuadSum at the end

  // Turns x into probabilities relative to the running maximum and returns the factors for what was accumulated so far.
  // A NaN passes through the exponential into the sum; the maximum ignores it.
  template <int kN8>
  __device__ __forceinline__ void Update(float (&x)[kN8][4], float multiplier, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = x[0][2 * half];
#pragma unroll
      for (int n = 0; n < kN8; ++n) largest = fmaxf(fmaxf(largest, x[n][2 * half]), x[n][2 * half + 1]);
      const float new_max = fmaxf(max[half], QuadMax(largest) * multiplier);
      const float shift = new_max == -Infinity() ? 0.f : new_max;  // -inf - -inf would be NaN
      rescale[half] = Exp2(max[half] - shift);
      max[half] = new_max;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kN8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          x[n][e] = Exp2(fmaf(x[n][e], multiplier, -shift));
          total += x[n][e];
        }
      sum[half] = fmaf(sum[half], rescale[half], total);
    }
  }
};

}  // namespace jax_bsk::device
