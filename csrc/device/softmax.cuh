// From products q.k to logits in units of log2, the masks of a thread's rows, and the online softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/params.h"
#include "device/ptx.cuh"

namespace jax_bsk::device {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float Infinity() { return __int_as_float(0x7F800000); }
__device__ __forceinline__ float QuietNan() { return __int_as_float(0x7FFFFFFF); }

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
    plain = !capped && scale > attention::kLeastPlainScale;
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

// Statistics of a query row, such that P = Exp2(logit - lse) in units of log2 needs no special case.
struct RowStatistics {
  float lse;  // +inf for a row that attends to nothing (P = 0); NaN when the row is poisoned or delta is not finite
  float delta;

  __device__ static RowStatistics None() { return {Infinity(), 0.f}; }
  __device__ static RowStatistics Of(float lse, float delta) {
    if (lse == -Infinity()) return None();
    return {isfinite(delta) ? lse * kLog2E : QuietNan(), delta};
  }
};

// Bits of the columns below `count` of a 64-column tile.
__device__ __forceinline__ uint64_t FirstBits(int count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(count, 0)) - 1;
}

// Largest, sum over the four lanes that share a row.
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// Sum over the lanes of a warp.
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
  return x;
}

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
