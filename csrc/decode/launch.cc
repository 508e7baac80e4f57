// From params to a launch of the variant that has their element type and head size.
#include "decode/launch.h"

#include <algorithm>

#include "decode/cuda/config.h"
#include "decode/variants.h"
#include "device/host.h"

namespace jax_bsk::decode::cuda {
namespace {

using device::DeviceFacts;
using device::DeviceScope;
using device::Divisor;
using device::kMaxInt;

const Variant* Choose(const ForwardParams& params) {
  return Choose(Keys::kPaged, params.dtype, params.cache, std::max(params.shape.head_dim, params.shape.value_dim));
}

int64_t Sequences(const Shape& shape) { return Product({shape.groups, shape.seqs}); }

std::string ShapeRefusal(const ForwardParams& params) {
  const Shape& shape = params.shape;
  const int64_t multiple = params.cache == CacheType::kSame ? Limits::kHeadDimMultiple : Limits::kQuantisedMultiple;
  if (shape.head_dim % multiple != 0 || shape.value_dim % multiple != 0) {
    return "the CUDA decoding kernels take head sizes that are multiples of " + std::to_string(multiple);
  }
  if (Sequences(shape) > Limits::kMaxSequences) {
    return "the CUDA decoding kernels take " + std::to_string(Limits::kMaxSequences) + " sequences at most, not " +
           std::to_string(Sequences(shape));
  }
  if (shape.seqs < 1) return "the CUDA decoding kernels take one sequence or more";
  const int64_t rows = Product({shape.groups, shape.tokens, shape.heads});
  // A sequence has at most so many units, and no two sequences have a token in common but for empty parts.
  const int64_t parts = BlocksOf(MostSteps(shape), std::min(params.short_part, params.long_part) / kStep);
  if (rows > kMaxInt || Product({shape.tokens + shape.seqs, shape.heads, shape.groups, parts}) > kMaxInt ||
      Product({shape.groups, shape.pages, shape.page_size}) > kMaxInt ||
      shape.heads * std::max(shape.head_dim, shape.value_dim) > kMaxInt) {
    return "the CUDA decoding kernels take fewer than 2^31 rows (tokens * heads), parts of rows, and positions of the "
           "cache";
  }
  for (const void* pointer :
       {params.query, params.key.first, params.value.first, static_cast<const void*>(params.out)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return "the CUDA kernels need arrays aligned to 16 bytes";
  }
  return "";
}

KernelParams ForKernels(const ForwardParams& params, char* workspace) {
  const Shape& shape = params.shape;
  const auto number = [](int64_t size) { return static_cast<int>(size); };
  const PartialLayout layout(shape, params.short_part, params.long_part);
  KernelParams result{};
  static_cast<ForwardParams&>(result) = params;
  result.tokens = number(shape.tokens), result.seqs = number(shape.seqs), result.sequences = number(Sequences(shape));
  result.pages = number(shape.pages), result.max_pages = number(shape.max_pages);
  result.selected = number(shape.selected);
  result.kv_heads = number(shape.kv_heads), result.group_heads = number(shape.heads / shape.kv_heads);
  result.dim = number(shape.head_dim), result.value_dim = number(shape.value_dim);
  result.partial_dim = number(PartialLayout::Dim(shape));
  result.sink_head_stride = 1;
  result.by_seqs = Divisor(std::max<int64_t>(shape.seqs, 1)), result.by_page_size = Divisor(shape.page_size);
  result.by_kv_heads = Divisor(shape.kv_heads), result.by_group_heads = Divisor(result.group_heads);
  result.by_short_part = Divisor(params.short_part / kStep), result.by_long_part = Divisor(params.long_part / kStep);
  result.short_parts = number(layout.short_rows.parts), result.long_parts = number(layout.long_rows.parts);
  result.short_places = number(layout.short_rows.places), result.short_queries = number(ShortQueries(shape));
  result.bad_groups = reinterpret_cast<int32_t*>(workspace);
  result.short_stats = reinterpret_cast<float2*>(workspace + layout.short_stats);
  result.short_out = reinterpret_cast<float*>(workspace + layout.short_out);
  result.long_stats = reinterpret_cast<float2*>(workspace + layout.long_stats);
  result.long_out = reinterpret_cast<float*>(workspace + layout.long_out);
  return result;
}

}  // namespace

std::string ForwardRefusal(const ForwardParams& params, int device) {
  if (std::string reason = ShapeRefusal(params); !reason.empty()) return reason;
  const DeviceScope scope(device);
  DeviceFacts facts;
  cudaError_t error = scope.error();
  if (error == cudaSuccess) error = device::ReadDevice(device, &facts);
  if (error != cudaSuccess) {
    return "CUDA device " + std::to_string(device) + " is not usable: " + cudaGetErrorString(error);
  }
  if (facts.capability < Limits::kMinComputeCapability) {
    return "the CUDA decoding kernels need compute capability 8.0 or newer";
  }
  if (params.cache == CacheType::kE4M3 && facts.capability != Limits::kFloat8ComputeCapability) {
    return "the CUDA decoding kernels take a cache of float8 on compute capability 9.0 alone";
  }
  const Variant* variant = Choose(params);
  if (variant == nullptr) return "there is no CUDA decoding kernel for this combination of dtype and head size";
  const int64_t bytes = variant->shared_bytes + 4 * Sequences(params.shape);
  if (bytes > facts.shared_bytes) {
    return "the CUDA decoding kernel for this head size needs " + std::to_string(bytes) +
           " bytes of shared memory per block, and the device has " + std::to_string(facts.shared_bytes);
  }
  return "";
}

cudaError_t LaunchForward(const ForwardParams& params, void* workspace, int device, cudaStream_t stream) {
  const Shape& shape = params.shape;
  if (shape.groups * shape.tokens * shape.heads * shape.value_dim == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;
  const Variant* variant = Choose(params);
  if (variant == nullptr) return cudaErrorNotSupported;
  return variant->launch(ForKernels(params, static_cast<char*>(workspace)), facts, stream);
}

}  // namespace jax_bsk::decode::cuda
