// Reading what came from the user's memory: lists of blocks, bit tiles and lengths. Nothing here trusts an integer
// before it has been compared with its bounds.
#pragma once

#include "../params.h"
#include "cpu/list_range.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

using namespace jax_bsk::cpu::JAX_BSK_CPU_ISA;

// The index of (b, h) in an array whose leading dimensions may each be 1.
JAX_BSK_INLINE int64_t LeadingIndex(int64_t batch, int64_t heads, int64_t b, int64_t h) {
  return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
}

JAX_BSK_INLINE int64_t QueryLength(const Lengths& lengths, const Shape& shape, int64_t b) {
  return Clamp(lengths.pairs[2 * (lengths.batch == 1 ? 0 : b)], shape.q_len);
}

JAX_BSK_INLINE int64_t KeyLength(const Lengths& lengths, const Shape& shape, int64_t b) {
  return Clamp(lengths.pairs[2 * (lengths.batch == 1 ? 0 : b) + 1], shape.kv_len);
}

// The offsets of all rows of (b, h), [rows + 1].
JAX_BSK_INLINE const int32_t* RowOffsets(const BlockList& list, int64_t b, int64_t h) {
  return list.offsets + LeadingIndex(list.batch, list.heads, b, h) * (list.rows + 1);
}

struct BlockRow {
  bool poisoned;  // the row of results is NaN; the ids and tiles may not be used
  int64_t begin;  // of the row's entries in the list
  int64_t count;
  const int32_t* ids;    // [count], each in [0, ids_end)
  const int32_t* tiles;  // [count], each in [-1, tile_count)
};

// One row of a list, checked to its last entry before any of it is used.
inline BlockRow ReadRow(const BlockList& list, int64_t tile_count, int64_t b, int64_t h, int64_t row) {
  const int64_t leading = LeadingIndex(list.batch, list.heads, b, h);
  const ListRange range = ReadRange(RowOffsets(list, b, h) + row, list.capacity);
  if (!range.sound) return {true, 0, 0, nullptr, nullptr};
  BlockRow result = {false, range.begin, range.count, list.ids + leading * list.capacity + range.begin,
                     list.tiles + leading * list.capacity + range.begin};
  for (int64_t i = 0; i < result.count; ++i) {
    result.poisoned |= result.ids[i] < 0 || result.ids[i] >= list.ids_end;
    result.poisoned |= result.tiles[i] < -1 || result.tiles[i] >= tile_count;
  }
  return result;
}

// The part of a row's entries, [count], in an array [B, N, capacity] of the compute type; null stays null.
template <class C, class Pointer>
JAX_BSK_INLINE C* RowGates(Pointer* gates, const BlockList& list, const Shape& shape, int64_t b, int64_t h,
                           const BlockRow& row) {
  return gates == nullptr ? nullptr : static_cast<C*>(gates) + (b * shape.heads + h) * list.capacity + row.begin;
}

// Words [block_q, block_kv / 32] of a bit tile.
JAX_BSK_INLINE const uint32_t* TileWords(const BitTiles& tiles, const Shape& shape, int64_t b, int64_t h,
                                         int64_t tile) {
  const int64_t index = LeadingIndex(tiles.batch, tiles.heads, b, h) * tiles.count + tile;
  return tiles.words + index * shape.block_q * (shape.block_kv / 32);
}

// A tile with the queries along the lanes: to[word][query], so that one load, one AND tell which of a vector's queries
// attend to a key. Lanes beyond the queries attend to nothing. `heads` lanes in a row are of one query.
template <class C>
void PackTile(const uint32_t* words, int64_t words_per_row, int64_t queries, int64_t lanes, Lane<C>* to,
              int64_t heads = 1) {
  for (int64_t w = 0; w < words_per_row; ++w) {
    Lane<C>* lane = to + w * lanes;
    for (int64_t q = 0; q < queries; ++q) {
      for (int64_t h = 0; h < heads; ++h) *lane++ = words[q * words_per_row + w];
    }
    while (lane != to + (w + 1) * lanes) *lane++ = 0u;
  }
}

// All ones where the queries of a vector attend to `key`; `tile` as PackTile wrote it, moved to the vector's first
// query.
template <class C>
JAX_BSK_INLINE IntVec<C> QueriesAttend(const Lane<C>* tile, int64_t lanes, int64_t key) {
  const UintVec<C> bit = BroadcastWord<C>(Lane<C>(1) << (key & 31));
  return (LoadWords<C>(tile + (key >> 5) * lanes) & bit) != 0;
}

// All ones where `query` attends to the keys first, first + 1, ... of a vector; `words` is the query's row of the tile.
template <class C>
JAX_BSK_INLINE IntVec<C> KeysAttend(const uint32_t* words, int64_t first) {
  UintVec<C> bits;
  for (int k = 0; k < kLanes<C>; ++k) bits[k] = Lane<C>(1) << k;
  return (BroadcastWord<C>(words[first >> 5] >> (first & 31)) & bits) != 0;
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
