// The table that an instruction set's translation unit (isa_*.cc) gives to ../cpu.cc. Plain function pointers: code
// built with wider instructions must stay behind this table, or a machine without them could execute it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace jax_bsk::attention::cpu {

struct Kernels {
  const char* name;
  size_t (*forward_scratch)(const ForwardParams&);                                  // bytes, aligned as a worker's are
  size_t (*backward_scratch)(const BackwardParams&);                                // enough for either backward task
  void (*forward_task)(const ForwardParams&, int64_t task, void* scratch);          // [0, B * N * q_blocks)
  void (*backward_query_task)(const BackwardParams&, int64_t task, void* scratch);  // [0, B * N * q_blocks)
  void (*backward_key_task)(const BackwardParams&, int64_t task, void* scratch);    // [0, B * K * kv_blocks)
};

// Null when this build has no code for the instruction set; whether the machine has it is the caller's question.
const Kernels* BaselineKernels();
const Kernels* Avx2Kernels();
const Kernels* Avx512Kernels();

}  // namespace jax_bsk::attention::cpu
