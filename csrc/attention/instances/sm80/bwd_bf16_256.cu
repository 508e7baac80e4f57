#include "attention/sm80/bwd.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template cudaError_t LaunchBackward<BackwardConfig<__nv_bfloat16, 256>>(const BackwardParams&, const BackwardMarks&,
                                                                        float*, cudaStream_t);

}  // namespace jax_bsk::attention::cuda::sm80
