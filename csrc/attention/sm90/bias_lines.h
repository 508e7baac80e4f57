// Lines of a bias by distance, for the Hopper kernels: where the numbers of a tile of 64 x 64 pairs lie on a straight
// line they are computed, in a product (forward: BiasRamp) or in registers (backward), and not read. ALiBi's do
// everywhere but on the diagonal, T5's wherever all pairs share the last bucket. Pure host code, compiled into every
// library.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda::sm90 {

// Tables of numbers by distance, 0 without such a bias.
inline int64_t DistanceTables(const Bias& bias) {
  return bias.distances == nullptr ? 0 : bias.distances_batch * bias.distances_heads;
}

// Line number BiasLineOfZero(shape) + (first key - first query) / 64 is that of the pairs of 64 queries and 64 keys.
inline int64_t BiasLineOfZero(const Shape& shape) { return std::max<int64_t>(BlocksOf(shape.q_len, 64) - 1, 0); }
inline int64_t BiasLinesOfTable(const Shape& shape) {
  return BiasLineOfZero(shape) + std::max<int64_t>(BlocksOf(shape.kv_len, 64), 1);
}

// Words of the lines of so many tables: two each.
inline int64_t BiasLineWords(const Shape& shape, int64_t tables) {
  return Product({2, tables, BiasLinesOfTable(shape)});
}

}  // namespace jax_bsk::attention::cuda::sm90
