#include "attention/sm80/fwd.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template cudaError_t LaunchForward<ForwardConfig<__nv_bfloat16, 128, 1>>(const ForwardParams&, cudaStream_t);
template cudaError_t LaunchForward<ForwardConfig<__nv_bfloat16, 128, 2>>(const ForwardParams&, cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm80
