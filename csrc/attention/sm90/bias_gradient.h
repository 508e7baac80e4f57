// The gradient of one term of the bias on Hopper: what it takes, how it divides its work, and its launcher. Pure host
// code and plain data.
//
// A slot is a part of the result that one CTA makes, adding up all that belongs there in a fixed order: a tile of
// 128 x 128 pairs of a dense bias, or two neighbouring diagonals of such tiles for numbers by distance. Every CTA makes
// groups of slots, one after the other.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "attention/bias_gradient.h"
#include "attention/params.h"
#include "attention/sm90/config.h"
#include "sizes.h"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kPairTile = 128;  // queries and keys

// Whether the Hopper kernel can take a problem, which has queries and keys.
inline bool TakesBiasGradient(const BiasGradientParams& params) {
  const Shape& shape = params.shape;
  const bool half = params.dtype == DType::kBF16 || params.dtype == DType::kF16;
  // A soft cap leaves no registers, and without one a logit is a multiple of the product.
  const bool plain = params.soft_cap == 0.f && params.scale > kLeastPlainScale;
  const bool term = params.term == BiasTerm::kDistances ||
                    (params.term == BiasTerm::kDense && params.bias.dense_q > 1 && params.bias.dense_kv > 1);
  return half && plain && term && TakesBias(params.bias) && std::max(shape.head_dim, shape.value_dim) <= 128;
}

// The groups of slots.
struct BiasGradientGroups {
  int q_tiles, kv_tiles;
  int tables_batch, tables_heads;
  int of_table;     // groups of a table
  int count;        // of all tables
  int key_tiles;    // dense: slots of a group, neighbours in a row of tiles
  int before_zero;  // distances: pairs of diagonals 2m - 1 and 2m with m < 0, and with m > 0
  int after_zero;

  BiasGradientGroups() = default;
  BiasGradientGroups(const BiasGradientParams& params, int multiprocessors) {
    const Shape& shape = params.shape;
    const Bias& bias = params.bias;
    q_tiles = static_cast<int>(BlocksOf(shape.q_len, kPairTile));
    kv_tiles = static_cast<int>(BlocksOf(shape.kv_len, kPairTile));
    key_tiles = 1;
    before_zero = after_zero = 0;
    if (params.term == BiasTerm::kDistances) {
      tables_batch = static_cast<int>(bias.distances_batch), tables_heads = static_cast<int>(bias.distances_heads);
      before_zero = (q_tiles - 1) / 2, after_zero = kv_tiles / 2;
      of_table = before_zero + 1 + after_zero;
    } else {
      tables_batch = static_cast<int>(bias.dense_batch), tables_heads = static_cast<int>(bias.dense_heads);
      // Long groups read queries seldom, and many of them are shared out evenly.
      const int64_t slots = Product({int64_t{tables_batch} * tables_heads, q_tiles, kv_tiles});
      key_tiles = static_cast<int>(std::clamp<int64_t>(slots / (int64_t{16} * multiprocessors), 1, 16));
      of_table = q_tiles * static_cast<int>(BlocksOf(kv_tiles, key_tiles));
    }
    count = tables_batch * tables_heads * of_table;
  }
};

// On the current device; `grid` CTAs. dbias is zero where no pair of the distances has an element.
cudaError_t LaunchBiasGradient(const BiasGradientParams& params, const BiasGradientGroups& groups, int grid,
                               cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda::sm90
