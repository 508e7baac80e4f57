// Size of the workspace for a choice of key blocks on CUDA; host code without a CUDA header, compiled into every
// library.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lists/params.h"

namespace jax_bsk::lists::cuda {

// Entries that a row may have.
inline int64_t RowCapacity(const ChooseParams& params) { return std::min(params.width * params.group, params.blocks); }

// Words of the workspace: for each row two counts, and two words for each entry that it may have.
inline int64_t ChooseWorkspace(const ChooseParams& params) {
  return 2 * params.tables * params.rows * (1 + RowCapacity(params));
}

}  // namespace jax_bsk::lists::cuda
