// Tensor maps of attention's arrays.
#pragma once

#include "attention/params.h"
#include "attention/sm90/config.h"
#include "device/tensor_map.h"

namespace jax_bsk::attention::cuda::sm90 {

// A [batch, length, heads, dim] array of 16-bit elements, read or written in boxes of `rows` positions x 64 columns of
// one head. Coordinates are (column, position, head, batch).
inline bool MakeTensorMap(DType dtype, const void* data, int64_t batch, int64_t length, int64_t heads, int64_t dim,
                          int rows, CUtensorMap* map) {
  static_assert(kChunk == 64);
  const int64_t row = std::max<int64_t>(heads, 1) * std::max<int64_t>(dim, 1);
  return device::sm90::MakeTensorMap(
      dtype, data, dim, {{length, row}, {heads, dim}, {batch, std::max<int64_t>(length, 1) * row}}, rows, 1, map);
}

}  // namespace jax_bsk::attention::cuda::sm90
