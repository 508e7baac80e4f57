// The terms of a bias as the Hopper kernels add them: each is an array in which the element of query q and key k lies
// at first + q * step_q + k * step_kv (attention/bias.h).
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "device/ptx/convert.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kBiasTerms = 3;

__device__ __forceinline__ bool HasTerm(const Bias& bias, int which) {
  return (which == 0 ? bias.dense : which == 1 ? bias.distances : bias.tiles) != nullptr;
}

// A term as one head has it; `data` is null for one that is not given, or that a block does not have.
struct BiasTermOfHead {
  const void* data;
  bool wide;  // float32, else the type of the queries
  int64_t first;
  int64_t step_q;
  int step_kv;  // 0 or 1

  __device__ __forceinline__ int64_t Index(int query, int key) const {
    return first + query * step_q + int64_t{key} * step_kv;
  }

  // Term 0 .. kBiasTerms - 1. `number` is the tile of the block that query and key are in.
  __device__ __forceinline__ static BiasTermOfHead Of(const Bias& bias, const Shape& shape, int which, int batch,
                                                      int head, int number, int query, int key) {
    if (which == 0) return Dense(bias, batch, head);
    if (which == 1) return Distances(bias, shape, batch, head);
    return Tile(bias, shape, batch, head, number, query, key);
  }

  __device__ __forceinline__ static BiasTermOfHead Dense(const Bias& bias, int batch, int head) {
    const int64_t table = lists::TableIndex(bias.dense_batch, bias.dense_heads, batch, head);
    return {bias.dense, bias.dense_wide, table * bias.dense_q * bias.dense_kv, bias.dense_q == 1 ? 0 : bias.dense_kv,
            bias.dense_kv != 1};
  }
  __device__ __forceinline__ static BiasTermOfHead Distances(const Bias& bias, const Shape& shape, int batch,
                                                             int head) {
    const int64_t table = lists::TableIndex(bias.distances_batch, bias.distances_heads, batch, head);
    return {bias.distances, true, table * (shape.q_len + shape.kv_len - 1) + shape.q_len - 1, -1, 1};
  }
  __device__ __forceinline__ static BiasTermOfHead Tile(const Bias& bias, const Shape& shape, int batch, int head,
                                                        int number, int query, int key) {
    const int64_t table = lists::TableIndex(bias.tiles_batch, bias.tiles_heads, batch, head);
    const int64_t tile = table * bias.tiles_count + min(int64_t{number}, bias.tiles_count - 1);
    const int64_t step_q = bias.tiles_q == 1 ? 0 : bias.tiles_kv;
    const int step_kv = bias.tiles_kv != 1;
    const int q_start = query & -static_cast<int>(shape.block_q), kv_start = key & -static_cast<int>(shape.block_kv);
    return {number < 0 ? nullptr : bias.tiles, true,
            tile * bias.tiles_q * bias.tiles_kv - q_start * step_q - int64_t{kv_start} * step_kv, step_q, step_kv};
  }
};

template <typename Element>
__device__ __forceinline__ float ReadBias(const BiasTermOfHead& term, int64_t index) {
  if (term.wide) return __ldg(static_cast<const float*>(term.data) + index);
  return device::ToFloat(Element{__ldg(static_cast<const uint16_t*>(term.data) + index)});
}

// Adds the terms to the logit of one pair, times `factor`; `number` is its block's tile.
template <typename Element>
__device__ __forceinline__ void AddBiasOfPair(float& logit, float factor, const Bias& bias, const Shape& shape,
                                              int batch, int head, int number, int query, int key) {
#pragma unroll 1
  for (int which = 0; which < kBiasTerms; ++which) {
    if (!HasTerm(bias, which)) continue;
    const auto term = BiasTermOfHead::Of(bias, shape, which, batch, head, number, query, key);
    if (term.data != nullptr) logit = fmaf(ReadBias<Element>(term, term.Index(query, key)), factor, logit);
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
