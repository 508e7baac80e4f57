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
  void (*forward_task)(const ForwardParams&, int64_t task, void* scratch);          // [0, ForwardTasks)
  void (*backward_query_task)(const BackwardParams&, int64_t task, void* scratch);  // [0, B * N * q_blocks)
  void (*backward_key_task)(const BackwardParams&, int64_t task, void* scratch);    // [0, B * K * kv_blocks)
};

// Null when this build has no code for the instruction set; whether the machine has it is the caller's question.
const Kernels* BaselineKernels();
const Kernels* Avx2Kernels();
const Kernels* Avx512Kernels();

// Query heads of a task of the forward. With few queries in one block these are all that share keys and values, which
// are then read once, and fill lanes that one head would leave empty: 80 ms of processor time in place of
// 283, for one query of 32 heads on 4 x 16,384 keys of 8 heads (float32, AVX-512). Inlined, as every instruction set
// compiles it.
__attribute__((always_inline)) inline int64_t HeadsOfTask(const ForwardParams& p) {
  const Shape& s = p.shape;
  const int64_t group = s.kv_heads > 0 ? s.heads / s.kv_heads : 1;
  const bool shared = p.rows.heads == 1 && (p.tiles.heads == 1 || p.tiles.count == 0) && p.gates == nullptr;
  return shared && s.q_blocks == 1 && s.q_len * group <= s.block_q ? group : 1;
}

}  // namespace jax_bsk::attention::cpu
