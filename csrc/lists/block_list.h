// Block lists, their bit tiles and the lengths of examples, as kernels read them: plain data, without a CUDA header.
#pragma once

#include <cstdint>

namespace jax_bsk::lists {

// A block list says which blocks each row of blocks visits; an entry is one visited block. Lists are query-major for
// the forward and dQ (rows are query blocks, ids are key/value blocks) and key-major for dK and dV (rows are key/value
// blocks, ids are query blocks). `batch` is 1 or B, `heads` 1 or N.
//
// The contents come from the user's device memory and are not trusted: a row whose offsets are negative, decreasing or
// beyond `capacity`, or that lists an id outside [0, ids) or a tile outside [-1, BitTiles::count), yields NaN for the
// whole row of the results, and nothing outside an array is ever read.
//
// Where offsets decrease, rows may have entries in common: of [0, 10, 5, 12], rows 0 and 2 have entries 5 to 9, and row
// 1 is the one that cannot be followed. Rows whose own two offsets are in order are visited as listed all the same:
// each reads its own range, and owns its results. Only what belongs to an entry has no owner then, which is the
// gradient of its gate (see BackwardParams). To refuse such rows would take a look at all offsets for each of them.
struct BlockList {
  const int32_t* offsets;  // [batch, heads, rows + 1]
  const int32_t* ids;      // [batch, heads, capacity]
  const int32_t* tiles;    // [batch, heads, capacity]: -1 = every pair of the block attends, else a bit tile's number
  int64_t batch;
  int64_t heads;
  int64_t rows;     // q_blocks, or kv_blocks when key-major
  int64_t ids_end;  // ids lie in [0, ids_end)
  int64_t capacity;
};

// Deduplicated masks of partially visited blocks. Bit (c % 32) of word [r, c / 32] says whether query r of the block
// attends to key c of the block; always query-major, also when a key-major list refers to it. `batch` is 1 or B,
// `heads` 1 or N, each independently of the list's.
struct BitTiles {
  const uint32_t* words;  // [batch, heads, count, block_q, block_kv / 32]
  int64_t batch;
  int64_t heads;
  int64_t count;  // may be 0
};

// Valid lengths per example; rows beyond them give 0 (log-sum-exp kNoLogSumExp), keys beyond them are not attended to.
struct Lengths {
  const int32_t* pairs;  // [batch, 2]: (query length, key/value length), clamped to [0, q_len] and [0, kv_len]
  int64_t batch;         // 1 or B
};

}  // namespace jax_bsk::lists
