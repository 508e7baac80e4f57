// The public entry points: chooses the instruction set once, and cuts the work into tasks. Compiled for the plainest
// machine; the kernels are in cpu/.
#include "matmul/cpu.h"

#include <algorithm>
#include <initializer_list>
#include <thread>

#include "cpu/choose.h"
#include "cpu/worker.h"
#include "matmul/cpu/kernels.h"

namespace jax_bsk::matmul::cpu {
namespace {

const Kernels& Chosen() {
  static const Kernels* const kernels =
      jax_bsk::cpu::Choose<Kernels>({Avx512Kernels(), Avx2Kernels(), BaselineKernels()});
  return *kernels;
}

int64_t Threads() {
  static const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return threads;
}

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first of the numbers below `count` that fall to `part`, of `parts` even ones.
int64_t Begin(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

int64_t ComputedBytes(DType dtype) { return dtype == DType::kF64 ? 8 : 4; }

std::string BlockRefusal(std::initializer_list<int64_t> blocks) {
  for (const int64_t block : blocks) {
    if (block > kMaxBlock) {
      return "the CPU products take blocks up to " + std::to_string(kMaxBlock) + ", not " + std::to_string(block);
    }
  }
  return "";
}

// Tasks are as large as they can be, since each packs the dense blocks that it needs once, but not so few that threads
// wait for each other in the end. How the work is cut moves no bit of the result.

// Tasks are batch x panels x groups of out blocks.
struct ProductGrid {
  static constexpr int64_t kTasksPerThread = 4;
  int64_t panel;  // columns
  int64_t panels;
  int64_t groups;

  explicit ProductGrid(const ProductParams& p)
      : panel(kPanelBytes / ComputedBytes(p.dtype)), panels(Ceil(p.width, panel)), groups(0) {
    const int64_t tasks = p.batch * panels;
    if (tasks > 0) groups = std::min(p.out_blocks, Ceil(kTasksPerThread * Threads(), tasks));
  }

  ProductPart Part(const ProductParams& p, int64_t task) const {
    const int64_t group = task % groups;
    return {task / groups / panels, task / groups % panels * panel, Begin(p.out_blocks, group, groups),
            Begin(p.out_blocks, group + 1, groups)};
  }
};

// Tasks are batch x groups of entries.
struct SampledGrid {
  // Measured at 2048^3, 20 % of blocks of 64, float32, one core, without fetching ahead: 52 entries a task 106 GFLOP/s,
  // 26 of them 94.
  static constexpr int64_t kTasksPerThread = 2;
  static constexpr int64_t kSumsBytes = 1 << 21;  // of a group
  int64_t most;                                   // entries of a group
  int64_t groups;

  explicit SampledGrid(const SampledParams& p) : most(0), groups(0) {
    if (p.batch * p.capacity == 0) return;
    const int64_t row_bytes = (p.block_columns * ComputedBytes(p.dtype) + 63) / 64 * 64;  // whole vectors
    const int64_t fit = std::max<int64_t>(1, kSumsBytes / (p.block_rows * row_bytes));
    groups = std::min(p.capacity, std::max(Ceil(p.capacity, fit), Ceil(kTasksPerThread * Threads(), p.batch)));
    most = Ceil(p.capacity, groups);
  }

  SampledPart Part(const SampledParams& p, int64_t task) const {
    const int64_t group = task % groups;
    return {task / groups, Begin(p.capacity, group, groups), Begin(p.capacity, group + 1, groups)};
  }
};

}  // namespace

std::string Refusal(const ProductParams& params) { return BlockRefusal({params.out_block, params.in_block}); }

std::string Refusal(const SampledParams& params) { return BlockRefusal({params.block_rows, params.block_columns}); }

int64_t ProductTasks(const ProductParams& params) {
  const ProductGrid grid(params);
  return params.batch * grid.panels * grid.groups;
}

int64_t SampledTasks(const SampledParams& params) { return params.batch * SampledGrid(params).groups; }

bool RunProductTasks(const ProductParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  const ProductGrid grid(params);
  return jax_bsk::cpu::TakeTasks(
      kernels.product_scratch(params), ProductTasks(params), next,
      [&](int64_t task, void* scratch) { kernels.product(params, grid.Part(params, task), scratch); });
}

bool RunSampledTasks(const SampledParams& params, std::atomic<int64_t>& next) noexcept {
  const Kernels& kernels = Chosen();
  const SampledGrid grid(params);
  return jax_bsk::cpu::TakeTasks(
      kernels.sampled_scratch(params, grid.most), SampledTasks(params), next,
      [&](int64_t task, void* scratch) { kernels.sampled(params, grid.Part(params, task), scratch); });
}

}  // namespace jax_bsk::matmul::cpu
