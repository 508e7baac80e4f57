#include "matmul/sm90/sampled.cuh"

namespace jax_bsk::matmul::cuda::sm90 {
template cudaError_t LaunchSampled<__nv_bfloat16, false, false>(const SampledParams&, const SampledPlan&, int,
                                                                cudaStream_t);
template cudaError_t LaunchSampled<__nv_bfloat16, false, true>(const SampledParams&, const SampledPlan&, int,
                                                               cudaStream_t);
template cudaError_t LaunchSampled<__nv_bfloat16, true, false>(const SampledParams&, const SampledPlan&, int,
                                                               cudaStream_t);
template cudaError_t LaunchSampled<__nv_bfloat16, true, true>(const SampledParams&, const SampledPlan&, int,
                                                              cudaStream_t);
}  // namespace jax_bsk::matmul::cuda::sm90
