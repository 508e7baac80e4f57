// What the kernels of block lists are told, as plain data: no XLA, Python or CUDA header.
#pragma once

#include <cstdint>

namespace jax_bsk::lists {

// Query-major lists to key-major ones, a table at a time. Within a column come first the entries with a bit tile, then
// those without, each in the order of the query-major list. Entries of no row or no column come behind the last column,
// as -1.
//
// The lists come from the user's device memory and are not trusted. Offsets count as their running maximum, clipped to
// [0, capacity]: entries before the first and past the last are of no row. Those with an id outside [0, columns) are of
// no column.
struct TransposeParams {
  int64_t tables;
  int64_t rows;
  int64_t columns;
  int64_t capacity;
  const int32_t* offsets;  // [tables, rows + 1]
  const int32_t* ids;      // [tables, capacity]
  const int32_t* tiles;    // [tables, capacity]: -1 without a bit tile
  int32_t* col_offsets;    // [tables, columns + 1]
  int32_t* row_ids;        // [tables, capacity]
  int32_t* col_tiles;      // [tables, capacity]
  int32_t* entries;        // [tables, capacity]: which entry of the query-major list stands at each place
  int32_t* places;         // [tables, capacity]: the inverse, where each entry stands
};

}  // namespace jax_bsk::lists
