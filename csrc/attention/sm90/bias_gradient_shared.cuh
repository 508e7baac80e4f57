// Everything that the warps of the Hopper kernel for gradients of biases share: shared memory, the messages that travel
// with the pipeline, and the plan.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/sm90/bias_gradient.h"
#include "attention/sm90/config.h"
#include "device/ptx/barrier.cuh"
#include "device/ring.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

using device::sm90::Barrier;
using device::sm90::kReleasesPerWarp;
using device::sm90::ReadShared;
using device::sm90::Ring;

// kDiagonals: numbers by distance, and a slot is two neighbouring diagonals of tiles. Otherwise a dense bias with a
// number for each pair of queries and keys, and a slot is one tile.
template <typename Element_, int kDim_, bool kDiagonals_>
struct BiasGradientConfig {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kDiagonals = kDiagonals_;
  static constexpr int kSlotTiles = kDiagonals ? 2 : 1;  // neighbours in a row of tiles
  static constexpr int kConsumers = 2;                   // warpgroups, each with 64 queries
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kTileElements = kPairTile * kDim;
  // Buffers of queries, and as many of dO; of keys, and as many of values.
  static constexpr int kLeftStages = kDim == 64 ? 2 : 1, kRightStages = kDim == 64 ? 4 : 2;
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
  static constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;
};

// The message of the search to everyone else: a tile of 128 x 128 pairs, whose quarters [queries / 64][keys / 64] are
// of up to four entries of the list; or a slot to store, or both.
struct alignas(16) PairMessage {
  // kPairs: there is a tile of pairs. kSecond: it belongs to the second of the slot's diagonals. kStore: the slot is
  // complete (after this tile). kNewLeft, kNewRight: queries and dO, keys and values are others than those of the tile
  // before; kLastLeft, kLastRight: than those of the next tile. kMasked: not all pairs attend; kBits << quarter: it has
  // a bit tile.
  static constexpr int kPairs = 1, kSecond = 2, kStore = 4, kEnd = 8, kNewLeft = 16, kNewRight = 32, kLastLeft = 64,
                       kLastRight = 128, kMasked = 256, kBits = 512;
  static constexpr int kAbsent = -2;  // a quarter that no entry has
  int flags;
  int batch, head, kv_head;
  int q_start, key_start;
  int query_limit, key_limit;  // the example's lengths
  int table;                   // of the result
  int tiles[2][2];             // bit tile of each quarter, -1: all its pairs attend
  int bias_tiles[2][2];        // see Bias
  float gates[2][2];
};

// An entry that a lane of the search has found.
struct FoundEntry {
  int position;  // in the table's part of the list
  int floor;     // those up to here have been found before
  int bits;      // bit tile; PairMessage::kAbsent: nothing was found
};

// What a lane of the search keeps, each its own copy: in registers it would not fit into those of a producer warp.
struct SearchWords {
  int first_group;       // of this round of the grid
  int table;             // of the result
  int first;             // the first of the group's two diagonals of tiles, or of its tiles of keys
  int begin;             // lane 0's tile of queries of that diagonal, or its number among the group's tiles
  int member;            // diagonals: which of the examples and heads that share the table
  int batch, head;       // of this lane's tile
  int q_tile, key_tile;  // likewise: -1 for none; the first of its tiles of keys
  int searched;          // table of the list in which its entries were found; -1: in none
  int more;              // whether there are entries beyond those found
};

// What a tile has beside the products' operands.
struct PairSide {
  alignas(16) uint8_t bits[2][1024];  // of each 64 queries: [64][16] with blocks of 128 keys, else [2][64][8]
  float statistics[3][kPairTile];     // of the queries: lse, delta, rest, as RowStatistics has them
};

template <bool kDiagonals>
struct DiagonalSums {};
template <>
struct DiagonalSums<true> {
  static constexpr int kColumns = 32;
  static constexpr int kDistances = 3 * kPairTile - 1;  // of two neighbouring tiles
  float lines[2][32][kColumns + 1];
  float sums[2][kDistances];
};

template <typename Config>
struct BiasGradientShared {
  using Element = typename Config::Element;
  static constexpr int kSteps = 16, kSides = 4;

  // Tiles are [chunk][row][64 columns], swizzled.
  alignas(1024) Element query[Config::kLeftStages][Config::kTileElements];
  alignas(1024) Element dout[Config::kLeftStages][Config::kTileElements];
  alignas(1024) Element key[Config::kRightStages][Config::kTileElements];
  alignas(1024) Element value[Config::kRightStages][Config::kTileElements];
  PairSide sides[kSides];
  PairMessage steps[kSteps];
  FoundEntry found[32][4 * Config::kSlotTiles];  // of each lane: [row of blocks][key block]
  SearchWords search[32];
  DiagonalSums<Config::kDiagonals> diagonals;
  Barrier full_step[kSteps], empty_step[kSteps];
  Barrier full_side[kSides], empty_side[kSides];
  Barrier full_query[Config::kLeftStages], empty_query[Config::kLeftStages];
  Barrier full_dout[Config::kLeftStages], empty_dout[Config::kLeftStages];
  Barrier full_key[Config::kRightStages], empty_key[Config::kRightStages];
  Barrier full_value[Config::kRightStages], empty_value[Config::kRightStages];

  __device__ __forceinline__ void Init() {
    using device::sm90::InitBarrier;
    constexpr int kWarp = kReleasesPerWarp, kWarps = 4 * Config::kConsumers * kWarp;
    for (int i = 0; i < kSteps; ++i) InitBarrier(full_step[i], kWarp), InitBarrier(empty_step[i], kWarps + 2 * kWarp);
    for (int i = 0; i < kSides; ++i) InitBarrier(full_side[i], 1 + kWarp), InitBarrier(empty_side[i], kWarps);
    for (int i = 0; i < Config::kLeftStages; ++i) {
      InitBarrier(full_query[i], 1), InitBarrier(empty_query[i], kWarps);
      InitBarrier(full_dout[i], 1), InitBarrier(empty_dout[i], kWarps);
    }
    for (int i = 0; i < Config::kRightStages; ++i) {
      InitBarrier(full_key[i], 1), InitBarrier(empty_key[i], kWarps);
      InitBarrier(full_value[i], 1), InitBarrier(empty_value[i], kWarps);
    }
    device::sm90::FenceBarrierInit();
  }
};

// Numbers that the host computes for a launch, beside the parameters.
struct PairPlan {
  CUtensorMap query, dout, key, value;  // boxes of 128 positions
  BiasGradientGroups groups;
  float multiplier;   // of a product, to a logit in units of log2
  float bias_factor;  // of a bias, in units of a product
  float kept_scale;
};

}  // namespace jax_bsk::attention::cuda::sm90
