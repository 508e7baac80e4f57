// What the kernels cannot take.
#include <algorithm>
#include <initializer_list>
#include <string>

#include "attention/bias_gradient.h"
#include "attention/gates.h"
#include "attention/launch.h"
#include "attention/variants.h"
#include "device/host.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda {
namespace {

using device::CeilDiv;
using device::DeviceFacts;
using device::DeviceScope;
using device::kMaxInt;

constexpr const char* kNoFloat64 = "the CUDA kernels take float16, bfloat16 and float32, not float64";
constexpr const char* kTooLarge = "the CUDA kernels take lengths, and heads times head size, below 2^31";

// What forward and backward refuse alike.
std::string ShapeRefusal(const Shape& shape, DType dtype, std::initializer_list<const void*> pointers) {
  if (dtype == DType::kF64) return kNoFloat64;
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
    return kTooLarge;
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

std::string BiasRefusal(const Bias& bias) {
  return bias.tiles_count > kMaxInt ? "the CUDA kernels take fewer than 2^31 tiles of a bias" : "";
}

// Reads the device's facts and refuses it if none of the kernels of this build can run there.
std::string FindDevice(int device, DeviceFacts* facts) {
  const DeviceScope scope(device);
  cudaError_t error = scope.error();
  if (error == cudaSuccess) error = device::ReadDevice(device, facts);
  if (error != cudaSuccess) {
    return "CUDA device " + std::to_string(device) + " is not usable: " + cudaGetErrorString(error);
  }
  const std::string capability = std::to_string(facts->capability / 10) + "." + std::to_string(facts->capability % 10);
  if (facts->capability < Limits::kMinComputeCapability) {
    return "the CUDA kernels need compute capability 8.0 or newer, and the device has " + capability;
  }
  return HoldsCodeForDevice() ? "" : "this build holds no code for compute capability " + capability;
}

// Whether the device can run the kernel of this build that the call would take.
template <typename Params, typename Kernel>
std::string DeviceRefusal(const Params& params, int device, Kernel automatic) {
  DeviceFacts facts;
  if (std::string reason = FindDevice(device, &facts); !reason.empty()) return reason;
  const auto* variant = Choose(params, facts, automatic);
  if (variant == nullptr) return "there is no CUDA kernel for this combination of dtype and head size";
  if (variant->shared_bytes > facts.shared_bytes) {
    return "the CUDA kernel for this head size needs " + std::to_string(variant->shared_bytes) +
           " bytes of shared memory per block, and the device has " + std::to_string(facts.shared_bytes);
  }
  return "";
}

int64_t GateCount(const Shape& shape, const BlockList& list) { return shape.batch * shape.heads * list.capacity; }

}  // namespace

std::string ForwardRefusal(const ForwardParams& params, int device) {
  const void* bits = params.tiles.count > 0 ? params.tiles.words : nullptr;
  const int64_t gates = HasGates(params) ? GateCount(params.shape, params.rows) : 0;
  std::string reason =
      ShapeRefusal(params.shape, params.dtype, {params.query, params.key, params.value, params.out, bits});
  if (reason.empty()) reason = ListRefusal(params.tiles, {&params.rows}, gates);
  if (reason.empty()) reason = BiasRefusal(params.bias);
  return reason.empty() ? DeviceRefusal(params, device, ForwardKernel::kAutomatic) : reason;
}

std::string DeltaRefusal(const DeltaParams& params, int device) {
  if (params.dtype == DType::kF64) return kNoFloat64;
  if (params.q_len > kMaxInt - 256 || Product({params.heads, params.value_dim}) > kMaxInt) return kTooLarge;
  DeviceFacts facts;
  return FindDevice(device, &facts);
}

std::string BackwardRefusal(const BackwardParams& params, int device) {
  const Shape& shape = params.shape;
  const int64_t gates = HasGates(params) ? GateCount(shape, params.rows) : 0;
  std::string reason =
      ShapeRefusal(shape, params.dtype,
                   {params.dout, params.query, params.key, params.value, params.dquery, params.dkey, params.dvalue});
  if (reason.empty()) {
    reason = ListRefusal(params.tiles, {&params.rows, &params.cols}, std::max(GateSumCount(params), gates));
  }
  const int64_t group = shape.heads / std::max<int64_t>(shape.kv_heads, 1);
  const int64_t entry_pieces = shape.block_q / 64 * (shape.block_kv / 64);
  if (reason.empty() && Product({group, params.cols.capacity, entry_pieces}) > kMaxInt) {
    reason = "the CUDA backward takes lists of fewer than 2^31 tiles (entries * block sizes / 64) in a group of heads";
  }
  if (reason.empty()) reason = BiasRefusal(params.bias);
  return reason.empty() ? DeviceRefusal(params, device, BackwardKernel::kAutomatic) : reason;
}

std::string BiasGradientRefusal(const BiasGradientParams& params, int device) {
  const void* bits = params.tiles.count > 0 ? params.tiles.words : nullptr;
  const int64_t gates = params.gates != nullptr ? GateCount(params.shape, params.rows) : 0;
  std::string reason =
      ShapeRefusal(params.shape, params.dtype, {params.dout, params.query, params.key, params.value, bits});
  if (reason.empty()) reason = ListRefusal(params.tiles, {&params.rows}, gates);
  if (reason.empty()) reason = BiasRefusal(params.bias);
  if (reason.empty() && BiasGradientPlan(params).ctas() > kMaxInt) {
    reason = "the CUDA kernels take fewer than 2^31 tiles of 64 x 64 of a bias";
  }
  DeviceFacts facts;
  return reason.empty() ? FindDevice(device, &facts) : reason;
}

}  // namespace jax_bsk::attention::cuda
