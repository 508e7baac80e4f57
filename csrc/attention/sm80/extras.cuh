// Gates, biases and dropout in a kernel: compiled out, or branches at run time (config.h says which, and why).
#pragma once

#include "attention/bias.cuh"
#include "attention/dropout.cuh"
#include "attention/params.h"
#include "attention/softmax.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
__device__ __forceinline__ bool HasGates(const void* gates) {
  return Config::kMayBeExtended && gates != nullptr;
}
template <typename Config>
__device__ __forceinline__ bool HasBias(const Bias& bias) {
  return Config::kMayBeExtended && AnyTerm(bias);
}
template <typename Config>
__device__ __forceinline__ bool HasDropout(const Dropout& dropout) {
  return Config::kMayBeExtended && dropout.keys != nullptr;
}

template <typename Config, typename Params>
__device__ __forceinline__ bool HasBiasOrDropout(const Params& params) {
  return HasBias<Config>(params.bias) || HasDropout<Config>(params.dropout);
}

// Columns of eight whose extras a thread has at a time: as a whole they would spill.
constexpr int kExtrasN8 = 2;

// For pairs without biases and dropout, in place of PairExtras.
struct NoPairExtras {
  __device__ __forceinline__ float Logit(float x, int, int) const { return x; }
  __device__ __forceinline__ float Weight(int, int) const { return 1.f; }
};

// What the pairs of a thread have beside their products in the backward: a bias each, and whether they are dropped. Of
// one m16 tile, kExtrasN8 columns of eight.
template <typename Config, bool kKeyRows>
struct PairExtras {
  bool biased, drops;
  float factor;  // of the bias: BiasFactor
  int threshold;
  float kept;  // the factor of pairs that stay
  float bias[kExtrasN8][4];
  DropoutWords<kKeyRows, kExtrasN8> words;

  // For the pairs of rows `row`, row + 8 and columns column + 8n, + 1 of the problem.
  template <typename Params>
  __device__ __forceinline__ PairExtras(const Params& params, const BiasViews& views, const LogitMap& map, int batch,
                                        int head, int row, int column)
      : biased(HasBias<Config>(params.bias)), drops(HasDropout<Config>(params.dropout)) {
    if (biased) {
      factor = BiasFactor(map);
      SumBiases<typename Config::Element, kKeyRows>(bias, views, params.shape, row, column);
    }
    if (drops) {
      threshold = params.dropout.threshold;
      kept = DropoutScale(threshold);
      words.Make(__ldg(params.dropout.keys + batch * params.shape.heads + head), row, column);
    }
  }
  // x of the pair in acc[n][e], to which its bias is added. n is counted from the first of these columns.
  __device__ __forceinline__ float Logit(float x, int n, int e) const {
    return biased ? BiasedLogit(x, bias[n][e], factor) : x;
  }
  // The pair's factor after the softmax.
  __device__ __forceinline__ float Weight(int n, int e) const {
    return !drops ? 1.f : words.IsDropped(n, e, threshold) ? 0.f : kept;
  }
};

}  // namespace jax_bsk::attention::cuda::sm80
