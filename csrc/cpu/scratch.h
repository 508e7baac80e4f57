// Dividing a task's scratch memory into arrays.
#pragma once

#include <stddef.h>

#include "vector.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

// Hands out parts of a block of memory; started at null it only counts how much is wanted.
class Carver {
 public:
  explicit Carver(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}

  template <class T>
  T* Take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    // Whole cache lines, and an odd number of them between arrays whose sizes are multiples of 4 KiB: a load that
    // follows a store to the same offset within a page waits for it.
    next_ += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64 + 5 * 64;
    return result;
  }

  size_t Bytes() const { return next_ - begin_; }

 private:
  uintptr_t begin_;
  uintptr_t next_;
};

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
