// Block lists on the CPU: a task a table, in any order on any number of threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "lists/params.h"

namespace jax_bsk::lists::cpu {

// One worker: takes tables from `next` until none is left; false when there was no memory for its counters.
bool RunTransposeTasks(const TransposeParams& params, std::atomic<int64_t>& next) noexcept;

// The same; false when there was no memory for a row's keys.
bool RunChooseTasks(const ChooseParams& params, std::atomic<int64_t>& next) noexcept;

}  // namespace jax_bsk::lists::cpu
