// What the CUDA attention kernels can take. Every library tells Python, so that a program exported for CUDA where there
// is no CUDA library is judged, too; the refusals of attention/launch.h say the same of one problem.
#pragma once

#include "dtype.h"

namespace jax_bsk::attention::cuda {

struct Limits {
  static constexpr int kMinComputeCapability = 80;  // major * 10 + minor
  static constexpr DType kDTypes[] = {DType::kF16, DType::kBF16, DType::kF32};
  static constexpr int kHeadDimMultiple = 8;  // of head_dim and value_dim: rows are copied 16 bytes at a time
  static constexpr int kMaxHeadDim = 256;     // of head_dim and value_dim
  static constexpr int kBlocks[] = {64, 128};
};

}  // namespace jax_bsk::attention::cuda
