// Integers that come from the user's memory, compared with their bounds before anything is read by them.
#pragma once

#include "vector.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

JAX_BSK_INLINE int64_t Minimum(int64_t a, int64_t b) { return a < b ? a : b; }

JAX_BSK_INLINE int64_t Clamp(int64_t x, int64_t high) { return x < 0 ? 0 : Minimum(x, high); }

// The entries of a list between two neighbouring offsets. Not sound, and then not to be used: offsets that are
// negative, decreasing or beyond the list.
struct ListRange {
  bool sound;
  int64_t begin;
  int64_t count;
};

JAX_BSK_INLINE ListRange ReadRange(const int32_t* offsets, int64_t capacity) {
  const int64_t begin = offsets[0];
  const int64_t end = offsets[1];
  return {begin >= 0 && end >= begin && end <= capacity, begin, end - begin};
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
