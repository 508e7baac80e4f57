// One worker of an operation: scratch memory of its own, and task after task from a shared counter.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace jax_bsk::cpu {

constexpr size_t kScratchAlignment = 64;

// Null when there is no memory to be had.
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

// Calls run(task, scratch) for numbers from `next` until none below `tasks` is left; false when there is no scratch.
template <class Run>
bool TakeTasks(size_t scratch_bytes, int64_t tasks, std::atomic<int64_t>& next, const Run& run) noexcept {
  const Scratch scratch(scratch_bytes);
  if (scratch.get() == nullptr) return false;
  for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) run(task, scratch.get());
  return true;
}

}  // namespace jax_bsk::cpu
