#include "attention/sm80/fwd.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template cudaError_t LaunchForward<ForwardConfig<float, 256, 1, true>>(const ForwardParams&, cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm80
