#include "attention/variants.h"

#include <algorithm>
#include <iterator>

#include "attention/sm90/config.h"
#include "device/element.h"

namespace jax_bsk::attention::cuda {
namespace {

using device::CeilDiv;
using device::DeviceFacts;

// ---- The tables: all that csrc/variants.py lists

namespace sm80_launch {
constexpr Target kTarget = Target::kPortable;
template <typename Config>
cudaError_t Forward(const ForwardParams& params, const ForwardResources& resources) {
  return sm80::LaunchForward<Config>(params, resources.stream);
}
template <typename Config>
cudaError_t Backward(const BackwardParams& params, const BackwardResources& resources) {
  auto* gate_sums = reinterpret_cast<float*>(resources.workspace + resources.layout.gate_sums_offset);
  return sm80::LaunchBackward<Config>(params, resources.marks, gate_sums, resources.stream);
}
}  // namespace sm80_launch

namespace sm90_launch {
constexpr Target kTarget = Target::kHopper;
template <typename Config>
cudaError_t Forward(const ForwardParams& params, const ForwardResources& resources) {
  return sm90::LaunchForward<Config>(params, resources.workspace, resources.multiprocessors, resources.stream);
}
template <typename Config>
cudaError_t Backward(const BackwardParams& params, const BackwardResources& resources) {
  return sm90::LaunchBackward<Config>(params, resources.layout, resources.workspace, resources.multiprocessors,
                                      resources.stream);
}
}  // namespace sm90_launch

#define JAX_BSK_FORWARD(arch, Element, dim, tile, features)                       \
  {arch##_launch::kTarget,                                                        \
   device::kDType<Element>,                                                       \
   dim,                                                                           \
   tile,                                                                          \
   features,                                                                      \
   arch::ForwardSharedBytes<arch::ForwardConfig<Element, dim, tile, features>>(), \
   arch##_launch::Forward<arch::ForwardConfig<Element, dim, tile, features>>},
#define JAX_BSK_BACKWARD(...)
constexpr ForwardVariant kForward[] = {
#include "attention/variants.inc"
};
#undef JAX_BSK_FORWARD
#undef JAX_BSK_BACKWARD

#define JAX_BSK_FORWARD(...)
#define JAX_BSK_BACKWARD(arch, Element, dim, tile, features)                        \
  {arch##_launch::kTarget,                                                          \
   device::kDType<Element>,                                                         \
   dim,                                                                             \
   tile,                                                                            \
   features,                                                                        \
   arch::BackwardSharedBytes<arch::BackwardConfig<Element, dim, tile, features>>(), \
   arch##_launch::Backward<arch::BackwardConfig<Element, dim, tile, features>>},
constexpr BackwardVariant kBackward[] = {
#include "attention/variants.inc"
};
#undef JAX_BSK_FORWARD
#undef JAX_BSK_BACKWARD

// The first row with the call's type and features, a head size that is large enough, and the tile.
template <typename Table, typename Params>
auto* Find(const Table& table, const Params& params, Target target, Tile tile) {
  const int64_t dim = std::max(params.shape.head_dim, params.shape.value_dim);
  const bool soft_cap = params.soft_cap != 0.f || !(params.scale > kLeastPlainScale);
  const auto* found = std::find_if(std::begin(table), std::end(table), [&](const auto& variant) {
    return variant.target == target && (target != Target::kHopper || sm90::TakesBias(params.bias)) &&
           variant.dtype == params.dtype && variant.dim >= dim && variant.tile == tile &&
           Takes(variant.features, soft_cap, HasGates(params), HasExtras(params));
  });
  return found == std::end(table) ? nullptr : found;
}

}  // namespace

// ---- The choice

// Whether the kernel with a feeder (sm90/fwd_feeder.cuh) is faster: where its three CTAs a multiprocessor have two
// tiles each, or, of longer rows, so many that it matters little if some have one less. Microseconds on one H200, in a
// CUDA graph, 64 dimensions, tiles of 64, against the kernel with a producer warpgroup (the feeder's bookkeeping was in
// shared memory then, and is in registers now):
//
//   batch, heads, tokens; blocks attended to    tiles    steps a row   producer warpgroup   feeder
//   1, 8, 512; half                                64              4                  6.8      7.3
//   1, 16, 1024; half                             256              8                  9.9     11.9
//   16, 8, 512; half                             1024              4                 26.1     20.9
//   1, 32, 2048; half                            1024             16                 52.9     55.0
//   16, 32, 512; half                            4096              4                102.4     62.7
//   64, 12, 384; half                            4608              3                123.0     61.0
//   256, 12, 256; half                         12,288              2                239.6    121.8
//   16, 96, 512; all                           12,288              8                390.8    295.9
//   16, 128, 512; half                         16,384              4                402.8    232.9
//   4, 32, 8192; a fifth                       16,384           25.6               1134.9   1101.0
bool FeederIsFaster(const ForwardParams& params, const DeviceFacts& facts) {
  constexpr int64_t kFewSteps = 8;  // of 64 keys a row, on average as far as the lists have room
  const Shape& shape = params.shape;
  const int64_t tiles = shape.batch * shape.heads * CeilDiv(shape.q_len, 64);
  const bool few_steps = params.rows.capacity * (shape.block_kv / 64) <= kFewSteps * params.rows.rows;
  return shape.block_q == 64 && tiles >= (few_steps ? 6 : 32) * int64_t{facts.multiprocessors};
}

const ForwardVariant* Choose(const ForwardParams& params, const DeviceFacts& facts, ForwardKernel kernel) {
  const Shape& shape = params.shape;
  if (kernel == ForwardKernel::kAutomatic && facts.capability == 90) {
    // Tiles of 128 queries share keys and values between two warpgroups, but too few of them leave multiprocessors
    // idle.
    const int64_t tiles = shape.batch * shape.heads * CeilDiv(shape.q_len, 128);
    kernel = shape.block_q == 128 && tiles >= facts.multiprocessors ? ForwardKernel::kRows128 : ForwardKernel::kRows64;
    const auto* feeder = Find(kForward, params, Target::kHopper, Tile::k64Feeder);
    if (feeder != nullptr && FeederIsFaster(params, facts)) return feeder;
  }
  if (kernel == ForwardKernel::kRows64Feeder) {
    if (const auto* feeder = Find(kForward, params, Target::kHopper, Tile::k64Feeder); feeder != nullptr) return feeder;
  }
  if (kernel == ForwardKernel::kRows64 || kernel == ForwardKernel::kRows128) {
    const Tile tile = kernel == ForwardKernel::kRows128 ? Tile::k128 : Tile::k64;
    if (const auto* hopper = Find(kForward, params, Target::kHopper, tile); hopper != nullptr) return hopper;
  }
  if (shape.block_q == 128) {
    if (const auto* large = Find(kForward, params, Target::kPortable, Tile::k128); large != nullptr) return large;
  }
  return Find(kForward, params, Target::kPortable, Tile::k64);
}

const BackwardVariant* Choose(const BackwardParams& params, const DeviceFacts& facts, BackwardKernel kernel) {
  const Shape& shape = params.shape;
  if (kernel == BackwardKernel::kAutomatic && facts.capability == 90) {
    // Tiles of 128 keys need half the copies, but too few of them leave multiprocessors idle.
    const int64_t tiles = shape.batch * shape.kv_heads * CeilDiv(shape.kv_len, 128);
    kernel =
        shape.block_kv == 128 && tiles >= facts.multiprocessors ? BackwardKernel::kKeys128 : BackwardKernel::kKeys64;
  }
  if (kernel == BackwardKernel::kKeys128) {
    if (const auto* hopper = Find(kBackward, params, Target::kHopper, Tile::k128); hopper != nullptr) return hopper;
    kernel = BackwardKernel::kKeys64;  // 256 dimensions have no tile of 128 keys
  }
  if (kernel == BackwardKernel::kKeys64) {
    if (const auto* hopper = Find(kBackward, params, Target::kHopper, Tile::k64); hopper != nullptr) return hopper;
  }
  return Find(kBackward, params, Target::kPortable, Tile::k64);
}

}  // namespace jax_bsk::attention::cuda
