#include "attention/sm90/bias_gradient.cuh"
#include "device/element.h"

namespace jax_bsk::attention::cuda::sm90 {
namespace {

template <typename Element, int kDim>
cudaError_t Launch(const BiasGradientParams& params, const BiasGradientGroups& groups, int grid, cudaStream_t stream) {
  if (params.term == BiasTerm::kDistances) {
    return LaunchPairs<BiasGradientConfig<Element, kDim, true>>(params, groups, grid, stream);
  }
  return LaunchPairs<BiasGradientConfig<Element, kDim, false>>(params, groups, grid, stream);
}

}  // namespace

cudaError_t LaunchBiasGradient(const BiasGradientParams& params, const BiasGradientGroups& groups, int grid,
                               cudaStream_t stream) {
  const bool small = std::max(params.shape.head_dim, params.shape.value_dim) <= 64;
  if (params.dtype == DType::kBF16) {
    return small ? Launch<device::BFloat16, 64>(params, groups, grid, stream)
                 : Launch<device::BFloat16, 128>(params, groups, grid, stream);
  }
  return small ? Launch<device::Float16, 64>(params, groups, grid, stream)
               : Launch<device::Float16, 128>(params, groups, grid, stream);
}

}  // namespace jax_bsk::attention::cuda::sm90
