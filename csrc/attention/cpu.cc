// The public entry points: chooses the instruction set once, and hands out tasks. Compiled for the plainest machine;
// the kernels are in cpu/.
#include "attention/cpu.h"

#include "attention/cpu/kernels.h"
#include "cpu/choose.h"
#include "cpu/worker.h"

namespace jax_bsk::attention::cpu {
namespace {

const Kernels& Chosen() {
  static const Kernels* const kernels =
      jax_bsk::cpu::Choose<Kernels>({Avx512Kernels(), Avx2Kernels(), BaselineKernels()});
  return *kernels;
}

int64_t KeyTasks(const BackwardParams& p) { return p.shape.batch * p.shape.kv_heads * p.shape.kv_blocks; }

int64_t QueryTasks(const Shape& shape) { return shape.batch * shape.heads * shape.q_blocks; }

}  // namespace

const char* InstructionSet() { return Chosen().name; }

std::string Refusal(const Shape& shape) {
  for (const int64_t dim : {shape.head_dim, shape.value_dim}) {
    if (dim > kMaxHeadDim) {
      return "the CPU kernels take head sizes up to " + std::to_string(kMaxHeadDim) + ", not " + std::to_string(dim);
    }
  }
  for (const int64_t block : {shape.block_q, shape.block_kv}) {
    if (block > kMaxBlock) {
      return "the CPU kernels take blocks up to " + std::to_string(kMaxBlock) + ", not " + std::to_string(block);
    }
  }
  return "";
}

int64_t ForwardTasks(const ForwardParams& params) { return QueryTasks(params.shape) / HeadsOfTask(params); }

int64_t BackwardTasks(const BackwardParams& params) { return KeyTasks(params) + QueryTasks(params.shape); }

bool RunForwardTasks(const ForwardParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  return jax_bsk::cpu::TakeTasks(kernels.forward_scratch(params), ForwardTasks(params), next,
                                 [&](int64_t task, void* scratch) { kernels.forward_task(params, task, scratch); });
}

bool RunBackwardTasks(const BackwardParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  // The longer tasks first, so that the workers finish close together.
  const int64_t key_tasks = KeyTasks(params);
  return jax_bsk::cpu::TakeTasks(kernels.backward_scratch(params), BackwardTasks(params), next,
                                 [&](int64_t task, void* scratch) {
                                   if (task < key_tasks) {
                                     kernels.backward_key_task(params, task, scratch);
                                   } else {
                                     kernels.backward_query_task(params, task - key_tasks, scratch);
                                   }
                                 });
}

}  // namespace jax_bsk::attention::cpu
