// The public entry points: chooses the instruction set once, and hands out tasks. Compiled for the plainest machine;
// the kernels are in cpu/.
#include "cpu.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/kernels.h"

namespace jax_bsk::attention::cpu {
namespace {

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
  return std::strcmp(name, BaselineKernels()->name) == 0;
}

const Kernels* Choose() {
  const Kernels* const best_first[] = {Avx512Kernels(), Avx2Kernels(), BaselineKernels()};
  const char* wanted = std::getenv("JAX_BSK_CPU_ISA");
  const Kernels* chosen = nullptr;
  for (const Kernels* kernels : best_first) {
    if (kernels == nullptr || !MachineHas(kernels->name)) continue;
    if (chosen == nullptr || (wanted != nullptr && std::strcmp(wanted, kernels->name) == 0)) chosen = kernels;
  }
  return chosen;
}

const Kernels& Chosen() {
  static const Kernels* const kernels = Choose();
  return *kernels;
}

// Scratch memory of one worker; null when there is none to be had.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(::operator new(bytes, kAlignment, std::nothrow)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment, std::nothrow); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{kScratchAlignment};
  void* memory_;
};

int64_t KeyTasks(const BackwardParams& p) { return p.shape.batch * p.shape.kv_heads * p.shape.kv_blocks; }

int64_t QueryTasks(const Shape& shape) { return shape.batch * shape.heads * shape.q_blocks; }

}  // namespace

const char* InstructionSet() { return Chosen().name; }

int64_t ForwardTasks(const ForwardParams& params) { return QueryTasks(params.shape); }

int64_t BackwardTasks(const BackwardParams& params) { return KeyTasks(params) + QueryTasks(params.shape); }

bool RunForwardTasks(const ForwardParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  const Scratch scratch(kernels.forward_scratch(params));
  if (scratch.get() == nullptr) return false;
  const int64_t tasks = ForwardTasks(params);
  for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
    kernels.forward_task(params, task, scratch.get());
  }
  return true;
}

bool RunBackwardTasks(const BackwardParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  const Scratch scratch(kernels.backward_scratch(params));
  if (scratch.get() == nullptr) return false;
  // The longer tasks first, so that the workers finish close together.
  const int64_t key_tasks = KeyTasks(params);
  const int64_t tasks = BackwardTasks(params);
  for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
    if (task < key_tasks) {
      kernels.backward_key_task(params, task, scratch.get());
    } else {
      kernels.backward_query_task(params, task - key_tasks, scratch.get());
    }
  }
  return true;
}

}  // namespace jax_bsk::attention::cpu
