// Preparation of the Hopper backward: everything that its kernel reads and one pass over the lists can compute.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "attention/params.h"

namespace jax_bsk::attention::cuda {

struct Preparation {
  // Words to be zeroed.
  int32_t* zeros;
  int64_t zero_count;
  // [entries of the query-major lists]: x is the place of the same block, with the same bit tile, in the key-major list
  // of the same head, counted from that list's beginning (with gates, of the same of several such entries); -1 where
  // there is none, a list cannot be read, or its offsets decrease. y is the row that this is of: rows of such a list
  // may overlap, and then either may have written last. Entries that belong to no row are left alone. Both lists are
  // per batch and per head alike.
  int2* matches;
  // [batch, heads, ceil(q_len / 64), 3, 64]: RowStatistics of each 64 queries, first lse, then delta, then rest, as the
  // copy engine can take them whatever the length.
  float* statistics;
  // [slices, key_items]: items of keys in the order in which they are handed out: first those with more than twice the
  // mean number of entries, then the others, each kind as it is numbered. Item i is tile i % key_tiles of the slice's
  // key/value head i / key_tiles.
  int32_t* order;
  int slices;
  int slice_heads;
  int key_tiles;
  int tile_blocks;  // tiles of keys a block: 1 or 2
};

cudaError_t LaunchPrepare(const BackwardParams& params, const Preparation& preparation, cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda
