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

int64_t DeltaTasks(const DeltaParams& params) {
  return params.heads == 0 ? 0 : params.batch * DeltaTasksOfExample(params);
}

int64_t BackwardTasks(const BackwardParams& params) { return KeyTasks(params) + QueryTasks(params.shape); }

int64_t BiasGradientTasks(const BiasGradientParams& params) {
  const Bias& bias = params.bias;
  const int64_t tables = params.term == BiasTerm::kDense       ? bias.dense_batch * bias.dense_heads
                         : params.term == BiasTerm::kDistances ? bias.distances_batch * bias.distances_heads
                                                               : bias.tiles_batch * bias.tiles_heads;
  return tables * BiasGradientParts(params);
}

bool RunForwardTasks(const ForwardParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  return jax_bsk::cpu::TakeTasks(kernels.forward_scratch(params), ForwardTasks(params), next,
                                 [&](int64_t task, void* scratch) { kernels.forward_task(params, task, scratch); });
}

bool RunDeltaTasks(const DeltaParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  return jax_bsk::cpu::TakeTasks(0, DeltaTasks(params), next,
                                 [&](int64_t task, void*) { kernels.delta_task(params, task); });
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

bool RunBiasGradientTasks(const BiasGradientParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  return jax_bsk::cpu::TakeTasks(
      kernels.bias_gradient_scratch(params), BiasGradientTasks(params), next,
      [&](int64_t task, void* scratch) { kernels.bias_gradient_task(params, task, scratch); });
}

}  // namespace jax_bsk::attention::cpu
