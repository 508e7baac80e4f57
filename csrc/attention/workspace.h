// Sizes of the attention kernels' workspaces on CUDA. Host code without a CUDA header, compiled into every library: a
// program can be exported for CUDA where there is no CUDA library. What the backward needs, and what makes it fast, is
// in sm90/bwd_plan.h.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/sm90/bias_lines.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda {

// Whether a forward's queries are few, in one block of each head, and its keys many: then it takes decoding's kernel
// where it can (few_queries.h). With fewer keys there is nothing to divide.
inline bool FewQueries(const Shape& shape) {
  const int64_t group = shape.heads / (shape.kv_heads > 0 ? shape.kv_heads : 1);
  return shape.q_len <= shape.block_q && Product({shape.q_len, group}) <= 64 && shape.kv_len >= 1024;
}

// Parts of a row's keys there, and where their results lie: statistics (two floats) and outputs of each query, head and
// part.
struct FewQueriesLayout {
  int64_t parts = 1;
  int64_t dim;  // of an output
  int64_t out;  // offset in bytes
  int64_t bytes;

  explicit FewQueriesLayout(const Shape& shape) : dim(BlocksOf(shape.value_dim, 4) * 4) {
    // As many parts as leave the least to do for the CTA that has most, of 264 (two of each of 132 multiprocessors): a
    // part costs 1.2 steps of 64 keys beside its keys.
    constexpr int64_t kCtas = 264, kMostParts = 64;
    const int64_t tiles = shape.batch * shape.kv_heads, steps = BlocksOf(shape.kv_len, 64);
    double least = 0;
    for (int64_t count = 1; count <= kMostParts && count <= steps; ++count) {
      const double time = BlocksOf(Product({tiles, count}), kCtas) * (BlocksOf(steps, count) + 1.2);
      if (count == 1 || time < least) least = time, parts = count;
    }
    const int64_t rows = Product({shape.batch, shape.q_len, shape.heads, parts});
    out = BlocksOf(Product({8, rows}), 128) * 128;
    bytes = parts > 1 ? out + Product({4, rows, dim}) : 0;
  }
};

// Words of the forward's workspace: the lines of a bias by distance with so many tables (sm90/bias_lines.h), a counter
// that hands out tiles, and a list of tiles of 64 queries or more that are computed once more
// (sm90/fwd_exact_rows.cuh); or, of few queries, the parts.
inline int64_t ForwardWorkspace(const Shape& shape, int64_t distance_tables) {
  const int64_t tiles = 1 + shape.batch * shape.heads * BlocksOf(shape.q_len, 64);
  const int64_t words = sm90::BiasLineWords(shape, distance_tables) + tiles;
  const int64_t parts = FewQueries(shape) ? FewQueriesLayout(shape).bytes / 4 : 0;
  return words > parts ? words : parts;
}

}  // namespace jax_bsk::attention::cuda
