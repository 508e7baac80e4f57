#include "attention/sm80/fwd.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template cudaError_t LaunchForward<ForwardConfig<__nv_bfloat16, 64, 1, true>>(const ForwardParams&, cudaStream_t);
template cudaError_t LaunchForward<ForwardConfig<__nv_bfloat16, 64, 2, true>>(const ForwardParams&, cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm80
