// Where the parts of rows lie in the workspace until they are merged. Host code without a CUDA header, compiled into
// every library: a program can be exported for CUDA where there is no CUDA library.
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode/params.h"
#include "sizes.h"

namespace jax_bsk::decode {

constexpr int64_t kStep = 64;  // keys of a step; parts are multiples of it

// A sequence is short if one tile of 16 rows has all its queries and the heads of a group; or the heads of one query,
// where these are more.
inline int64_t ShortQueries(const Shape& shape) {
  const int64_t group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
  return std::max<int64_t>(1, 16 / std::max<int64_t>(group, 1));
}

// Steps of a row at most.
inline int64_t MostSteps(const Shape& shape) {
  return BlocksOf(Product({shape.selected > 0 ? shape.selected : shape.max_pages, shape.page_size}), kStep);
}

// Parts of the short or the long sequences: for each row (a token's place, and a head) so many outputs and statistics.
struct PartialRows {
  int64_t parts;   // of a row at most; 1: rows are whole, and nothing is kept
  int64_t places;  // of tokens in a group

  int64_t Count(const Shape& shape) const {
    return parts > 1 ? Product({shape.groups, places, shape.heads, parts}) : 0;
  }
};

inline PartialRows ShortRows(const Shape& shape, int64_t part) {
  return {BlocksOf(MostSteps(shape), part / kStep), std::min(shape.tokens, Product({shape.seqs, ShortQueries(shape)}))};
}
inline PartialRows LongRows(const Shape& shape, int64_t part) {
  return {BlocksOf(MostSteps(shape), part / kStep), shape.tokens};
}

// Offsets in bytes: a flag for each group, then statistics (two floats each) and outputs of short and long rows.
struct PartialLayout {
  PartialRows short_rows, long_rows;
  int64_t short_stats, short_out, long_stats, long_out, bytes;

  static int64_t Dim(const Shape& shape) { return BlocksOf(shape.value_dim, 4) * 4; }  // of a row of output

  PartialLayout(const Shape& shape, int64_t short_part, int64_t long_part)
      : short_rows(ShortRows(shape, short_part)), long_rows(LongRows(shape, long_part)) {
    const int64_t dim = Dim(shape), short_count = short_rows.Count(shape), long_count = long_rows.Count(shape);
    short_stats = Aligned(4 * shape.groups);
    short_out = Aligned(short_stats + Product({8, short_count}));
    long_stats = Aligned(short_out + Product({4, short_count, dim}));
    long_out = Aligned(long_stats + Product({8, long_count}));
    bytes = Aligned(long_out + Product({4, long_count, dim}));
  }

 private:
  static int64_t Aligned(int64_t offset) { return BlocksOf(offset, 128) * 128; }
};

}  // namespace jax_bsk::decode
