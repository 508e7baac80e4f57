// Sizes of the products' workspaces on CUDA, in words; host code without a CUDA header, compiled into every library.
#pragma once

#include <cstdint>

#include "matmul/params.h"

namespace jax_bsk::matmul::cuda {

// The counter that hands out tiles, and the order of rows. (A product of few columns uses neither.)
inline int64_t ProductWorkspace(const ProductParams& params) { return 1 + params.matrix_batch * params.out_blocks; }

// The number of items, the items, and how large the item is that begins at each entry.
inline int64_t SampledWorkspace(const SampledParams& params) { return params.list_batch * (1 + 2 * params.capacity); }

}  // namespace jax_bsk::matmul::cuda
