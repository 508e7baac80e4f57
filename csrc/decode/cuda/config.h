// Shapes of the decoding kernels, what they are given, and their launcher. No kernel code here: the host's compiler
// reads it, too.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "decode/params.h"
#include "decode/partials.h"
#include "device/divisor.h"
#include "device/element.h"
#include "device/host.h"
#include "lists/block_list.h"

namespace jax_bsk::decode::cuda {

// Where a row's keys come from: pages of a cache that sequences share, or the blocks that a block list visits of keys
// that lie in a row (attention/params.h), of which an example is one sequence.
enum class Keys { kPaged, kListed };

// A CTA of four warps takes steps of 64 keys. Of 16 rows or fewer, each warp has all of them and 16 of the keys; of
// more, each warp has 16 rows and all keys. The products are mma.sync: memory is what bounds decoding.
template <typename Element_, typename Cache_, int kDim_, Keys kKeys>
struct Config {
  using Element = Element_;  // of queries and output
  using Cache = Cache_;      // of keys and values: the same, or one of a byte, which the products widen
  static constexpr bool kQuantised = sizeof(Cache) == 1;
  // Bytes widen to float16 in half of the instructions that bfloat16 takes, and exactly: their products are float16's.
  using Product = std::conditional_t<kQuantised, device::Float16, Element>;
  static constexpr int kDim = kDim_;  // of rows in shared memory: head_dim and value_dim, zero-padded
  static constexpr bool kListed = kKeys == Keys::kListed;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = 4;
  static constexpr int kTileKv = 64;
  static constexpr int kNarrowRows = 16;
  static constexpr int kWideRows = 64;
  static constexpr bool kHalf = sizeof(Element) == 2;
  // Queries stay in registers where there is room (256 dimensions would spill 1,260 bytes).
  static constexpr bool kQueriesInRegisters = kHalf && kDim <= 128;
  // Steps on their way and those that are computed: as many as two CTAs of a multiprocessor have room for.
  static constexpr int kStages = kQuantised ? 6 : kHalf && kDim <= 128 ? 3 : 2;
  static constexpr int kCtas = kDim * sizeof(Element) <= 256 ? 2 : 1;  // of a multiprocessor
  // Rows of the output on their way out go through the stage that was used last, so many of their columns at a time.
  static constexpr int kStageBytes = 2 * kTileKv * kDim * static_cast<int>(sizeof(Cache));
  static constexpr int kOutColumns = kStageBytes / 4 / 64 < kDim ? kStageBytes / 4 / 64 : kDim;
  static_assert(kDim % kOutColumns == 0 && kOutColumns % 32 == 0);
  static_assert(!kQuantised || kQueriesInRegisters, "queries in shared memory are multiplied as they lie");
};

// Keys and values as the copy engine of sm_90 sees them: rows of bytes, of which it copies `rows` at a time, 128 bytes
// wide. 0 rows: the threads copy.
struct CacheMaps {
  CUtensorMap key, value;
  int rows;
};

// What the kernels are given: the call's parameters, and what the host makes of them.
struct KernelParams : ForwardParams {
  int tokens, seqs, sequences;  // of a group, and sequences of all groups
  int pages, max_pages, selected;
  int kv_heads, group_heads;  // heads of the cache, and query heads of each
  int dim, value_dim, partial_dim;
  int sink_group_stride, sink_head_stride;  // of the sinks' array
  device::Divisor by_seqs, by_page_size, by_kv_heads, by_group_heads, by_short_part, by_long_part;  // parts in steps
  int short_parts, long_parts;                                                                      // of a row at most
  int short_places, short_queries;                                                                  // see partials.h
  int32_t* bad_groups;  // [G]: not 0 if the offsets of a group's sequences cannot be true
  float2* short_stats;  // [G, places, N, parts]: maximum and sum of a part's probabilities, in units of log2
  float* short_out;     // [G, places, N, parts, partial_dim]: not divided by the sum
  float2* long_stats;
  float* long_out;

  // With Keys::kListed, where all rows are short:
  lists::BlockList rows;  // of one head, and one row of blocks
  lists::BitTiles bit_tiles;
  lists::Lengths lengths;
  int block_q, block_kv, block_steps;  // of a block of keys
  float* lse_rest;                     // as lse, which is [G, N, T] then
};

// Bytes of shared memory that a CTA needs beside a word for each sequence.
template <typename Config>
constexpr int SharedBytesAtMost() {
  constexpr int kPitch = Config::kDim * static_cast<int>(sizeof(typename Config::Element)) + 16;
  return Config::kStages * Config::kStageBytes + (Config::kQueriesInRegisters ? 1 : Config::kWideRows) * kPitch + 3840;
}

template <typename Config>
cudaError_t Launch(const KernelParams& params, const device::DeviceFacts& facts, cudaStream_t stream);

}  // namespace jax_bsk::decode::cuda
