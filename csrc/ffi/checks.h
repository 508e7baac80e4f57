// Checks every handler makes of the buffers XLA hands it. Python's abstract evaluation has the friendly messages; these
// are the last line before a pointer is followed, because a plain custom call trusts whatever shapes it was given.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"
#include "sizes.h"
#include "version.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bsk {

namespace ffi = xla::ffi;

using Operand = ffi::AnyBuffer;
using Output = ffi::Result<ffi::AnyBuffer>;

inline std::string ShapeString(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// An extent a dimension may have: exactly `size`, or also 1 when the array may be shared along it.
struct Extent {
  int64_t size;
  bool or_one = false;
};

// The error for a call that is refused, for a reason; success without one.
inline ffi::Error Refusal(const std::string& reason) {
  return reason.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument("jax_bsk: " + reason);
}

// No machine has an array so large; but one without elements may have any other sizes, and handlers and kernels
// multiply them. With this bound, and blocks no larger than a kernel takes, the products of an array's sizes and a few
// constants stay below 2^63.
constexpr int64_t kMaxElements = int64_t{1} << 48;

inline ffi::Error CheckSize(const char* name, const ffi::AnyBuffer& buffer) {
  int64_t elements = 1;
  for (const int64_t size : buffer.dimensions()) elements = Product({elements, std::max<int64_t>(size, 1)});
  if (elements <= kMaxElements) return ffi::Error::Success();
  return Refusal(std::string(name) + " has shape " + ShapeString(buffer.dimensions()) +
                 ", whose sizes other than 0 have a product beyond 2^48");
}

// Dimensions with all but the last `trailing` merged into the first: a call under `vmap` carries leading dimensions of
// its own, and its buffers are dense and row-major, so the kernels see one batch.
inline std::vector<int64_t> MergeLeading(const ffi::AnyBuffer& buffer, size_t trailing) {
  auto dims = buffer.dimensions();
  if (dims.size() <= trailing) return std::vector<int64_t>(dims.begin(), dims.end());
  std::vector<int64_t> merged{1};
  const size_t lead = dims.size() - trailing;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i < lead) {
      merged[0] = Product({merged[0], dims[i]});
    } else {
      merged.push_back(dims[i]);
    }
  }
  return merged;
}

// The same, for arrays that have a batch under `vmap` alone: 1 where there is no leading dimension.
inline std::vector<int64_t> WithBatch(const ffi::AnyBuffer& buffer, size_t trailing) {
  std::vector<int64_t> dims = MergeLeading(buffer, trailing);
  if (dims.size() == trailing) dims.insert(dims.begin(), 1);
  return dims;
}

// Compares `dims`, the buffer's as one of the above has them, with what is expected.
inline ffi::Error CheckDims(const char* name, const ffi::AnyBuffer& buffer, const std::vector<int64_t>& dims,
                            std::initializer_list<Extent> expected) {
  if (ffi::Error error = CheckSize(name, buffer); error.failure()) return error;
  bool good = dims.size() == expected.size();
  size_t i = 0;
  std::string wanted = "[";
  for (const Extent& extent : expected) {
    if (good) good = dims[i] == extent.size || (extent.or_one && dims[i] == 1);
    wanted +=
        (i ? ", " : "") + std::string(extent.or_one && extent.size != 1 ? "1|" : "") + std::to_string(extent.size);
    ++i;
  }
  if (good) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_bsk: " + std::string(name) + " has shape " +
                                     ShapeString(buffer.dimensions()) + ", expected " + wanted + "]");
}

// Compares the dimensions, leading ones merged, with what is expected.
inline ffi::Error CheckShape(const char* name, const ffi::AnyBuffer& buffer, std::initializer_list<Extent> expected) {
  return CheckDims(name, buffer, MergeLeading(buffer, expected.size() - 1), expected);
}

// The same, the batch being 1 where there is none.
inline ffi::Error CheckBatched(const char* name, const ffi::AnyBuffer& buffer, std::initializer_list<Extent> expected) {
  return CheckDims(name, buffer, WithBatch(buffer, expected.size() - 1), expected);
}

inline ffi::Error CheckRank(const char* name, const ffi::AnyBuffer& buffer, size_t rank) {
  if (buffer.dimensions().size() >= rank) return CheckSize(name, buffer);
  return ffi::Error::InvalidArgument("jax_bsk: " + std::string(name) + " has shape " +
                                     ShapeString(buffer.dimensions()) + ", expected rank " + std::to_string(rank) +
                                     " or more");
}

inline ffi::Error CheckType(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type) {
  if (buffer.element_type() == type) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_bsk: " + std::string(name) + " has element type " +
                                     std::to_string(static_cast<int>(buffer.element_type())) + ", expected " +
                                     std::to_string(static_cast<int>(type)));
}

inline ffi::Error ReadDType(const char* name, const ffi::AnyBuffer& buffer, DType* dtype) {
  switch (buffer.element_type()) {
    case ffi::F16:
      *dtype = DType::kF16;
      return ffi::Error::Success();
    case ffi::BF16:
      *dtype = DType::kBF16;
      return ffi::Error::Success();
    case ffi::F32:
      *dtype = DType::kF32;
      return ffi::Error::Success();
    case ffi::F64:
      *dtype = DType::kF64;
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("jax_bsk: " + std::string(name) +
                                         " must be float16, bfloat16, float32 or float64");
  }
}

// Executables may come from a cache that an older version of the package filled.
inline ffi::Error CheckVersion(std::string_view version) {
  if (version == JAX_BSK_VERSION) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_bsk: the call was compiled for version " + std::string(version) +
                                     ", the loaded library is version " JAX_BSK_VERSION "; trace and compile again");
}

// Returns from the calling handler with the first failure of a list of checks.
#define JAX_BSK_RETURN_IF_ERROR(expression)                               \
  if (ffi::Error jax_bsk_error = (expression); jax_bsk_error.failure()) { \
    return jax_bsk_error;                                                 \
  }

}  // namespace jax_bsk
