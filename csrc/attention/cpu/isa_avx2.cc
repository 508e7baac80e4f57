// x86-64 with AVX2, FMA and F16C (Haswell, 2013, and newer). Compile with -mavx2 -mfma -mf16c; without those flags
// (another processor) there is nothing here.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define JAX_BSK_CPU_ISA avx2
#define JAX_BSK_CPU_VECTOR_BYTES 32
#define JAX_BSK_CPU_ISA_NAME "avx2"

#include "instantiate.h"

namespace jax_bsk::attention::cpu {

const Kernels* Avx2Kernels() { return &avx2::kKernels; }

}  // namespace jax_bsk::attention::cpu

#else

namespace jax_bsk::attention::cpu {

const Kernels* Avx2Kernels() { return nullptr; }

}  // namespace jax_bsk::attention::cpu

#endif
