#include "matmul/sm90/product.cuh"

namespace jax_bsk::matmul::cuda::sm90 {
template cudaError_t LaunchProduct<__nv_bfloat16, false, false>(const ProductParams&, const ProductPlan&, int,
                                                                cudaStream_t);
template cudaError_t LaunchProduct<__nv_bfloat16, false, true>(const ProductParams&, const ProductPlan&, int,
                                                               cudaStream_t);
template cudaError_t LaunchProduct<__nv_bfloat16, true, false>(const ProductParams&, const ProductPlan&, int,
                                                               cudaStream_t);
template cudaError_t LaunchProduct<__nv_bfloat16, true, true>(const ProductParams&, const ProductPlan&, int,
                                                              cudaStream_t);
}  // namespace jax_bsk::matmul::cuda::sm90
