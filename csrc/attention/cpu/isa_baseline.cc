#include "cpu/isa_baseline.h"

#include "instantiate.h"

namespace jax_bsk::attention::cpu {

const Kernels* BaselineKernels() { return &JAX_BSK_CPU_ISA::kKernels; }

}  // namespace jax_bsk::attention::cpu
