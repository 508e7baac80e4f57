// Plans of the products' kernels that depend on the lists, made on the device before they start.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "matmul/params.h"

namespace jax_bsk::matmul::cuda {

// order[b] = the rows of out blocks (of `blocks_per_row` each), the longest first; *work_counter = 0. Neither reads
// what lies outside the lists, whatever these say.
cudaError_t LaunchOrderRows(const ProductParams& params, int rows, int blocks_per_row, int32_t* work_counter,
                            int32_t* order, cudaStream_t stream);

// items[b] = groups of up to `entries` (4 at most) neighbouring entries of one row, the larger ones first: the first |
// (their number - 1) << shift; count[b] = how many items there are. sizes[b] is room for a word an entry.
cudaError_t LaunchGroupEntries(const SampledParams& params, int entries, int shift, int32_t* count, int32_t* items,
                               int32_t* sizes, cudaStream_t stream);

}  // namespace jax_bsk::matmul::cuda
