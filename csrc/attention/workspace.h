// Sizes of the attention kernels' workspaces on CUDA. Host code without a CUDA header, compiled into every library: a
// program can be exported for CUDA where there is no CUDA library. What the backward needs, and what makes it fast, is
// in sm90/bwd_plan.h.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda {

// Words of the forward's workspace: a counter that hands out tiles, and a list of tiles of 64 queries or more that are
// computed once more (sm90/fwd_exact_rows.cuh).
inline int64_t ForwardWorkspace(const Shape& shape) {
  return 1 + shape.batch * shape.heads * BlocksOf(shape.q_len, 64);
}

}  // namespace jax_bsk::attention::cuda
