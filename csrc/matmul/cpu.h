// Block-sparse products on the CPU. Every task owns the part of the result it writes, so tasks run in any order on any
// number of threads and give the same bits.
//
// Usage: if (ProductTasks(p) > 0), let each of several workers call RunProductTasks(p, next) with one shared atomic
// that starts at 0; when all have returned, every element of the result has been written.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "matmul/params.h"

namespace jax_bsk::matmul::cpu {

// Rows or columns of a block, told to Python through build_info(): scratch is sized for it.
inline constexpr int64_t kMaxBlock = 256;

// Why the kernels cannot take a call; empty if they can. To be asked before anything else.
std::string Refusal(const ProductParams& params);
std::string Refusal(const SampledParams& params);

// Number of independent tasks; 0 when there is nothing to write.
int64_t ProductTasks(const ProductParams& params);
int64_t SampledTasks(const SampledParams& params);

// One worker: takes task numbers from `next` until none is left, with scratch memory of its own (up to 4 MiB).
// False when that memory could not be had: then the results are incomplete unless other workers finished the tasks.
bool RunProductTasks(const ProductParams& params, std::atomic<int64_t>& next) noexcept;
bool RunSampledTasks(const SampledParams& params, std::atomic<int64_t>& next) noexcept;

}  // namespace jax_bsk::matmul::cpu
