// From params to a kernel: refusals, and the only switch over architecture, dtype and head dimension.
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "attention/gates.h"
#include "attention/launch.h"
#include "attention/prepare.h"
#include "attention/sm80/config.h"
#include "attention/sm90/config.h"
#include "device/host.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda {
namespace {

using device::CeilDiv;
using device::DeviceFacts;
using device::DeviceScope;
using device::ReadDevice;

using device::kMaxInt;

// Exists to be asked for: whether this build holds code for a device.
__global__ void ProbeKernel() {}

template <typename Params>
bool Plain(const Params& params) {
  return params.soft_cap == 0.f && params.scale > kLeastPlainScale;
}

bool Gated(const ForwardParams& params) { return params.gates != nullptr; }
bool Gated(const BackwardParams& params) { return params.dgates != nullptr; }

int64_t GateCount(const Shape& shape, const BlockList& list) { return shape.batch * shape.heads * list.capacity; }

// Hopper's kernels have no registers for gates beside what a soft cap needs.
template <typename Params>
bool HopperTakesGates(const Params& params) {
  return !Gated(params) || Plain(params);
}

// Tiles of 128 queries share keys and values between two warpgroups, but too few of them leave multiprocessors idle.
ForwardKernel ChooseKernel(const ForwardParams& params, const DeviceFacts& facts) {
  const Shape& shape = params.shape;
  if (facts.capability != 90 || params.dtype == DType::kF32 || !HopperTakesGates(params)) {
    return ForwardKernel::kPortable;
  }
  const int64_t tiles = shape.batch * shape.heads * CeilDiv(shape.q_len, 128);
  return shape.block_q == 128 && tiles >= facts.multiprocessors ? ForwardKernel::kRows128 : ForwardKernel::kRows64;
}

// Tiles of 128 keys need half the copies, but too few of them leave multiprocessors idle.
BackwardKernel ChooseKernel(const BackwardParams& params, const DeviceFacts& facts) {
  const Shape& shape = params.shape;
  if (facts.capability != 90 || params.dtype == DType::kF32 || !HopperTakesGates(params)) {
    return BackwardKernel::kPortable;
  }
  const int64_t tiles = shape.batch * shape.kv_heads * CeilDiv(shape.kv_len, 128);
  const bool large = shape.block_kv == 128 && std::max(shape.head_dim, shape.value_dim) <= 128;
  return large && tiles >= facts.multiprocessors ? BackwardKernel::kKeys128 : BackwardKernel::kKeys64;
}

// Calls visit(zero of the type, whether there are gates, as a constant).
template <typename Params, typename Result, typename Visit>
Result VisitPortableType(const Params& params, Result otherwise, Visit visit) {
  const auto with_type = [&](auto zero) -> Result {
    return Gated(params) ? visit(zero, std::true_type()) : visit(zero, std::false_type());
  };
  switch (params.dtype) {
    case DType::kBF16:
      return with_type(__nv_bfloat16{});
    case DType::kF16:
      return with_type(__half{});
    case DType::kF32:
      return with_type(float{});
    default:
      return otherwise;
  }
}

// Calls visit(Config{}) with the configuration of a portable kernel; what has no kernel gives `otherwise`.
template <typename Result, typename Visit>
Result VisitPortable(const ForwardParams& params, Result otherwise, Visit visit) {
  using sm80::ForwardConfig;
  const int64_t dim = std::max(params.shape.head_dim, params.shape.value_dim);
  const auto with_gates = [&](auto zero, auto gated) -> Result {
    using Element = decltype(zero);
    constexpr bool kGated = decltype(gated)::value;
    if constexpr (sizeof(Element) == 2) {
      if (params.shape.block_q % 128 == 0 && dim <= 128) {
        return dim <= 64 ? visit(ForwardConfig<Element, 64, 2, kGated>{})
                         : visit(ForwardConfig<Element, 128, 2, kGated>{});
      }
    }
    if (dim <= 64) return visit(ForwardConfig<Element, 64, 1, kGated>{});
    if (dim <= 128) return visit(ForwardConfig<Element, 128, 1, kGated>{});
    return visit(ForwardConfig<Element, 256, 1, kGated>{});
  };
  return VisitPortableType(params, otherwise, with_gates);
}

template <typename Result, typename Visit>
Result VisitPortable(const BackwardParams& params, Result otherwise, Visit visit) {
  using sm80::BackwardConfig;
  const int64_t dim = std::max(params.shape.head_dim, params.shape.value_dim);
  const auto with_gates = [&](auto zero, auto gated) -> Result {
    using Element = decltype(zero);
    constexpr bool kGated = decltype(gated)::value;
    if (dim <= 64) return visit(BackwardConfig<Element, 64, kGated>{});
    if (dim <= 128) return visit(BackwardConfig<Element, 128, kGated>{});
    return visit(BackwardConfig<Element, 256, kGated>{});
  };
  return VisitPortableType(params, otherwise, with_gates);
}

// Calls visit(zero of the type, integral constant of the columns) for a kernel of Hopper's.
template <typename Result, typename Visit>
Result VisitHopper(const Shape& shape, DType dtype, Result otherwise, Visit visit) {
  const int64_t dim = std::max(shape.head_dim, shape.value_dim);
  const auto with_type = [&](auto zero) -> Result {
    if (dim <= 64) return visit(zero, std::integral_constant<int, 64>{});
    if (dim <= 96) return visit(zero, std::integral_constant<int, 96>{});
    if (dim <= 128) return visit(zero, std::integral_constant<int, 128>{});
    return visit(zero, std::integral_constant<int, 256>{});
  };
  switch (dtype) {
    case DType::kBF16:
      return with_type(__nv_bfloat16{});
    case DType::kF16:
      return with_type(__half{});
    default:
      return otherwise;
  }
}

template <typename Result, typename Visit>
Result VisitHopperForward(const ForwardParams& params, ForwardKernel kernel, Result otherwise, Visit visit) {
  return VisitHopper(params.shape, params.dtype, otherwise, [&](auto zero, auto dim) -> Result {
    using Element = decltype(zero);
    using sm90::ForwardConfig;
    constexpr int kDim = decltype(dim)::value;
    if (Gated(params)) {  // and plain: HopperTakesGates
      return kernel == ForwardKernel::kRows128 ? visit(ForwardConfig<Element, kDim, 2, true, true>{})
                                               : visit(ForwardConfig<Element, kDim, 1, true, true>{});
    }
    if (kernel == ForwardKernel::kRows128) {
      return Plain(params) ? visit(ForwardConfig<Element, kDim, 2, true>{})
                           : visit(ForwardConfig<Element, kDim, 2, false>{});
    }
    return Plain(params) ? visit(ForwardConfig<Element, kDim, 1, true>{})
                         : visit(ForwardConfig<Element, kDim, 1, false>{});
  });
}

template <typename Result, typename Visit>
Result VisitHopperBackward(const BackwardParams& params, BackwardKernel kernel, Result otherwise, Visit visit) {
  return VisitHopper(params.shape, params.dtype, otherwise, [&](auto zero, auto dim) -> Result {
    using Element = decltype(zero);
    using sm90::BackwardConfig;
    constexpr int kDim = decltype(dim)::value;
    if constexpr (kDim <= 128) {
      if (kernel == BackwardKernel::kKeys128) {
        if (Gated(params)) return visit(BackwardConfig<Element, kDim, false, true, true>{});
        return Plain(params) ? visit(BackwardConfig<Element, kDim, false, true>{})
                             : visit(BackwardConfig<Element, kDim, false, false>{});
      }
    }
    if (Gated(params)) return visit(BackwardConfig<Element, kDim, true, true, true>{});
    return Plain(params) ? visit(BackwardConfig<Element, kDim, true, true>{})
                         : visit(BackwardConfig<Element, kDim, true, false>{});
  });
}

sm90::BackwardLayout Layout(const BackwardParams& params, int tile_kv, int64_t bytes) {
  return sm90::BackwardLayout(params.shape, params.rows, params.cols, tile_kv, GateSumCount(params), bytes);
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
  const int64_t tiles = CeilDiv(shape.q_len, sm80::kTile) + CeilDiv(shape.kv_len, sm80::kTile);
  if (Product({shape.batch, shape.heads, tiles}) > kMaxInt) {
    return "the CUDA kernels take fewer than 2^31 tiles (batch * heads * length / 64)";
  }
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return "the CUDA kernels need arrays aligned to 16 bytes";
  }
  return "";
}

// `words` of gates, or of what is kept for each.
std::string ListRefusal(const BitTiles& tiles, std::initializer_list<const BlockList*> lists, int64_t words) {
  bool too_large = tiles.count > kMaxInt || words > kMaxInt;
  for (const BlockList* list : lists) too_large |= list->capacity > kMaxInt || list->ids_end > kMaxInt;
  return too_large ? "the CUDA kernels take block lists, bit tiles and partial sums of gates (up to 16 each) of fewer "
                     "than 2^31 entries"
                   : "";
}

// Whether the device can run kernels of this build; `shared_bytes(facts)` is what the kernel for it would need.
template <typename SharedBytes>
std::string DeviceRefusal(int device, SharedBytes shared_bytes) {
  const DeviceScope scope(device);
  DeviceFacts facts;
  cudaError_t error = scope.error();
  if (error == cudaSuccess) error = ReadDevice(device, &facts);
  if (error != cudaSuccess) {
    return "CUDA device " + std::to_string(device) + " is not usable: " + cudaGetErrorString(error);
  }
  const std::string capability = std::to_string(facts.capability / 10) + "." + std::to_string(facts.capability % 10);
  if (facts.capability < Limits::kMinComputeCapability) {
    return "the CUDA kernels need compute capability 8.0 or newer, and the device has " + capability;
  }
  const std::optional<int> needed = shared_bytes(facts);
  if (!needed) return "there is no CUDA kernel for this combination of dtype and head size";
  if (*needed > facts.shared_bytes) {
    return "the CUDA kernel for this head size needs " + std::to_string(*needed) +
           " bytes of shared memory per block, and the device has " + std::to_string(facts.shared_bytes);
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
  const void* bits = params.tiles.count > 0 ? params.tiles.words : nullptr;
  std::string reason =
      ShapeRefusal(params.shape, params.dtype, {params.query, params.key, params.value, params.out, bits});
  if (reason.empty())
    reason = ListRefusal(params.tiles, {&params.rows}, Gated(params) ? GateCount(params.shape, params.rows) : 0);
  if (!reason.empty()) return reason;
  return DeviceRefusal(device, [&](const DeviceFacts& facts) {
    const ForwardKernel kernel = ChooseKernel(params, facts);
    if (kernel == ForwardKernel::kPortable) {
      return VisitPortable(params, std::optional<int>(), [](auto config) -> std::optional<int> {
        return sm80::ForwardSharedBytes<decltype(config)>();
      });
    }
    return VisitHopperForward(params, kernel, std::optional<int>(), [](auto config) -> std::optional<int> {
      return sm90::ForwardSharedBytes<decltype(config)>();
    });
  });
}

std::string BackwardRefusal(const BackwardParams& params, int device) {
  std::string reason =
      ShapeRefusal(params.shape, params.dtype,
                   {params.dout, params.query, params.key, params.value, params.dquery, params.dkey, params.dvalue});
  if (reason.empty())
    reason = ListRefusal(params.tiles, {&params.rows, &params.cols},
                         std::max(GateSumCount(params), Gated(params) ? GateCount(params.shape, params.rows) : 0));
  const int64_t group = params.shape.heads / std::max<int64_t>(params.shape.kv_heads, 1);
  const int64_t entry_pieces = params.shape.block_q / 64 * (params.shape.block_kv / 64);
  if (reason.empty() && Product({group, params.cols.capacity, entry_pieces}) > kMaxInt) {
    reason = "the CUDA backward takes lists of fewer than 2^31 tiles (entries * block sizes / 64) in a group of heads";
  }
  if (!reason.empty()) return reason;
  return DeviceRefusal(device, [&](const DeviceFacts& facts) -> std::optional<int> {
    const BackwardKernel kernel = ChooseKernel(params, facts);
    if (kernel == BackwardKernel::kPortable) {
      return VisitPortable(params, std::optional<int>(), [](auto config) -> std::optional<int> {
        return sm80::BackwardSharedBytes<decltype(config)>();
      });
    }
    return VisitHopperBackward(params, kernel, std::optional<int>(), [](auto config) -> std::optional<int> {
      return sm90::BackwardSharedBytes<decltype(config)>();
    });
  });
}

cudaError_t LaunchForward(const ForwardParams& params, int32_t* workspace, int device, cudaStream_t stream,
                          ForwardKernel kernel) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads * shape.q_len == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = ReadDevice(device, &facts); error != cudaSuccess) return error;
  if (kernel == ForwardKernel::kAutomatic || !HopperTakesGates(params)) kernel = ChooseKernel(params, facts);
  if (kernel == ForwardKernel::kPortable) {
    return VisitPortable(params, cudaErrorNotSupported,
                         [&](auto config) { return sm80::LaunchForward<decltype(config)>(params, stream); });
  }
  return VisitHopperForward(params, kernel, cudaErrorNotSupported, [&](auto config) {
    return sm90::LaunchForward<decltype(config)>(params, workspace, facts.multiprocessors, stream);
  });
}

int64_t BackwardWorkspace(const BackwardParams& params) { return Layout(params, 64, 0).least_bytes; }

namespace {

// Everything but dgates, of which the sums are left in the workspace.
cudaError_t LaunchGradients(const BackwardParams& params, const sm90::BackwardLayout& layout, int32_t* words,
                            int multiprocessors, cudaStream_t stream, BackwardKernel kernel) {
  const Shape& shape = params.shape;
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(words + offset); };
  const auto portable = [&](const sm80::BackwardMarks& marks) {
    return VisitPortable(params, cudaErrorNotSupported, [&](auto config) {
      return sm80::LaunchBackward<decltype(config)>(params, marks, floats(layout.gate_sums_offset), stream);
    });
  };
  if (kernel == BackwardKernel::kPortable || shape.q_len == 0 || shape.kv_len == 0) return portable({});

  // Preparation; the gradients; and what could not be exact there once more by the portable kernels.
  const Preparation preparation{words,
                                layout.matches_offset,
                                reinterpret_cast<int2*>(words + layout.matches_offset),
                                floats(layout.statistics_offset),
                                words + layout.order_offset,
                                static_cast<int>(layout.slices),
                                static_cast<int>(layout.slice_heads),
                                static_cast<int>(layout.key_tiles),
                                kernel == BackwardKernel::kKeys128 ? 1 : static_cast<int>(shape.block_kv / 64)};
  cudaError_t error = LaunchPrepare(params, preparation, stream);
  if (error != cudaSuccess) return error;
  error = VisitHopperBackward(params, kernel, cudaErrorNotSupported, [&](auto config) {
    return sm90::LaunchBackward<decltype(config)>(params, layout, words, multiprocessors, stream);
  });
  if (error != cudaSuccess) return error;
  return portable({words + layout.inexact_queries_offset, words + layout.inexact_keys_offset, multiprocessors});
}

}  // namespace

cudaError_t LaunchBackward(const BackwardParams& params, void* workspace, int64_t bytes, int device,
                           cudaStream_t stream, BackwardKernel kernel) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (cudaError_t error = ReadDevice(device, &facts); error != cudaSuccess) return error;
  if (kernel == BackwardKernel::kAutomatic || !HopperTakesGates(params)) kernel = ChooseKernel(params, facts);
  const sm90::BackwardLayout layout = Layout(params, kernel == BackwardKernel::kKeys128 ? 128 : 64, bytes);
  auto* words = static_cast<int32_t*>(workspace);
  auto* gate_sums = reinterpret_cast<float*>(words + layout.gate_sums_offset);

  cudaError_t error = ClearGateSums(params, gate_sums, stream);
  if (error != cudaSuccess) return error;
  error = LaunchGradients(params, layout, words, facts.multiprocessors, stream, kernel);
  if (error != cudaSuccess) return error;
  return LaunchSumGates(params, gate_sums, stream);
}

}  // namespace jax_bsk::attention::cuda
