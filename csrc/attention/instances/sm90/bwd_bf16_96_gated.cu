#include "attention/sm90/bwd.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template cudaError_t LaunchBackward<BackwardConfig<__nv_bfloat16, 96, false, true, true>>(const BackwardParams&,
                                                                                          const BackwardLayout&, void*,
                                                                                          int, cudaStream_t);
template cudaError_t LaunchBackward<BackwardConfig<__nv_bfloat16, 96, true, true, true>>(const BackwardParams&,
                                                                                         const BackwardLayout&, void*,
                                                                                         int, cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm90
