// The parameters of block-sparse products, as plain data. No XLA, Python or CUDA header: the handlers fill
// these structs after checking every shape, and the CPU and CUDA kernels read nothing else.
//
// Letters: the sparse matrix is [M, K] in blocks of bm x bk; "out" and "in" are its two sides as a product sees them, K
// contracted unless the product is with the transpose.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace jax_bsk::matmul {

// Blocks in the order a product walks them: those of out block r are the list entries offsets[r] .. offsets[r + 1] - 1.
//
// The lists come from the user's device memory and are not trusted: an out block whose offsets are negative, decreasing
// or beyond `capacity`, or one that lists an id outside [0, in blocks) or a place outside [0, capacity), is NaN as a
// whole, and nothing outside an array is ever read.
struct BlockLists {
  const int32_t* offsets;  // [batch, out blocks + 1]
  const int32_t* ids;      // [batch, capacity]: the in block of an entry
  const int32_t* places;   // [batch, capacity]: which of the blocks in `data` it is
};

// out = A b, or A^T b; with the dense operand on the left, out = b A^T, or b A, of [.., in] rows.
struct ProductParams {
  DType dtype;      // of the blocks and the dense operand; sums are float32 (float64 for float64)
  DType out_dtype;  // the same, or float32
  int64_t batch;
  int64_t matrix_batch;  // 1 or batch: of data and lists
  int64_t dense_batch;   // 1 or batch
  int64_t out_length;    // M, or K when transposed
  int64_t in_length;     // K, or M when transposed
  int64_t out_block;     // rows of the result a block makes: bm, or bk when transposed
  int64_t in_block;      // bk, or bm when transposed
  int64_t out_blocks;    // ceil(out_length / out_block)
  int64_t in_blocks;     // ceil(in_length / in_block)
  int64_t width;         // N: columns of the dense operand (rows, when it is on the left)
  int64_t capacity;      // blocks there is room for
  bool transposed;       // a block lies as [in_block, out_block] and not [out_block, in_block]
  bool dense_left;       // dense and out lie as [width, length] and not [length, width]
  const void* data;      // [matrix_batch, capacity, bm, bk]; what sticks out of the matrix is 0
  BlockLists lists;
  const void* dense;  // [dense_batch, in_length, width], or [dense_batch, width, in_length]
  void* out;          // [batch, out_length, width], or [batch, width, out_length]
};

// blocks[e] = (left right) at rows of blocks rows[e] and columns of blocks columns[e]; 0 where either is none of them.
struct SampledParams {
  DType dtype;      // of left and right
  DType out_dtype;  // the same, or float32
  int64_t batch;
  int64_t left_batch;     // 1 or batch
  int64_t right_batch;    // 1 or batch
  int64_t list_batch;     // 1 or batch
  int64_t rows;           // M
  int64_t columns;        // K
  int64_t depth;          // L, contracted
  int64_t block_rows;     // bm
  int64_t block_columns;  // bk
  int64_t row_blocks;     // ceil(M / bm)
  int64_t column_blocks;  // ceil(K / bk)
  int64_t capacity;
  bool left_transposed;       // left lies as [L, M]
  bool right_transposed;      // right lies as [K, L]
  const void* left;           // [left_batch, M, L] or [left_batch, L, M]
  const void* right;          // [right_batch, L, K] or [right_batch, K, L]
  const int32_t* row_ids;     // [list_batch, capacity]
  const int32_t* column_ids;  // [list_batch, capacity]
  void* out;                  // [batch, capacity, bm, bk]; 0 beyond the matrix
};

}  // namespace jax_bsk::matmul
