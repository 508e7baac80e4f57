// What the CUDA decoding kernels can take. Every library tells Python, so that a program exported for CUDA where there
// is no CUDA library is judged, too; the refusal of decode/launch.h says the same of one problem.
#pragma once

#include <cstdint>

namespace jax_bsk::decode::cuda {

struct Limits {
  static constexpr int kMinComputeCapability = 80;  // major * 10 + minor
  static constexpr int64_t kHeadDimMultiple = 8;    // of head_dim and value_dim: rows are copied 16 bytes at a time
  static constexpr int64_t kMaxHeadDim = 256;       // of head_dim and value_dim
  static constexpr int64_t kMaxHeadDimF32 = 128;
  static constexpr int kFloat8ComputeCapability = 90;  // and no other: all others run the code of sm_80, without float8
  static constexpr int64_t kQuantisedMultiple = 16;    // the same for caches of one byte per element
  static constexpr int64_t kMaxQuantisedHeadDim = 128;
  static constexpr int64_t kMaxSequences = 2048;  // of all groups: a number for each is kept in shared memory
};

}  // namespace jax_bsk::decode::cuda
