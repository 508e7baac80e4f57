// Tensor maps tell Hopper's copy engine about an array. They are made for each launch and passed by value: the arrays'
// addresses may differ from call to call.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace jax_bsk::device::sm90 {

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

// A dimension of an array that is not the innermost: its size, and the elements from one to the next.
struct MapDimension {
  int64_t size;
  int64_t stride;
};

// An array of 16-bit elements with `columns` next to each other, read or written in boxes of `width` columns (8, 16, 32
// or 64) x `rows` of the first x `depth` of the second of the other dimensions, swizzled over the bytes of a box's row
// (8 columns: not swizzled). Boxes may reach over the end of any dimension: zeros are read there and nothing is
// written. Strides are multiples of 8 elements.
inline bool MakeTensorMap(DType dtype, const void* data, int64_t columns, const MapDimension (&outer)[3], int rows,
                          int depth, CUtensorMap* map, int width = 64) {
  static const EncodeTiled encode = FindEncoder();
  if (encode == nullptr) return false;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const cuuint64_t sizes[4] = {size(columns), size(outer[0].size), size(outer[1].size), size(outer[2].size)};
  const cuuint64_t strides[3] = {size(outer[0].stride) * 2, size(outer[1].stride) * 2, size(outer[2].stride) * 2};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(width), static_cast<cuuint32_t>(rows),
                             static_cast<cuuint32_t>(depth), 1},
                   steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = width == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : width == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : width == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                   : CU_TENSOR_MAP_SWIZZLE_NONE;
  const auto type = dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// An array of any elements, whose `columns` and strides are counted in bytes: in boxes of 128 bytes x `rows` of the
// first of the other dimensions, for data that are read once. L2 fetches sectors of 128 bytes for them: with 256, as
// above, a cache of keys and values is read at 4.17 TB/s, with 128 at 4.54 (H200; boxes of 64 rows, 2,048 bytes apart).
inline bool MakeByteMap(const void* data, int64_t columns, const MapDimension (&outer)[3], int rows, CUtensorMap* map) {
  static const EncodeTiled encode = FindEncoder();
  if (encode == nullptr) return false;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const cuuint64_t sizes[4] = {size(columns), size(outer[0].size), size(outer[1].size), size(outer[2].size)};
  const cuuint64_t strides[3] = {size(outer[0].stride), size(outer[1].stride), size(outer[2].stride)};
  const cuuint32_t box[4] = {128, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_bsk::device::sm90
