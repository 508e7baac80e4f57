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

// Whether `rows` rows have no entry in common: none of the rows + 1 offsets is less than the one before it.
JAX_BSK_INLINE bool InOrder(const int32_t* offsets, int64_t rows) {
  bool in_order = true;
  for (int64_t row = 0; row < rows; ++row) in_order &= offsets[row] <= offsets[row + 1];
  return in_order;
}

// How many rows have an entry.
inline int64_t CountOwners(const int32_t* offsets, int64_t rows, int64_t capacity, int64_t entry) {
  int64_t owners = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const ListRange range = ReadRange(offsets + row, capacity);
    owners += range.sound && range.begin <= entry && entry < range.begin + range.count;
  }
  return owners;
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
