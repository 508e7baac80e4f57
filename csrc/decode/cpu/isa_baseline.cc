#include "cpu/isa_baseline.h"

#include "instantiate.h"

namespace jax_bsk::decode::cpu {

const Kernels* BaselineKernels() { return &JAX_BSK_CPU_ISA::kKernels; }

}  // namespace jax_bsk::decode::cpu
