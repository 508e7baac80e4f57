#include "cpu/choose.h"

#include <cstdlib>

namespace jax_bsk::cpu {

bool MachineHas(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (std::strcmp(name, "avx2") == 0) {
    // Every processor with AVX2 has F16C, which the builtin of older compilers cannot name.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(name, "avx512") != 0 && std::strcmp(name, "avx2") != 0;  // the baseline, whatever its name
}

const char* WantedInstructionSet() { return std::getenv("JAX_BSK_CPU_ISA"); }

}  // namespace jax_bsk::cpu
