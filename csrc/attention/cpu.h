// Block-sparse attention on the CPU: forward, the row sums that the backward is given, the backward split into dQ and
// dK/dV, and the bias's gradient. Every task
// owns the part of the results it writes, so tasks run in any order on any number of threads and give the same bits;
// nothing is accumulated across tasks.
//
// Usage: if (ForwardTasks(p) > 0), let each of several workers call RunForwardTasks(p, next) with one shared atomic
// that starts at 0; when all have returned, every element of the results has been written.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "params.h"

namespace jax_bsk::attention::cpu {

// Limits, told to Python through build_info(): scratch is sized for them.
inline constexpr int64_t kMaxHeadDim = 256;  // of query and key, and of value
inline constexpr int64_t kMaxBlock = 256;    // queries or keys a block

// The instruction set chosen for this machine: "avx512", "avx2", "neon" or "baseline". JAX_BSK_CPU_ISA may name a
// lesser one this build has (for tests); it is read once, at the first call.
const char* InstructionSet();

// Why the kernels cannot take a call of these sizes; empty if they can. To be asked before anything else.
std::string Refusal(const Shape& shape);

// Number of independent tasks; 0 when there is nothing to write.
int64_t ForwardTasks(const ForwardParams& params);
int64_t DeltaTasks(const DeltaParams& params);
int64_t BackwardTasks(const BackwardParams& params);
int64_t BiasGradientTasks(const BiasGradientParams& params);

// One worker: takes task numbers from `next` until none is left, with scratch memory of its own (a few hundred KiB).
// False when that memory could not be had: then the results are incomplete unless other workers finished the tasks.
bool RunForwardTasks(const ForwardParams& params, std::atomic<int64_t>& next) noexcept;
bool RunDeltaTasks(const DeltaParams& params, std::atomic<int64_t>& next) noexcept;
bool RunBackwardTasks(const BackwardParams& params, std::atomic<int64_t>& next) noexcept;
bool RunBiasGradientTasks(const BiasGradientParams& params, std::atomic<int64_t>& next) noexcept;

}  // namespace jax_bsk::attention::cpu
