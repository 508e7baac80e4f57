// From params to a kernel: refusals, and the only switch over architecture, dtype and head dimension.
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>

#include "attention/launch.h"
#include "attention/sm80/config.h"

namespace jax_bsk::attention::cuda {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Exists to be asked for: whether this build holds code for a device.
__global__ void ProbeKernel() {}

// Makes a device current for a scope; attributes and launches apply to the current one.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a kernel is chosen by.
struct Choice {
  DType dtype;
  int dim;        // of rows in shared memory
  int row_tiles;  // of the forward, see ForwardConfig
};

Choice Choose(const Shape& shape, DType dtype) {
  const int64_t dim = std::max(shape.head_dim, shape.value_dim);
  Choice choice{dtype, dim <= 64 ? 64 : dim <= 128 ? 128 : 256, 1};
  if (shape.block_q % 128 == 0 && choice.dim <= 128 && dtype != DType::kF32) choice.row_tiles = 2;
  return choice;
}

// Calls visit(Config{}) with the configuration of a choice; what has no kernel gives `otherwise`.
template <typename Result, typename Visit>
Result VisitForward(const Choice& choice, Result otherwise, Visit visit) {
  using sm80::ForwardConfig;
  const auto sixteen_bits = [&](auto zero) -> Result {
    using Element = decltype(zero);
    if (choice.dim == 64) {
      return choice.row_tiles == 2 ? visit(ForwardConfig<Element, 64, 2>{}) : visit(ForwardConfig<Element, 64, 1>{});
    }
    if (choice.dim == 128) {
      return choice.row_tiles == 2 ? visit(ForwardConfig<Element, 128, 2>{}) : visit(ForwardConfig<Element, 128, 1>{});
    }
    return visit(ForwardConfig<Element, 256, 1>{});
  };
  switch (choice.dtype) {
    case DType::kBF16:
      return sixteen_bits(__nv_bfloat16{});
    case DType::kF16:
      return sixteen_bits(__half{});
    case DType::kF32:
      if (choice.dim == 64) return visit(ForwardConfig<float, 64, 1>{});
      if (choice.dim == 128) return visit(ForwardConfig<float, 128, 1>{});
      return visit(ForwardConfig<float, 256, 1>{});
    default:
      return otherwise;
  }
}

template <typename Result, typename Visit>
Result VisitBackward(const Choice& choice, Result otherwise, Visit visit) {
  using sm80::BackwardConfig;
  const auto with_dtype = [&](auto zero) -> Result {
    using Element = decltype(zero);
    if (choice.dim == 64) return visit(BackwardConfig<Element, 64>{});
    if (choice.dim == 128) return visit(BackwardConfig<Element, 128>{});
    return visit(BackwardConfig<Element, 256>{});
  };
  switch (choice.dtype) {
    case DType::kBF16:
      return with_dtype(__nv_bfloat16{});
    case DType::kF16:
      return with_dtype(__half{});
    case DType::kF32:
      return with_dtype(float{});
    default:
      return otherwise;
  }
}

// What forward and backward refuse alike.
std::string ShapeRefusal(const Shape& shape, DType dtype, std::initializer_list<const void*> pointers) {
  if (dtype == DType::kF64) return "the CUDA kernels take float16, bfloat16 and float32, not float64";
  for (const int64_t dim : {shape.head_dim, shape.value_dim}) {
    if (dim < Limits::kHeadDimMultiple || dim % Limits::kHeadDimMultiple != 0 || dim > Limits::kMaxHeadDim) {
      return "the CUDA kernels take head sizes that are multiples of " + std::to_string(Limits::kHeadDimMultiple) +
             " up to " + std::to_string(Limits::kMaxHeadDim) + ", not " + std::to_string(dim);
    }
  }
  for (const int64_t block : {shape.block_q, shape.block_kv}) {
    if (block != 64 && block != 128) {
      return "the CUDA kernels take blocks of 64 or 128, not " + std::to_string(block);
    }
  }
  // Positions are 32-bit in the kernels; offsets in memory are 64-bit.
  if (std::max(shape.q_len, shape.kv_len) > kMaxInt - 256 ||
      shape.heads * std::max(shape.head_dim, shape.value_dim) > kMaxInt) {
    return "the CUDA kernels take lengths, and heads times head size, below 2^31";
  }
  if (shape.batch * shape.heads * (CeilDiv(shape.q_len, sm80::kTile) + CeilDiv(shape.kv_len, sm80::kTile)) > kMaxInt) {
    return "the CUDA kernels take fewer than 2^31 tiles (batch * heads * length / 64)";
  }
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return "the CUDA kernels need arrays aligned to 16 bytes";
  }
  return "";
}

std::string ListRefusal(const BitTiles& tiles, std::initializer_list<const BlockList*> lists) {
  bool too_large = tiles.count > kMaxInt;
  for (const BlockList* list : lists) too_large |= list->capacity > kMaxInt || list->ids_end > kMaxInt;
  return too_large ? "the CUDA kernels take block lists and bit tiles of fewer than 2^31 entries" : "";
}

// Whether the device can run kernels of this build with so much shared memory.
std::string DeviceRefusal(int device, std::optional<int> shared_bytes) {
  const DeviceScope scope(device);
  int major = 0, minor = 0, available = 0;
  cudaError_t error = scope.error();
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    return "CUDA device " + std::to_string(device) + " is not usable: " + cudaGetErrorString(error);
  }
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major * 10 + minor < Limits::kMinComputeCapability) {
    return "the CUDA kernels need compute capability 8.0 or newer, and the device has " + capability;
  }
  if (!shared_bytes) return "there is no CUDA kernel for this combination of dtype and head size";
  if (*shared_bytes > available) {
    return "the CUDA kernel for this head size needs " + std::to_string(*shared_bytes) +
           " bytes of shared memory per block, and the device has " + std::to_string(available);
  }
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, ProbeKernel) != cudaSuccess) {
    cudaGetLastError();  // not an error of the caller's
    return "this build holds no code for compute capability " + capability;
  }
  return "";
}

}  // namespace

std::string ForwardRefusal(const ForwardParams& params, int device) {
  std::string reason = ShapeRefusal(params.shape, params.dtype, {params.query, params.key, params.value, params.out});
  if (reason.empty()) reason = ListRefusal(params.tiles, {&params.rows});
  if (!reason.empty()) return reason;
  const auto bytes =
      VisitForward(Choose(params.shape, params.dtype), std::optional<int>(),
                   [](auto config) -> std::optional<int> { return sm80::ForwardSharedBytes<decltype(config)>(); });
  return DeviceRefusal(device, bytes);
}

std::string BackwardRefusal(const BackwardParams& params, int device) {
  std::string reason =
      ShapeRefusal(params.shape, params.dtype,
                   {params.dout, params.query, params.key, params.value, params.dquery, params.dkey, params.dvalue});
  if (reason.empty()) reason = ListRefusal(params.tiles, {&params.rows, &params.cols});
  if (!reason.empty()) return reason;
  const auto bytes =
      VisitBackward(Choose(params.shape, params.dtype), std::optional<int>(),
                    [](auto config) -> std::optional<int> { return sm80::BackwardSharedBytes<decltype(config)>(); });
  return DeviceRefusal(device, bytes);
}

cudaError_t LaunchForward(const ForwardParams& params, int device, cudaStream_t stream) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads * shape.q_len == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  return VisitForward(Choose(shape, params.dtype), cudaErrorNotSupported,
                      [&](auto config) { return sm80::LaunchForward<decltype(config)>(params, stream); });
}

cudaError_t LaunchBackward(const BackwardParams& params, int device, cudaStream_t stream) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  return VisitBackward(Choose(shape, params.dtype), cudaErrorNotSupported,
                       [&](auto config) { return sm80::LaunchBackward<decltype(config)>(params, stream); });
}

}  // namespace jax_bsk::attention::cuda
