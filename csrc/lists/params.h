// The parameters of the kernels of block lists, as plain data: no XLA, Python or CUDA header.
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
  int32_t* to_columns;     // [tables, capacity]: which entry of the query-major list stands at each place
  int32_t* to_rows;        // [tables, capacity]: the inverse, where each entry stands
};

// States of a group, which is some key blocks that are chosen together; jax_bsk/lists/native.py has them too. Any other
// number is kClosed.
enum GroupState : int8_t { kClosed = 0, kOpen = 1, kRequired = 2 };

// From scores to query-major lists, a table at a time. A row takes its required groups, whatever their score, and the
// open ones of highest score until there are k; of equal scores the lower group, and none whose score is NaN or -inf.
// Of their blocks it lists those that are there and that the candidates does not leave empty: first the ones with a bit
// tile, then full ones, both ascending. Entries past the lists' end are -1.
//
// States and candidates are known when the call is made, but come from device memory and are not trusted, either: a row
// takes no more than `width` groups, the first of those required, and what exceeds the capacity is not listed.
struct ChooseParams {
  int64_t tables;
  int64_t rows;
  int64_t groups;
  int64_t blocks;  // groups = ceil(blocks / group)
  int64_t group;
  int64_t k;
  int64_t width;  // 0 to groups
  int64_t capacity;
  const float* scores;        // [tables, rows, groups]
  const int8_t* states;       // [rows, groups], GroupState
  const int32_t* candidates;  // [rows, blocks]: a block's bit tile, -1 for a full one, below that an empty one
  int32_t* row_offsets;       // [tables, rows + 1]
  int32_t* kv_blocks;         // [tables, capacity]
  int32_t* tiles;             // [tables, capacity]
};

}  // namespace jax_bsk::lists
