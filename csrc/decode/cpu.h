// The decoding call on the CPU. A tile packs the query heads of a key/value head and neighbouring tokens of a sequence,
// so that a key is read once for all of them. Its keys are summed in parts of a length that the call names, and the
// parts are put together in their order: a sequence has the same bits whatever else is in the call and however many
// threads there are. Long tiles are computed part by part by several threads, others by one.
//
// Usage: Plan(params, workers, &call) once, then let each of several workers call RunTasks(call, next) with one shared
// atomic that starts at 0; when all have returned, every element of the results has been written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "params.h"

namespace jax_bsk::decode::cpu {

// Told to Python through build_info(): scratch is sized for it.
inline constexpr int64_t kMaxHeadDim = 256;  // of query and key, and of value

// Why the kernels cannot take a call of these sizes; empty if they can. To be asked before anything else.
std::string Refusal(const ForwardParams& params);

struct Tasks;

// A call and what is to be done for it; copies share the tasks.
struct Call {
  ForwardParams params;
  std::shared_ptr<Tasks> tasks;
};

// Reads the offsets, lengths, and selections of a call, and divides the work for so many workers. False when there was
// no memory for it. A call is run once.
bool Plan(const ForwardParams& params, int64_t workers, Call* call) noexcept;

int64_t TaskCount(const Call& call);

// One worker: takes task numbers from `next` until none is left, with scratch memory of its own (a few hundred KiB).
// False when that memory could not be had: then the results are incomplete unless other workers finished the tasks.
bool RunTasks(const Call& call, std::atomic<int64_t>& next) noexcept;

}  // namespace jax_bsk::decode::cpu
