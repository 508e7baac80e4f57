// Everything that the warps of the Hopper backward share: shared memory, the messages that travel with the pipeline,
// and the plan.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/sm90/bias.cuh"
#include "attention/sm90/bwd_plan.h"
#include "attention/sm90/config.h"
#include "attention/softmax.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ring.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

using device::sm90::Barrier;
using device::sm90::Divider;
using device::sm90::kReleasesPerWarp;
using device::sm90::ReadShared;
using device::sm90::Ring;

// Numbers that the host computes for a launch, beside the parameters.
struct BackwardPlan {
  CUtensorMap query, dout, key, value;  // boxes of 64 positions
  LogitMap logits;
  BiasLines bias_lines;
  float bias_factor;  // as in ForwardPlan
  float kept_scale;
  int work_count;
  int slices, buffers;
  int slice_heads;       // key/value heads of a slice
  int kv_rows;           // batch * kv_heads
  int group;             // query heads a key/value head
  int entry_subtiles;    // of dS, a block
  int buffer_subtiles;   // a slice
  int key_items;         // of a whole slice
  Divider slice_items;   // of both kinds, of a whole slice
  Divider key_tiles;     // of one head
  Divider query_blocks;  // of one head
  Divider heads, kv_heads;
  int query_tiles;        // of 64, of one head
  int32_t* work_counter;  // the next work index
  int32_t* done_keys;     // [slices]: items of each kind that are done
  int32_t* done_queries;
  int32_t* inexact_keys;     // [batch, kv_heads, 64 keys]: what the exact kernel has to do once more
  int32_t* inexact_queries;  // [batch, heads, 64 queries]
  const int2* matches;       // see Preparation
  const int32_t* order;      // likewise
  const float* statistics;
  float* gate_sums;  // see gates.h
  void* subtiles;    // [buffers, slice_heads * group, capacity, entry_subtiles, 64, 64]
};

// The message of the scheduler to everyone else: the CTA's next item.
struct BackwardItem {
  enum Kind : int { kKeys, kQueries, kEnd };  // makes dK and dV; makes dQ
  int kind;
  int start;  // first key, or first query
  int head;   // key/value head, or query head
  int batch;
  int query_limit;  // the example's lengths
  int key_limit;
  int slice;
  int table_row;  // its first query head, counted from the first of the slice
};

// One step: 64 queries for a tile of keys, or 64 keys for a block of queries. kVoid: there is nothing to do, and this
// is the only step; kInexact, with kLast: the list cannot be followed, the exact kernel decides.
struct StepFlag {
  static constexpr int kLast = 1, kVoid = 2, kMasked = 4, kBits = 8, kInexact = 16;
};

// The gate of a step of keys.
struct GateStep {
  float gate;
  int sums;  // in gates.h's: those of the CTA's first 64 keys
};

// Where a step of keys is, for biases and dropout.
struct PairStep {
  int query;      // the first
  int head;       // query head
  int bias_tile;  // see Bias; -1: none
};

// The message to the storer about a step of keys.
struct StoreOrder {
  int flags;
  int subtiles;  // of dS, 64 x 64 each: where the first of the step goes
};

template <typename Config>
struct BackwardShared {
  using Element = typename Config::Element;
  static constexpr int kStages = Config::kStages, kScoreStages = Config::kScoreStages;
  // Places of steps: those of keys, then those of queries, which share memory with the former. Whoever loads waits for
  // all of the other kind to be free.
  static constexpr int kPlaces = Config::kStages + Config::kQueryStages;
  static constexpr int kKeyElements = Config::kChunks * Config::kTileKv * kChunk;
  static constexpr int kItems = 4;
  static constexpr int kOrders = 8;  // the storer may be some steps behind the consumers, the loader kStages ahead
  static_assert(kStages + kScoreStages + 2 <= kOrders);

  // Tiles are [chunk][row][64 columns], swizzled.
  alignas(1024) Element key[kKeyElements];
  alignas(1024) Element value[kKeyElements];
  alignas(1024) Element first[kStages][Config::kFirstBytes / 2];
  alignas(1024) Element second[kStages][Config::kSecondBytes / 2];
  alignas(1024) Element scores[kScoreStages][Config::kKeyGroups][kSubtileElements];  // dS, [key][query]
  alignas(16) float probs[Config::kSplit ? Config::kProbStages : 1][Config::kSplit ? 8 * kWarpgroup * 4 : 4];
  alignas(16) uint8_t bits[kStages][64 * 16];     // bit tile of a step: [query][keys of the block / 8]
  alignas(16) float statistics[kStages][3][64];   // of the queries: lse, delta, rest, as RowStatistics has them
  int flags[kPlaces];                             // of a step
  GateStep gates[Config::kGated ? kStages : 1];   // of a step of keys
  PairStep pairs[Config::kExtras ? kStages : 1];  // likewise
  StoreOrder orders[kOrders];                     // of the CTA's steps of keys
  BackwardItem items[kItems];
  Barrier full_item[kItems], empty_item[kItems];
  Barrier full_key[2], empty_key[2];  // of an item of keys: what each consumer warpgroup reads of keys and values
  Barrier open_item[kItems];          // the other kind's steps have left the memory
  Barrier full[kPlaces], empty[kPlaces];
  Barrier full_scores[kScoreStages][Config::kKeyGroups], empty_scores[kScoreStages][Config::kKeyGroups];
  Barrier full_probs[2], empty_probs[2];  // of all threads: each hands its words to one of the other warpgroup
  Barrier open;                           // never completes a phase

  // Memory of a place: queries, or keys; output gradients, or dS.
  __device__ __forceinline__ Element* First(int place) {
    const int stage = place < kStages ? place : place - kStages, extra = stage - kStages;
    return extra < 0 ? first[stage] : key + extra * (Config::kFirstBytes / 2);
  }
  __device__ __forceinline__ Element* Second(int place) {
    const int stage = place < kStages ? place : place - kStages, extra = stage - kStages;
    return extra < 0 ? second[stage] : value + extra * (Config::kSecondBytes / 2);
  }

  __device__ __forceinline__ void Init() {
    using device::sm90::InitBarrier;
    constexpr int kWarps = 4 * Config::kConsumers;
    for (int i = 0; i < kItems; ++i) {
      InitBarrier(full_item[i], 1);
      InitBarrier(empty_item[i], (kWarps + 3) * kReleasesPerWarp);
    }
    for (int i = 0; i < 2; ++i) {
      InitBarrier(full_key[i], 1);
      InitBarrier(empty_key[i], 4);
    }
    for (int i = 0; i < kItems; ++i) InitBarrier(open_item[i], 1);
    for (int i = 0; i < kPlaces; ++i) {
      InitBarrier(full[i], 1);
      InitBarrier(empty[i], Config::kEveryThreadArrives ? Config::kConsumerThreads : kWarps);
    }
    for (int i = 0; i < kScoreStages; ++i)
      for (int group = 0; group < Config::kKeyGroups; ++group) {
        InitBarrier(full_scores[i][group], 4);
        InitBarrier(empty_scores[i][group], 1);
      }
    for (int i = 0; i < 2; ++i) {
      InitBarrier(full_probs[i], kWarpgroup);
      InitBarrier(empty_probs[i], kWarpgroup);
    }
    InitBarrier(open, 1);
    device::sm90::FenceBarrierInit();
  }
};

}  // namespace jax_bsk::attention::cuda::sm90
