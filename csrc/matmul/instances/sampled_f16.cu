#include "matmul/sm90/sampled.cuh"

namespace jax_bsk::matmul::cuda::sm90 {
template cudaError_t LaunchSampled<__half, false, false>(const SampledParams&, const SampledPlan&, int, cudaStream_t);
template cudaError_t LaunchSampled<__half, false, true>(const SampledParams&, const SampledPlan&, int, cudaStream_t);
template cudaError_t LaunchSampled<__half, true, false>(const SampledParams&, const SampledPlan&, int, cudaStream_t);
template cudaError_t LaunchSampled<__half, true, true>(const SampledParams&, const SampledPlan&, int, cudaStream_t);
}  // namespace jax_bsk::matmul::cuda::sm90
