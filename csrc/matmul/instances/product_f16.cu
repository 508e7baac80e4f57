#include "matmul/sm90/product.cuh"

namespace jax_bsk::matmul::cuda::sm90 {
template cudaError_t LaunchProduct<__half, false, false>(const ProductParams&, const ProductPlan&, int, cudaStream_t);
template cudaError_t LaunchProduct<__half, false, true>(const ProductParams&, const ProductPlan&, int, cudaStream_t);
template cudaError_t LaunchProduct<__half, true, false>(const ProductParams&, const ProductPlan&, int, cudaStream_t);
template cudaError_t LaunchProduct<__half, true, true>(const ProductParams&, const ProductPlan&, int, cudaStream_t);
}  // namespace jax_bsk::matmul::cuda::sm90
