// A tile of queries as the forward and dQ see it: its position in the problem, its arrays, and the keys that its rows
// attend to.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/softmax.cuh"
#include "device/numbers.cuh"
#include "device/tile.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm80 {

// kTileQ queries of one head. Tiles of one head have neighbouring numbers: they share keys and values in L2.
template <typename Element_, int kTileQ>
struct QueryTile {
  using Element = Element_;

  int batch, head;
  int q_start;  // the first query
  int q_rows;   // queries that are within the lengths
  lists::LengthLimits limit;
  int64_t first_query;  // its number among the queries of all examples
  // Elements from one position to the next; problems in which they exceed 2^31 are refused.
  int query_stride, key_stride, value_stride, out_stride;
  const Element *query, *keys, *values;

  template <typename Params>
  __device__ __forceinline__ QueryTile(const Params& params, unsigned number) {
    const Shape& shape = params.shape;
    const int q_len = static_cast<int>(shape.q_len), heads = static_cast<int>(shape.heads);
    const int kv_heads = static_cast<int>(shape.kv_heads);
    const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
    const int q_tiles = (q_len + kTileQ - 1) / kTileQ;
    q_start = static_cast<int>(number % q_tiles) * kTileQ;
    head = static_cast<int>(number / q_tiles) % heads;
    batch = static_cast<int>(number / q_tiles) / heads;
    limit = lists::ReadLengths(params.lengths, batch, q_len, static_cast<int>(shape.kv_len));
    q_rows = max(0, min(limit.query - q_start, kTileQ));

    const int kv_head = head / (heads / kv_heads);
    query_stride = heads * head_dim, key_stride = kv_heads * head_dim;
    value_stride = kv_heads * value_dim, out_stride = heads * value_dim;
    first_query = batch * shape.q_len + q_start;
    const int64_t first_key = batch * shape.kv_len;
    query = static_cast<const Element*>(params.query) + first_query * query_stride + head * head_dim;
    keys = static_cast<const Element*>(params.key) + first_key * key_stride + kv_head * head_dim;
    values = static_cast<const Element*>(params.value) + first_key * value_stride + kv_head * value_dim;
  }

  // Index of the first query in the statistics, [B, N, T].
  __device__ __forceinline__ int64_t Statistics(const Shape& shape) const {
    return (batch * shape.heads + head) * shape.q_len + q_start;
  }
};

// Starts a thread's part of the copies to shared memory.
template <int kThreads>
struct TileLoader {
  int head_dim, value_dim, thread;

  __device__ __forceinline__ TileLoader(const Shape& shape, int thread)
      : head_dim(static_cast<int>(shape.head_dim)), value_dim(static_cast<int>(shape.value_dim)), thread(thread) {}

  template <typename Target, typename Tile>
  __device__ __forceinline__ void Queries(Target& target, const Tile& tile) const {
    device::LoadTileAsync<kThreads>(target, tile.query, tile.query_stride, tile.q_rows, head_dim, thread);
  }
  template <typename Target, typename Tile>
  __device__ __forceinline__ void Keys(Target& target, const Tile& tile, const lists::Step& step) const {
    device::LoadTileAsync<kThreads>(target, tile.keys + int64_t{step.start} * tile.key_stride, tile.key_stride,
                                    tile.limit.key - step.start, head_dim, thread);
  }
  template <typename Target, typename Tile>
  __device__ __forceinline__ void Values(Target& target, const Tile& tile, const lists::Step& step) const {
    device::LoadTileAsync<kThreads>(target, tile.values + int64_t{step.start} * tile.value_stride, tile.value_stride,
                                    tile.limit.key - step.start, value_dim, thread);
  }
};

// A bit for each of the kColumns keys of `step`: whether row `row` of the tile attends to it.
template <int kColumns, typename Tile>
__device__ __forceinline__ uint64_t AttendedKeys(const BitTiles& tiles, const Shape& shape, const Tile& tile, int row,
                                                 const lists::Step& step) {
  const int block_q = static_cast<int>(shape.block_q), block_kv = static_cast<int>(shape.block_kv);
  uint64_t bits = device::FirstBits(tile.limit.key - step.start);
  if (step.tile >= 0) {
    const uint32_t* words =
        lists::BitTileRow(tiles, tile.batch, tile.head, step.tile, tile.q_start % block_q + row, block_q, block_kv) +
        step.offset / 32;
    if constexpr (kColumns < 32) {
      bits &= __ldg(words) >> step.offset % 32;
    } else {
      bits &= lists::RowBits<kColumns>(words);
    }
  }
  return bits;
}

}  // namespace jax_bsk::attention::cuda::sm80
