// From params to launches on a stream, with the kernel that variants.h chooses.
#include "attention/launch.h"

#include <algorithm>

#include "attention/bias_gradient.h"
#include "attention/delta.h"
#include "attention/few_queries.h"
#include "attention/gates.h"
#include "attention/prepare.h"
#include "attention/variants.h"
#include "device/host.h"

namespace jax_bsk::attention::cuda {

using device::DeviceFacts;
using device::DeviceScope;

cudaError_t LaunchForward(const ForwardParams& params, int32_t* workspace, int device, cudaStream_t stream,
                          ForwardKernel kernel) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads * shape.q_len == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;
  if ((kernel == ForwardKernel::kAutomatic || kernel == ForwardKernel::kFewQueries) && TakesFewQueries(params, facts)) {
    return LaunchFewQueries(params, workspace, facts, stream);
  }
  const ForwardVariant* variant = Choose(params, facts, kernel);
  if (variant == nullptr) return cudaErrorNotSupported;
  return variant->launch(params, {workspace, facts.multiprocessors, stream});
}

namespace {

sm90::BackwardLayout Layout(const BackwardParams& params, Tile tile, int64_t bytes) {
  const int tile_kv = tile == Tile::k128 ? 128 : 64;
  return sm90::BackwardLayout(params.shape, params.rows, params.cols, tile_kv, GateSumCount(params),
                              sm90::DistanceTables(params.bias), bytes);
}

// The Hopper kernels: preparation, the gradients, and what could not be exact there once more by the portable ones.
cudaError_t LaunchHopper(const BackwardParams& params, const BackwardVariant& hopper, const BackwardVariant& portable,
                         const BackwardResources& resources) {
  const sm90::BackwardLayout& layout = resources.layout;
  int32_t* words = resources.workspace;
  const bool large = hopper.tile == Tile::k128;
  const Preparation preparation{words,
                                layout.matches_offset,
                                reinterpret_cast<int2*>(words + layout.matches_offset),
                                reinterpret_cast<float*>(words + layout.statistics_offset),
                                words + layout.order_offset,
                                static_cast<int>(layout.slices),
                                static_cast<int>(layout.slice_heads),
                                static_cast<int>(layout.key_tiles),
                                large ? 1 : static_cast<int>(params.shape.block_kv / 64)};
  cudaError_t error = LaunchPrepare(params, preparation, resources.stream);
  if (error != cudaSuccess) return error;
  error = hopper.launch(params, resources);
  if (error != cudaSuccess) return error;
  BackwardResources again = resources;
  again.marks = {words + layout.inexact_queries_offset, words + layout.inexact_keys_offset, resources.multiprocessors};
  return portable.launch(params, again);
}

}  // namespace

int64_t BackwardWorkspace(const BackwardParams& params) { return Layout(params, Tile::k64, 0).least_bytes; }

cudaError_t LaunchBackward(const BackwardParams& params, void* workspace, int64_t bytes, int device,
                           cudaStream_t stream, BackwardKernel kernel) {
  const Shape& shape = params.shape;
  if (shape.batch * shape.heads == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;
  const BackwardVariant* variant = Choose(params, facts, kernel);
  const BackwardVariant* portable = Choose(params, facts, BackwardKernel::kPortable);
  if (variant == nullptr || portable == nullptr) return cudaErrorNotSupported;
  const sm90::BackwardLayout layout = Layout(params, variant->tile, bytes);
  const BackwardResources resources{layout, static_cast<int32_t*>(workspace), {}, facts.multiprocessors, stream};
  auto* gate_sums = reinterpret_cast<float*>(resources.workspace + layout.gate_sums_offset);

  cudaError_t error = ClearGateSums(params, gate_sums, stream);
  if (error != cudaSuccess) return error;
  const bool hopper = variant->target == Target::kHopper && shape.q_len > 0 && shape.kv_len > 0;
  error = hopper ? LaunchHopper(params, *variant, *portable, resources) : portable->launch(params, resources);
  if (error != cudaSuccess) return error;
  return LaunchSumGates(params, gate_sums, stream);
}

cudaError_t LaunchDelta(const DeltaParams& params, int device, cudaStream_t stream) {
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  return LaunchDeltaKernel(params, stream);
}

cudaError_t LaunchBiasGradient(const BiasGradientParams& params, int device, cudaStream_t stream,
                               BiasGradientKernel kernel) {
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;
  return LaunchBiasGradientKernel(params, facts, stream, kernel);
}

}  // namespace jax_bsk::attention::cuda
