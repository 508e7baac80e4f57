#include "cpu/isa_avx512.h"

#include "kernels.h"
#if defined(JAX_BSK_CPU_ISA)
#include "instantiate.h"
#endif

namespace jax_bsk::decode::cpu {

const Kernels* Avx512Kernels() {
#if defined(JAX_BSK_CPU_ISA)
  return &JAX_BSK_CPU_ISA::kKernels;
#else
  return nullptr;
#endif
}

}  // namespace jax_bsk::decode::cpu
