// What is added to the logits of pairs, and which pairs are dropped: plain data, as kernels read it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace jax_bsk::attention {

// The numbers that are added to logits, after the soft cap: the sum of the terms that are given. "stats" as in
// params.h. In an array that is not given the pointer is null.
//
// Every term is an array whose element for query q and key k of a block lies at `first + q * step_q + k * step_kv`, the
// steps being 0, 1, -1 or the length of a row. Kernels add all of them in the same way.
struct Bias {
  // [dense_batch, dense_heads, dense_q, dense_kv], each 1 or B / N / T / S. Its type is stats if `dense_wide`, else
  // that of the queries.
  const void* dense;
  bool dense_wide;
  int64_t dense_batch, dense_heads, dense_q, dense_kv;

  // stats [distances_batch, distances_heads, T + S - 1], each 1 or B / N: element k - q + T - 1.
  const void* distances;
  int64_t distances_batch, distances_heads;

  // stats [tiles_batch, tiles_heads, tiles_count, tiles_q, tiles_kv]: tiles_q is 1 or block_q, tiles_kv 1 or block_kv.
  // Entry e of a list adds tile row_tiles[e] (col_tiles[e] in the key-major lists, for the backward): [batch, heads,
  // capacity] as the list's ids; a negative number adds nothing, one past the last tile adds the last.
  const void* tiles;
  int64_t tiles_batch, tiles_heads, tiles_count, tiles_q, tiles_kv;
  const int32_t* row_tiles;
  const int32_t* col_tiles;
};

JAX_BSK_HOST_DEVICE bool HasBias(const Bias& bias) {
  return bias.dense != nullptr || bias.distances != nullptr || bias.tiles != nullptr;
}

// The term that a gradient is asked for.
enum class BiasTerm : int64_t { kDense = 0, kDistances = 1, kTiles = 2 };

}  // namespace jax_bsk::attention
