// The limits of the CUDA kernels as facts for Python, compiled into every library.
#include "attention/cuda_limits.h"

#include <iterator>

#include "decode/cuda_limits.h"
#include "matmul/cuda_limits.h"
#include "registrations.h"

namespace jax_bsk {

Facts attention::CudaLimits() {
  using cuda::Limits;
  return {{"dtypes", std::vector<std::string>{"float16", "bfloat16", "float32"}},
          {"min_compute_capability", int64_t{Limits::kMinComputeCapability}},
          {"head_dim_multiple", int64_t{Limits::kHeadDimMultiple}},
          {"max_head_dim", int64_t{Limits::kMaxHeadDim}},
          {"blocks", std::vector<int64_t>(std::begin(Limits::kBlocks), std::end(Limits::kBlocks))}};
}

Facts decode::CudaLimits() {
  using cuda::Limits;
  return {{"decode_compute_capability", int64_t{Limits::kMinComputeCapability}},
          {"decode_dtypes", std::vector<std::string>{"float16", "bfloat16", "float32"}},
          {"decode_head_dim_multiple", Limits::kHeadDimMultiple},
          {"decode_max_head_dim", Limits::kMaxHeadDim},
          {"decode_max_head_dim_float32", Limits::kMaxHeadDimF32},
          {"decode_cache_dtypes", std::vector<std::string>{"float8_e4m3fn", "int8"}},
          {"decode_quantised_head_dim_multiple", Limits::kQuantisedMultiple},
          {"decode_quantised_max_head_dim", Limits::kMaxQuantisedHeadDim},
          {"decode_max_sequences", Limits::kMaxSequences}};
}

Facts matmul::CudaLimits() {
  using cuda::Limits;
  return {{"matmul_dtypes", std::vector<std::string>{"float16", "bfloat16"}},
          {"matmul_compute_capability", int64_t{Limits::kComputeCapability}},
          {"matmul_narrow_width", int64_t{Limits::kNarrowWidth}},
          {"matmul_multiple", int64_t{Limits::kMultiple}},
          {"matmul_blocks", std::vector<int64_t>(std::begin(Limits::kBlocks), std::end(Limits::kBlocks))}};
}

}  // namespace jax_bsk
