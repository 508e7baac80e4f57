// How the Hopper backward divides its work and its workspace. Pure host code and plain data.
//
// Five products and no atomics: an item of the first kind makes dK and dV of a tile of keys and writes dS of every block
// it visits to the workspace, as 64 x 64 pieces; an item of the second kind makes dQ of a block of queries, the sum of
// dS K over its row's pieces in the row's order. Items are grouped in units of some heads. The second kind of a unit is
// handed out, alternating, with the first kind of the unit kLag later: then what it waits for is done, and the products
// of the one kind run beside the copies of the other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kPieceElements = 64 * 64;

// dS that exists at a time, unless a single unit has more.
#ifndef BUDGET
#define BUDGET 384
#endif
#ifndef LEAST
#define LEAST 264
#endif
#ifndef SLOTS
#define SLOTS 4
#endif
constexpr int kLag = 2;
constexpr int kUnitSlots = SLOTS;  // units whose dS exists at a time
constexpr int64_t kScoresBudget = int64_t{BUDGET} << 20;  // bytes
// Items of the first kind that a unit has at least, if there are as many: two a multiprocessor of the largest Hopper.
constexpr int64_t kLeastItems = LEAST;

// Offsets of words (of 4 bytes) in the order in which they lie in the workspace; dS comes last.
struct BackwardLayout {
  int64_t key_tiles;   // of one head: items of the first kind
  int64_t unit_heads;  // key/value heads of a unit
  int64_t units;
  int64_t slots;                // units whose dS exists at a time
  int64_t counters_offset = 0;  // the ticket, and two words a unit
  int64_t suspect_keys_offset;  // one word for each 64 keys of a head
  int64_t suspect_queries_offset;
  int64_t matches_offset;  // one word for each entry of the query-major lists
  int64_t statistics_offset;  // 128 words for each 64 queries of a head
  int64_t pieces_offset;      // in bytes
  int64_t slot_pieces;     // of a unit
  int64_t bytes;           // of all

  // `bytes` does not depend on tile_kv.
  BackwardLayout(const Shape& shape, const BlockList& rows, const BlockList& cols, int tile_kv) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t kv_rows = shape.batch * shape.kv_heads, group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
    key_tiles = ceil_div(shape.kv_len, tile_kv);
    const int64_t head_pieces = group * cols.capacity * (shape.block_q / 64) * (shape.block_kv / 64);
    const int64_t head_bytes = std::max<int64_t>(1, head_pieces * kPieceElements * 2);
    const int64_t fitting = std::max<int64_t>(1, kScoresBudget / kUnitSlots / head_bytes);
    const int64_t wanted = ceil_div(kLeastItems, std::max<int64_t>(1, ceil_div(shape.kv_len, 128)));
    unit_heads = std::max<int64_t>(1, std::min({kv_rows, fitting, wanted}));
    units = ceil_div(kv_rows, unit_heads);
    slots = std::min<int64_t>(units, kUnitSlots);
    suspect_keys_offset = counters_offset + 1 + 2 * units;
    suspect_queries_offset = suspect_keys_offset + kv_rows * ceil_div(shape.kv_len, 64);
    matches_offset = suspect_queries_offset + shape.batch * shape.heads * ceil_div(shape.q_len, 64);
    statistics_offset = ceil_div(matches_offset + rows.batch * rows.heads * rows.capacity, 32) * 32;
    pieces_offset =
        ceil_div(4 * (statistics_offset + shape.batch * shape.heads * ceil_div(shape.q_len, 64) * 128), 1024) * 1024;
    slot_pieces = unit_heads * head_pieces;
    bytes = pieces_offset + slots * slot_pieces * kPieceElements * 2;
  }
};

}  // namespace jax_bsk::attention::cuda::sm90
