// The terms of a bias as the Hopper kernels add them, one after the other.
#pragma once

#include <cstdint>

#include "attention/bias.cuh"
#include "attention/params.h"
#include "device/ptx/convert.cuh"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kBiasTerms = 3;

__device__ __forceinline__ bool HasTerm(const Bias& bias, int which) {
  return (which == 0 ? bias.dense : which == 1 ? bias.distances : bias.tiles) != nullptr;
}

// Term 0 .. kBiasTerms - 1 of a head. `tile` is the number of the entry of the block that query and key are in, as it
// came: producers have no registers to look at it.
__device__ __forceinline__ BiasTermView TermView(const Bias& bias, const Shape& shape, int which, int batch, int head,
                                                 int tile, int query, int key) {
  if (which == 0) return DenseBiasView(bias, batch, head);
  if (which == 1) return DistanceBiasView(bias, shape, batch, head);
  BiasTermView view = TileBiasView(bias, batch, head);
  const int block_query = query & -static_cast<int>(shape.block_q), block_key = key & -static_cast<int>(shape.block_kv);
  if (tile < 0) view.data = nullptr;
  view.first += min(int64_t{tile}, bias.tiles_count - 1) * bias.tiles_q * bias.tiles_kv -
                int64_t{block_query} * view.step_q - int64_t{block_key} * view.step_kv;
  return view;
}

__device__ __forceinline__ int64_t BiasIndex(const BiasTermView& view, int query, int key) {
  return view.first + int64_t{query} * view.step_q + int64_t{key} * view.step_kv;
}

template <typename Element>
__device__ __forceinline__ float ReadBias(const BiasTermView& view, int64_t index) {
  return view.wide ? LoadBias(static_cast<const float*>(view.data) + index)
                   : LoadBias(static_cast<const Element*>(view.data) + index);
}

// Adds the terms to the logit of one pair.
template <typename Element>
__device__ __forceinline__ void AddBiasOfPair(float& logit, float factor, const Bias& bias, const Shape& shape,
                                              int batch, int head, int tile, int query, int key) {
#pragma unroll 1
  for (int which = 0; which < kBiasTerms; ++which) {
    if (!HasTerm(bias, which)) continue;
    const BiasTermView view = TermView(bias, shape, which, batch, head, tile, query, key);
    if (view.data != nullptr) {
      logit = BiasedLogit(logit, ReadBias<Element>(view, BiasIndex(view, query, key)), factor);
    }
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
