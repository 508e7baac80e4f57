// How the Hopper backward divides its work and its workspace. Pure host code and plain data.
//
// Five products and no atomics: an item of the first kind makes dK and dV of a tile of keys and writes dS of every
// block it visits to the workspace, as 64 x 64 subtiles; an item of the second kind makes dQ of a block of queries, the
// sum of dS K over its row's subtiles in the row's order. Items are grouped in slices of some heads, and handed out in
// this order: keys of slice 0; keys of slice 1, queries of slice 0; keys of slice 2, queries of slice 1; ... So what an
// item of queries waits for has mostly been done for a while. (Handing out the two kinds in turns, so that copies of
// the one run beside products of the other, was 0 to 9 % slower: the card is at its power limit, and L2 holds less of
// what is shared.) Among the keys of a slice those that far more queries visit than others come first (prepare.h): what
// SparseK chooses, or global tokens. Were they last, most of the chip would wait for them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"
#include "attention/sm90/bias_lines.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kSubtileElements = 64 * 64;
constexpr int kStatisticsWords = 3 * 64;  // of 64 queries: lse, delta, rest
constexpr int kSliceBuffers = 3;  // slices whose dS exists at a time: one is written, one is read, and one waits to be
// Items of the first kind that a slice needs not have more of, in tiles of 128 keys: eight a multiprocessor. Against
// two it is 1 to 8 % faster where the workspace allows it (8192 positions, random and causal).
constexpr int64_t kEnoughItems = 1056;
// Nor more entries a multiprocessor than twice those of the longest item there may be, here of 132: whoever reads a
// slice's dS waits for that item. SparseK's heaviest columns at 32,768 positions took 6.1 ms in slices of five heads
// and 8.2 in slices of two.
constexpr int64_t kEnoughEntries = 264;

// Heads that are enough for a slice; more make nothing faster.
inline int64_t EnoughHeads(const Shape& shape, int64_t capacity) {
  return std::max(BlocksOf(kEnoughItems, std::max<int64_t>(1, BlocksOf(shape.kv_len, 128))),
                  BlocksOf(kEnoughEntries * shape.q_blocks, std::max<int64_t>(1, capacity)));
}

// The workspace, in the order in which it is laid out; offsets are in words of 4 bytes.
struct BackwardLayout {
  int64_t key_tiles;    // of one head: items of the first kind
  int64_t slice_heads;  // key/value heads of a slice
  int64_t slices;
  int64_t buffers;              // slices whose dS exists at a time
  int64_t counters_offset = 0;  // the work counter, and two words for each slice there may be
  int64_t inexact_keys_offset;  // one word for each 64 keys of a head
  int64_t inexact_queries_offset;
  int64_t matches_offset;     // two words for each entry of the query-major lists
  int64_t lines_offset;       // of a bias by distance: bias_lines.h
  int64_t statistics_offset;  // kStatisticsWords for each 64 queries of a head
  int64_t order_offset;       // one word for each item of keys
  int64_t gate_sums_offset;   // what gates.h says
  int64_t subtiles_offset;    // in bytes
  int64_t buffer_subtiles;    // of a slice
  int64_t least_bytes;        // that a workspace must have

  // Slices are as large as a workspace of `bytes` allows.
  BackwardLayout(const Shape& shape, const BlockList& rows, const BlockList& cols, int tile_kv, int64_t gate_sums,
                 int64_t distance_tables, int64_t bytes) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t kv_rows = shape.batch * shape.kv_heads, query_rows = shape.batch * shape.heads;
    key_tiles = ceil_div(shape.kv_len, tile_kv);
    inexact_keys_offset = counters_offset + 1 + 2 * kv_rows;
    inexact_queries_offset = inexact_keys_offset + kv_rows * ceil_div(shape.kv_len, 64);
    matches_offset = ceil_div(inexact_queries_offset + query_rows * ceil_div(shape.q_len, 64), 2) * 2;
    lines_offset = matches_offset + 2 * rows.batch * rows.heads * rows.capacity;
    statistics_offset = ceil_div(lines_offset + BiasLineWords(shape, distance_tables), 32) * 32;
    gate_sums_offset = statistics_offset + query_rows * ceil_div(shape.q_len, 64) * kStatisticsWords;
    order_offset = gate_sums_offset + gate_sums;
    // The order is of whole slices, which have fewer than twice the heads there are.
    subtiles_offset = ceil_div(4 * (order_offset + 2 * kv_rows * key_tiles), 1024) * 1024;

    const int64_t group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
    const int64_t head_subtiles = group * cols.capacity * (shape.block_q / 64) * (shape.block_kv / 64);
    const int64_t head_bytes = std::max<int64_t>(1, head_subtiles * kSubtileElements * 2);
    least_bytes = subtiles_offset + std::min<int64_t>(kv_rows, kSliceBuffers) * head_bytes;
    const int64_t heads = std::max<int64_t>(0, bytes - subtiles_offset) / head_bytes;
    const int64_t enough = EnoughHeads(shape, cols.capacity);
    slice_heads = kv_rows <= std::min(enough, heads) ? kv_rows : std::min(enough, heads / kSliceBuffers);
    slice_heads = std::max<int64_t>(1, slice_heads);
    slices = ceil_div(kv_rows, slice_heads);
    buffers = std::min<int64_t>(slices, kSliceBuffers);
    buffer_subtiles = slice_heads * head_subtiles;
  }
};

// Bytes that are spent on dS unless kSliceBuffers heads need more: twice those of dQ in float32, and at least these.
constexpr int64_t kPlentyBytes = int64_t{2} << 30;

// Bytes of the workspace that Python allocates: what BackwardLayout needs at least, and more for speed, for lists of
// `capacity` entries in `tables` tables, with `gates` numbers in them (0 for none) and a bias by distance with
// `distance_tables` (likewise). It has room for as many heads in
// each slice as BackwardLayout calls enough, as far as that is kPlentyBytes. So it grows as the inputs and the visited
// blocks do.
inline int64_t RecommendedBackwardBytes(const Shape& shape, int64_t tables, int64_t capacity, int64_t gates,
                                        int64_t distance_tables) {
  const int64_t kv_rows = shape.batch * shape.kv_heads, query_rows = shape.batch * shape.heads;
  const int64_t q_tiles = BlocksOf(shape.q_len, 64), kv_tiles = BlocksOf(shape.kv_len, 64);
  const int64_t gate_sums = 4 * gates * BlocksOf(shape.block_q, 64) * BlocksOf(shape.block_kv, 64);
  // BackwardLayout's parts without its roundings, which take up to 33 words and 1024 bytes more.
  const int64_t words = 1 + 2 * kv_rows + 3 * kv_rows * kv_tiles + query_rows * q_tiles * (1 + kStatisticsWords) +
                        2 * tables * capacity + BiasLineWords(shape, distance_tables) + 33 + gate_sums;
  const int64_t group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
  const int64_t head_bytes = std::max<int64_t>(1, 2 * shape.block_q * shape.block_kv * capacity * group);
  const int64_t plenty = std::max(8 * query_rows * shape.q_len * shape.head_dim, kPlentyBytes);
  const int64_t heads = std::min(
      {kv_rows, kSliceBuffers * EnoughHeads(shape, capacity), std::max<int64_t>(kSliceBuffers, plenty / head_bytes)});
  return 4 * words + 1024 + heads * head_bytes;
}

}  // namespace jax_bsk::attention::cuda::sm90
