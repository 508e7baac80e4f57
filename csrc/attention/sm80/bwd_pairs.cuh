// Parts that dQ and the key-major gradients have in common: statistics of query rows, P and dS of a pair, ends of rows.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/softmax.cuh"
#include "device/numbers.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm80 {

// The statistics of a query row, `at` in [B, N, T].
template <typename Params>
__device__ __forceinline__ RowStatistics ReadStatistics(const Params& params, int64_t at) {
  return RowStatistics::Of(__ldg(static_cast<const float*>(params.lse) + at),
                           __ldg(static_cast<const float*>(params.lse_rest) + at),
                           __ldg(static_cast<const float*>(params.delta) + at));
}

// From x = q.k and dP of one pair to P and dS, in place; `rest` is the row's, and `logit` adds the pair's bias to x. A
// gate of 1 changes no bit.
template <typename Map, typename Logit>
__device__ __forceinline__ void PairGradient(float& product, float& dprob, const RowStatistics& row, float rest,
                                             float gate, const Map& map, const Logit& logit) {
  float slope = 1.f;
  if (!map.plain) {
    product = map(product);
    slope = map.Slope(product);
  }
  product = Probability(fmaf(logit(product), map.multiplier, -row.lse), rest);
  dprob = product * fmaf(gate, dprob, -row.delta) * slope;
}
template <typename Map>
__device__ __forceinline__ void PairGradient(float& product, float& dprob, const RowStatistics& row, float rest,
                                             float gate, const Map& map) {
  PairGradient(product, dprob, row, rest, gate, map, [](float x) { return x; });
}

// The ends of a thread's two accumulated rows, the first of which is `row`, in a tile of which `rows` are within
// the lengths.
struct TwoRows {
  device::RowFinish finish[2];
  __device__ __forceinline__ TwoRows(int row, int rows, bool poisoned, float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = row + 8 * half < rows;
      finish[half] = {valid && !poisoned, scale, valid ? device::QuietNan() : 0.f};
    }
  }
};

}  // namespace jax_bsk::attention::cuda::sm80
