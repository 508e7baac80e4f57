// What the CUDA products can take, as attention/cuda_limits.h; the refusals of matmul/launch.h say the same of one
// problem.
#pragma once

namespace jax_bsk::matmul::cuda {

struct Limits {
  static constexpr int kComputeCapability = 90;  // major * 10 + minor: Hopper alone
  static constexpr int kBlocks[] = {64, 128};
  static constexpr int kNarrowWidth = 128;  // columns up to which a product takes the kernel of few columns
  static constexpr int kMultiple = 8;  // of the innermost dimension of every array: rows are copied 16 bytes at a time
};

}  // namespace jax_bsk::matmul::cuda
