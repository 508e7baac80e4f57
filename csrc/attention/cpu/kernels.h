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
  size_t (*bias_gradient_scratch)(const BiasGradientParams&);
  void (*bias_gradient_task)(const BiasGradientParams&, int64_t task, void* scratch);  // [0, BiasGradientTasks)
  void (*delta_task)(const DeltaParams&, int64_t task);                                // [0, DeltaTasks)
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
  const bool shared = p.rows.heads == 1 && (p.tiles.heads == 1 || p.tiles.count == 0) && p.gates == nullptr &&
                      !HasBias(p.bias) && !Drops(p.dropout);
  return shared && s.q_blocks == 1 && s.q_len * group <= s.block_q ? group : 1;
}

// Queries of a task of the row sums, of all heads of an example: as many as have some 32,768 products, which take about
// 20 us, and whole cache lines of the results.
__attribute__((always_inline)) inline int64_t DeltaQueries(const DeltaParams& p) {
  constexpr int64_t kProducts = 32768, kLine = 16;
  const int64_t of_query = p.heads * p.value_dim;
  const int64_t queries = kProducts / (of_query > 0 ? of_query : 1);
  return (queries / kLine + 1) * kLine;
}
__attribute__((always_inline)) inline int64_t DeltaTasksOfExample(const DeltaParams& p) {
  const int64_t queries = DeltaQueries(p);
  return (p.q_len + queries - 1) / queries;
}

// Tasks of the bias gradient for each example and head of the term (bias_gradient.h says what each owns). As many as
// keep a machine busy when all examples and heads share the term, since each reads the lists through.
__attribute__((always_inline)) inline int64_t BiasGradientParts(const BiasGradientParams& p) {
  constexpr int64_t kMost = 16;
  const Shape& s = p.shape;
  const Bias& bias = p.bias;
  if (p.term == BiasTerm::kDense) {
    return (bias.dense_q == 1 ? 1 : s.q_blocks) * (bias.dense_kv == 1 ? 1 : s.kv_blocks);
  }
  if (p.term == BiasTerm::kDistances) return s.block_q == s.block_kv ? kMost : 1;
  return bias.tiles_count < kMost ? bias.tiles_count : kMost;
}

}  // namespace jax_bsk::attention::cpu
