// Biases as kernels read them: the sum of the terms that are given, for the pairs that a thread has in the accumulator
// of a tensor core's product, be its rows queries or keys.
//
// A logit with a bias is x' = BiasedLogit(x, bias, BiasFactor(map)) in the units of LogitMap, and goes through
// fmaf(x', map.multiplier, -shift) as x alone does. Forward and backward use one formula: where logits are large,
// another order of roundings would change probabilities. (Hopper's differ in the last bits of a large bias: the forward
// has lines among the products and adds what is read to them, the backward adds the products to both.) The soft cap's
// slope is that of x, without the bias.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/params.h"
#include "device/numbers.cuh"
#include "device/ptx/convert.cuh"
#include "device/softmax.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda {

__device__ __forceinline__ bool AnyTerm(const Bias& bias) {  // HasBias, on the device
  return bias.dense != nullptr || bias.distances != nullptr || bias.tiles != nullptr;
}

__device__ __forceinline__ float BiasFactor(const device::LogitMap& map) { return device::kLog2E / map.multiplier; }
__device__ __forceinline__ float BiasedLogit(float x, float bias, float factor) { return fmaf(bias, factor, x); }

// A term of a head (of the tiles: and of a visited block): the element for query q and key k is element
// first + q * step_q + k * step_kv of the array.
struct BiasTermView {
  const void* data;  // null: nothing to add
  bool wide;         // float32 elements, not the queries' type
  int step_q, step_kv;
  int64_t first;
};

__device__ __forceinline__ BiasTermView DenseBiasView(const Bias& bias, int batch, int head) {
  const int64_t table = lists::TableIndex(bias.dense_batch, bias.dense_heads, batch, head);
  return {bias.dense, bias.dense_wide, bias.dense_q == 1 ? 0 : static_cast<int>(bias.dense_kv),
          bias.dense_kv == 1 ? 0 : 1, table * bias.dense_q * bias.dense_kv};
}

__device__ __forceinline__ BiasTermView DistanceBiasView(const Bias& bias, const Shape& shape, int batch, int head) {
  const int64_t table = lists::TableIndex(bias.distances_batch, bias.distances_heads, batch, head);
  return {bias.distances, true, -1, 1, table * (shape.q_len + shape.kv_len - 1) + shape.q_len - 1};
}

// Of the first tile, in the block of query 0 and key 0: BiasViews::WriteBlock has the others.
__device__ __forceinline__ BiasTermView TileBiasView(const Bias& bias, int batch, int head) {
  const int64_t table = lists::TableIndex(bias.tiles_batch, bias.tiles_heads, batch, head);
  return {bias.tiles, true, bias.tiles_q == 1 ? 0 : static_cast<int>(bias.tiles_kv), bias.tiles_kv == 1 ? 0 : 1,
          table * bias.tiles_count * bias.tiles_q * bias.tiles_kv};
}

// The tile of the entry at `position` of a list's arrays, from `row_tiles` or `col_tiles`; -1: none.
__device__ __forceinline__ int ReadBiasTile(const Bias& bias, const int32_t* numbers, int64_t position) {
  if (bias.tiles == nullptr) return -1;
  const int number = __ldg(numbers + position);
  return number < 0 ? -1 : min(number, static_cast<int>(bias.tiles_count) - 1);
}

__device__ __forceinline__ float LoadBias(const float* element) { return __ldg(element); }
template <typename Half>
__device__ __forceinline__ float LoadBias(const Half* element) {
  const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(element));
  return device::ToFloat(Half{bits});
}

// A thread's place in an accumulator of mma.sync: it has rows `row` and row + 8, and columns column + 8n and + 1, all
// of them queries or keys of the problem. Where these are past the last, the last one's bias is read instead.
struct BiasPlace {
  int row, last_row;
  int column, last_column;
};

template <typename T, int kN8>
__device__ __forceinline__ void AddBiasTerm(float (&sums)[kN8][4], const T* first, int step_row, int step_column,
                                            const BiasPlace& place) {
  const T* const rows[2] = {first + static_cast<int64_t>(min(place.row, place.last_row)) * step_row,
                            first + static_cast<int64_t>(min(place.row + 8, place.last_row)) * step_row};
#pragma unroll
  for (int n = 0; n < kN8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t offset = static_cast<int64_t>(min(place.column + 8 * n + e, place.last_column)) * step_column;
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[n][2 * half + e] += LoadBias(rows[half] + offset);
    }
}

// The terms of a head and a block, in the order in which they are added up. In shared memory, where three threads put
// them: the numbers of every thread's own would take its registers, and computing them more time than reading biases.
struct BiasViews {
  BiasTermView terms[3];
  int64_t first_tile;  // what terms[2].first would be of the head's first tile in the block of query 0 and key 0
  int tile;            // of the block: ReadBiasTile's

  // Threads 0 to 2 of a CTA write the terms of a head. Thread 2 then reads the tile of an entry and writes the term of
  // a block of its, and the others read all of them after a barrier.
  __device__ __forceinline__ void WriteHead(const Bias& bias, const Shape& shape, int batch, int head, int thread) {
    if (thread == 0) terms[0] = DenseBiasView(bias, batch, head);
    if (thread == 1) terms[1] = DistanceBiasView(bias, shape, batch, head);
    if (thread == 2) {
      terms[2] = TileBiasView(bias, batch, head);
      first_tile = terms[2].first;
    }
  }
  __device__ __forceinline__ void ReadTile(const Bias& bias, const int32_t* numbers, int64_t position, int thread) {
    if (thread == 2) tile = ReadBiasTile(bias, numbers, position);
  }
  // `query` and `key` are any of the block's. (Blocks are of 64 or 128.)
  __device__ __forceinline__ void WriteBlock(const Bias& bias, const Shape& shape, int query, int key, int thread) {
    if (thread != 2 || bias.tiles == nullptr) return;
    const int block_query = query & ~(static_cast<int>(shape.block_q) - 1);
    const int block_key = key & ~(static_cast<int>(shape.block_kv) - 1);
    terms[2].data = tile < 0 ? nullptr : bias.tiles;
    terms[2].first = first_tile + tile * bias.tiles_q * bias.tiles_kv -
                     static_cast<int64_t>(block_query) * terms[2].step_q -
                     static_cast<int64_t>(block_key) * terms[2].step_kv;
  }
};

// The biases of a thread's pairs in one m16 tile: sums[n][2 * half + e] is that of row `row + 8 * half` and column
// `column + 8n + e`. kKeyRows: rows are keys and columns queries.
template <typename Element, bool kKeyRows, int kN8>
__device__ __forceinline__ void SumBiases(float (&sums)[kN8][4], const BiasViews& views, const Shape& shape, int row,
                                          int column) {
#pragma unroll
  for (int n = 0; n < kN8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[n][e] = 0.f;
  const int last_query = static_cast<int>(shape.q_len) - 1, last_key = static_cast<int>(shape.kv_len) - 1;
  const BiasPlace place{row, kKeyRows ? last_key : last_query, column, kKeyRows ? last_query : last_key};
#pragma unroll 1
  for (int term = 0; term < 3; ++term) {
    const BiasTermView& view = views.terms[term];
    if (view.data == nullptr) continue;
    const int step_row = kKeyRows ? view.step_kv : view.step_q, step_column = kKeyRows ? view.step_q : view.step_kv;
    if (std::is_same_v<Element, float> || view.wide) {
      AddBiasTerm(sums, static_cast<const float*>(view.data) + view.first, step_row, step_column, place);
    } else {
      AddBiasTerm(sums, static_cast<const Element*>(view.data) + view.first, step_row, step_column, place);
    }
  }
}

}  // namespace jax_bsk::attention::cuda
