#include "attention/sm90/fwd.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template cudaError_t LaunchForward<ForwardConfig<__half, 128, 1, true, true>>(const ForwardParams&, int32_t*, int,
                                                                              cudaStream_t);
template cudaError_t LaunchForward<ForwardConfig<__half, 128, 2, true, true>>(const ForwardParams&, int32_t*, int,
                                                                              cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm90
