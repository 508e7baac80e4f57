// How the Hopper backward divides its work and its workspace. Pure host code and plain data.
//
// Five products and no atomics: an item of the first kind makes dK and dV of a tile of keys and writes dS of every
// block it visits to the workspace, as 64 x 64 pieces; an item of the second kind makes dQ of a block of queries, the
// sum of dS K over its row's pieces in the row's order. Items are grouped in units of some heads, and handed out in
// this order: keys of unit 0; keys of unit 1, queries of unit 0; keys of unit 2, queries of unit 1; ... So what an item
// of queries waits for has mostly been done for a while. (Handing out the two kinds in turns, so that copies of the one
// run beside products of the other, was 0 to 9 % slower: the card is at its power limit, and L2 holds less of what is
// shared.) Among the keys of a unit those that far more queries visit than others come first (prepare.h): what SparseK
// chooses, or global tokens. Were they last, most of the chip would wait for them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kPieceElements = 64 * 64;
constexpr int kStatisticsWords = 3 * 64;  // of 64 queries: lse, delta, rest
constexpr int kUnitSlots = 3;  // units whose dS exists at a time: one is written, one is read, and one waits to be
// Items of the first kind that a unit needs not have more of, in tiles of 128 keys: eight a multiprocessor. Against two
// it is 1 to 8 % faster where the workspace allows it (8192 positions, random and causal).
constexpr int64_t kEnoughItems = 1056;
// Nor more entries a multiprocessor than twice those of the longest item there may be, here of 132: whoever reads a
// unit's dS waits for that item. SparseK's heaviest columns at 32,768 positions took 6.1 ms in units of five heads and
// 8.2 in units of two.
constexpr int64_t kEnoughEntries = 264;

// The workspace, in the order in which it is laid out; offsets are in words of 4 bytes.
struct BackwardLayout {
  int64_t key_tiles;   // of one head: items of the first kind
  int64_t unit_heads;  // key/value heads of a unit
  int64_t units;
  int64_t slots;                // units whose dS exists at a time
  int64_t counters_offset = 0;  // the ticket, and two words for each unit there may be
  int64_t suspect_keys_offset;  // one word for each 64 keys of a head
  int64_t suspect_queries_offset;
  int64_t matches_offset;     // two words for each entry of the query-major lists
  int64_t statistics_offset;  // kStatisticsWords for each 64 queries of a head
  int64_t order_offset;       // one word for each item of keys
  int64_t gate_sums_offset;   // what gates.h says
  int64_t pieces_offset;      // in bytes
  int64_t slot_pieces;        // of a unit
  int64_t least_bytes;        // that a workspace must have

  // Units are as large as a workspace of `bytes` allows.
  BackwardLayout(const Shape& shape, const BlockList& rows, const BlockList& cols, int tile_kv, int64_t gate_sums,
                 int64_t bytes) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t kv_rows = shape.batch * shape.kv_heads, query_rows = shape.batch * shape.heads;
    key_tiles = ceil_div(shape.kv_len, tile_kv);
    suspect_keys_offset = counters_offset + 1 + 2 * kv_rows;
    suspect_queries_offset = suspect_keys_offset + kv_rows * ceil_div(shape.kv_len, 64);
    matches_offset = ceil_div(suspect_queries_offset + query_rows * ceil_div(shape.q_len, 64), 2) * 2;
    statistics_offset = ceil_div(matches_offset + 2 * rows.batch * rows.heads * rows.capacity, 32) * 32;
    gate_sums_offset = statistics_offset + query_rows * ceil_div(shape.q_len, 64) * kStatisticsWords;
    order_offset = gate_sums_offset + gate_sums;
    // Of whole units: fewer than twice the heads there are.
    pieces_offset = ceil_div(4 * (order_offset + 2 * kv_rows * key_tiles), 1024) * 1024;

    const int64_t group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
    const int64_t head_pieces = group * cols.capacity * (shape.block_q / 64) * (shape.block_kv / 64);
    const int64_t head_bytes = std::max<int64_t>(1, head_pieces * kPieceElements * 2);
    least_bytes = pieces_offset + std::min<int64_t>(kv_rows, kUnitSlots) * head_bytes;
    const int64_t heads = std::max<int64_t>(0, bytes - pieces_offset) / head_bytes;
    const int64_t enough = std::max(ceil_div(kEnoughItems, std::max<int64_t>(1, ceil_div(shape.kv_len, 128))),
                                    ceil_div(kEnoughEntries * shape.q_blocks, std::max<int64_t>(1, cols.capacity)));
    unit_heads = kv_rows <= std::min(enough, heads) ? kv_rows : std::min(enough, heads / kUnitSlots);
    unit_heads = std::max<int64_t>(1, unit_heads);
    units = ceil_div(kv_rows, unit_heads);
    slots = std::min<int64_t>(units, kUnitSlots);
    slot_pieces = unit_heads * head_pieces;
  }
};

}  // namespace jax_bsk::attention::cuda::sm90
