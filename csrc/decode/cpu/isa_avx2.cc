#include "cpu/isa_avx2.h"

#include "kernels.h"
#if defined(JAX_BSK_CPU_ISA)
#include "instantiate.h"
#endif

namespace jax_bsk::decode::cpu {

const Kernels* Avx2Kernels() {
#if defined(JAX_BSK_CPU_ISA)
  return &JAX_BSK_CPU_ISA::kKernels;
#else
  return nullptr;
#endif
}

}  // namespace jax_bsk::decode::cpu
