// Which instruction set's kernels run on this machine. For the plain translation units alone, as are all headers of
// csrc/cpu that are not inside a namespace of an instruction set.
#pragma once

#include <cstddef>
#include <cstring>

namespace jax_bsk::cpu {

// Whether the machine executes what isa_*.h of that name is compiled for.
bool MachineHas(const char* name);

// The name in JAX_BSK_CPU_ISA, or null.
const char* WantedInstructionSet();

// The first table of the list that the machine has, or a later one if JAX_BSK_CPU_ISA names it. Tables that this build
// lacks are null. `Kernels` is an operation's kernels.h.
template <class Kernels, size_t kCount>
const Kernels* Choose(const Kernels* const (&best_first)[kCount]) {
  const char* const wanted = WantedInstructionSet();
  const Kernels* chosen = nullptr;
  for (const Kernels* kernels : best_first) {
    if (kernels == nullptr || !MachineHas(kernels->name)) continue;
    if (chosen == nullptr || (wanted != nullptr && std::strcmp(wanted, kernels->name) == 0)) chosen = kernels;
  }
  return chosen;
}

}  // namespace jax_bsk::cpu
