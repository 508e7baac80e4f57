// Arithmetic of sizes that a call was given, none of them negative: it cannot overflow, however large they are.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace jax_bsk {

// The product, or the largest number where that has no room for it.
inline int64_t Product(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t product = 1;
  for (const int64_t size : sizes) product = size != 0 && product > kMost / size ? kMost : product * size;
  return product;
}

// Blocks of `block` that cover `length`.
inline int64_t BlocksOf(int64_t length, int64_t block) { return length / block + (length % block != 0); }

}  // namespace jax_bsk
