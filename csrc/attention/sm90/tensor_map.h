// Tensor maps: what the copy engine knows of an array. Made for each launch and passed by value: the arrays' addresses
// may differ from call to call.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "attention/params.h"
#include "attention/sm90/config.h"

namespace jax_bsk::attention::cuda::sm90 {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, asked for at run time: the library must load where there is no driver.
inline EncodeTiled FindEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                      : nullptr;
}

// A [batch, length, heads, dim] array of 16-bit elements, read or written in boxes of `rows` positions x 64 columns of
// one head, swizzled over 128 bytes. Coordinates are (column, position, head, batch). Boxes may reach over the end of
// any dimension: zeros are read there and nothing is written.
inline bool MakeTensorMap(DType dtype, const void* data, int64_t batch, int64_t length, int64_t heads, int64_t dim,
                          int rows, CUtensorMap* map) {
  static const EncodeTiled encode = FindEncoder();
  if (encode == nullptr) return false;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const cuuint64_t sizes[4] = {size(dim), size(length), size(heads), size(batch)};
  const cuuint64_t strides[3] = {sizes[2] * sizes[0] * 2, sizes[0] * 2, sizes[1] * sizes[2] * sizes[0] * 2};  // bytes
  const cuuint32_t box[4] = {kChunk, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_bsk::attention::cuda::sm90
