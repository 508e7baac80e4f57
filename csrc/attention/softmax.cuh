// Statistics of rows as the backward reads them; device/softmax.cuh has what the forward writes.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/params.h"
#include "device/numbers.cuh"
#include "device/ptx/thread.cuh"
#include "device/softmax.cuh"

namespace jax_bsk::attention::cuda {

using device::LogitMap;
using device::LogSum;
using device::OnlineSoftmax;
using device::StoredLse;

// Statistics of a query row, such that P = Probability(logit) in units of log2 needs no special case.
struct RowStatistics {
  float lse;  // +inf for a row that attends to nothing (P = 0); NaN when the row is poisoned or delta is not finite
  float delta;
  float rest;  // of lse: see LogSum

  __device__ static RowStatistics None() { return {device::Infinity(), 0.f, 0.f}; }
  __device__ static RowStatistics Of(float lse, float lse_rest, float delta) {
    if (lse <= kNoLogSumExp<float>) return None();
    const float value = __fmul_rn(lse, device::kLog2E),
                lost = fmaf(lse, device::kLog2E, -value) + lse * device::kLog2ERest;
    const float rest = fmaf(lse_rest, device::kLog2E, lost);
    return {isfinite(delta) ? value : device::QuietNan(), delta, isfinite(rest) ? rest : 0.f};
  }
};

// The exponent of a probability whose logit, in units of log2, is `difference` away from its row's log-sum-exp, less
// what the latter's rest says. It is at most 0, whatever rounding made of logits so large that the forward's and the
// backward's differ; NaN stays NaN.
__device__ __forceinline__ float Exponent(float difference, float rest) {
  const float x = difference - rest;
  return x > 0.f ? 0.f : x;
}
__device__ __forceinline__ float Probability(float difference, float rest) {
  return device::Exp2(Exponent(difference, rest));
}

}  // namespace jax_bsk::attention::cuda
