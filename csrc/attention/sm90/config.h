// Tile shapes of the Hopper kernels (TMA + wgmma, sm_90a), and their launchers. No kernel code here: the host's
// compiler reads it, too.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"
#include "attention/sm90/bwd_plan.h"
#include "attention/variant.h"
#include "device/element.h"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // queries of a consumer warpgroup: m of wgmma
constexpr int kChunk = 64;          // columns that share a 128-byte swizzled row of shared memory
constexpr int kMaxPieces = 2;       // pieces of a key/value tile that come from different blocks

// Rows of a dense bias are counted in 32 bits, up to 127 of them at a time.
inline bool TakesBias(const Bias& bias) { return bias.dense == nullptr || bias.dense_kv <= int64_t{1} << 24; }

// Features are compiled in. kPlain: scale > 0 and no soft cap, so that a logit is a multiple of the product. kGated:
// with gates. A soft cap and gates together have no variant: there are no registers for both. kExtras: a bias or
// dropout, each a branch at run time.
template <Features kFeatures>
struct FeaturesConfig {
  static_assert(kFeatures == Features::kPlain || kFeatures == Features::kSoftCap ||
                kFeatures == Features::kPlainGated || kFeatures == Features::kPlainExtras);
  static constexpr bool kPlain = kFeatures != Features::kSoftCap;
  static constexpr bool kGated = kFeatures == Features::kPlainGated;
  static constexpr bool kExtras = kFeatures == Features::kPlainExtras;
};

// kDim: columns of the products (64, 96, 128 or 256); head_dim and value_dim are padded to it with zeros by the copy
// engine. kConsumers: warpgroups that share a tile of 64 * kConsumers queries, keys and values:
//   2  one persistent CTA a multiprocessor; the warpgroups take turns at the tensor cores. For blocks of 128 queries.
//   1  two CTAs a multiprocessor, one tile each: for blocks of 64 queries, and where 128-query tiles are too few to
//      fill the chip. kFeeder: three persistent CTAs a multiprocessor, each with one producer warp and steps of 64
//      keys, for many tiles, above all of short rows: those mostly wait for their list, their first keys and their
//      output, and the other CTAs' products hide that.
template <typename Element_, int kDim_, Tile kTile, Features kFeatures>
struct ForwardConfig : FeaturesConfig<kFeatures> {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kConsumers = kTile == Tile::k128 ? 2 : 1;
  static constexpr bool kFeeder = kTile == Tile::k64Feeder;
  static_assert(!kFeeder || kDim == 64, "three CTAs have 128 registers a thread, and 75 KB of shared memory each");

  static constexpr int kChunks = (kDim + kChunk - 1) / kChunk;
  static constexpr int kTileQ = kWarpgroupRows * kConsumers;
  // At 256 dimensions 128 keys do not fit beside the output in registers; for two CTAs of 128 not in shared memory.
  static constexpr int kTileKv = kFeeder || kDim > 128 || (kConsumers == 1 && kDim > 64) ? 64 : 128;
  // Buffers of keys and of values. The keys' latency is what a step waits for, so they get the shared memory that is
  // left (three at 128 dimensions, where random blocks come from L2).
  static constexpr int kKeyStages = kFeeder || (kDim == 64 && kConsumers == 2) ? 4 : kDim > 128 ? 2 : 3;
  static constexpr int kValueStages = kFeeder ? 3 : kDim == 64 && kConsumers == 2 ? 4 : 2;
  // Queries as register operands: a quarter less shared memory traffic, +3 to 4.5 % (H200).
  static constexpr bool kQueryInRegisters = kDim <= 128;
  // With queries in registers their buffer is free for the next tile's, whose first product then runs during this one's
  // epilogue. (Not with extras: there it gained nothing.)
  static constexpr bool kOverlapTiles = kQueryInRegisters && kFeatures != Features::kPlainExtras;
  // Warps of the producer's warpgroup that have nothing else to do, and find what a step adds.
  static constexpr int kHelperWarps = kFeatures == Features::kPlainExtras ? 2 : 0;
  static constexpr int kCtas = kFeeder ? 3 : kConsumers == 2 || kDim > 128 ? 1 : 2;  // a multiprocessor
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers;
  // The producer is two warps, in a warpgroup of their own because registers move between warpgroups; or the feeder.
  static constexpr int kThreads = kConsumerThreads + (kFeeder ? 32 : kWarpgroup);
  // A lone consumer of one CTA has registers enough from the start.
  static constexpr bool kMoveRegisters = kConsumers == 2 || kCtas == 2;
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 200 : kDim > 96 ? 232 : 216;
  // What is left of the 168 (two consumers) or 128 a thread that the CTA starts with.
  static constexpr int kProducerRegisters = kConsumers == 1 ? 56 : 504 - 2 * kConsumerRegisters;
};

// Bytes of dynamic shared memory, for refusals; the kernel asserts that its struct is no larger.
template <typename Config>
constexpr int ForwardSharedBytes() {
  constexpr int kRow = Config::kChunks * kChunk * 2;
  return Config::kTileQ * kRow + (Config::kKeyStages + Config::kValueStages) * Config::kTileKv * kRow +
         Config::kKeyStages * Config::kTileQ * 16 +
         (Config::kExtras ? 2 * Config::kKeyStages * Config::kTileQ * 16 + Config::kTileKv * 32 + 1024 : 0) +
         (Config::kFeeder ? 2048 : 1024);
}

// The backward. One persistent CTA a multiprocessor; two consumer warpgroups, and one of four producer warps. A CTA
// makes dK and dV of kTileKv keys, or dQ of one block of queries.
//   kSplit false  each consumer warpgroup has 64 of 128 keys and makes both gradients.
//          true   both have the same 64 keys: one makes P and dV, the other dP, dS and dK. For blocks of 64 keys, few
//                 tiles, and 256 dimensions, whose two gradients do not fit in one warpgroup's registers.
template <typename Element_, int kDim_, Tile kTile, Features kFeatures>
struct BackwardConfig : FeaturesConfig<kFeatures> {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kSplit = kTile == Tile::k64;

  static constexpr int kChunks = (kDim + kChunk - 1) / kChunk;
  static constexpr int kConsumers = 2;
  static constexpr int kKeyGroups = kSplit ? 1 : 2;  // of 64 keys
  static constexpr int kTileKv = kWarpgroupRows * kKeyGroups;
  static constexpr int kStages = kDim == 64 ? 4 : kDim > 128 ? 2 : 3;
  // Who releases a step's memory: every thread for itself, or one a warp. The latter is 6 % faster with 128 keys, but
  // compute-sanitizer's racecheck does not see that the other lanes have read before; for it the library is built with
  // JAX_BSK_RACECHECK.
#ifdef JAX_BSK_RACECHECK
  static constexpr bool kEveryThreadArrives = true;
#else
  static constexpr bool kEveryThreadArrives = kSplit;
#endif
  // Buffers of dS a group of 64 keys, on their way out.
  static constexpr int kScoreStages = kDim > 128 ? 1 : kDim == 128 && !kSplit ? 3 : 2;
  static constexpr int kProbStages = !kSplit ? 0 : kDim > 128 ? 1 : 2;  // buffers of P, from warpgroup to warpgroup
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = 56;
  // Bytes of the two tiles of a stage, of 64 rows: queries and output gradients; or keys and up to two pieces of dS.
  static constexpr int kFirstBytes = kChunks * kChunk * 64 * 2;
  static constexpr int kSecondBytes = kFirstBytes < 2 * 8192 ? 2 * 8192 : kFirstBytes;
  // An item of queries has nothing that stays: it uses the resident keys' and values' memory for more stages. What it
  // reads comes from device memory rather than L2, and four stages instead of three took 15 % off its time.
  static constexpr int kResidentBytes = kChunks * kChunk * kTileKv * 2;
  static constexpr int kQueryStages =
      kStages + kResidentBytes / (kFirstBytes > kSecondBytes ? kFirstBytes : kSecondBytes);
};

template <typename Config>
constexpr int BackwardSharedBytes() {
  return 2 * Config::kTileKv * Config::kChunks * kChunk * 2 +
         Config::kStages * (Config::kFirstBytes + Config::kSecondBytes + 1792) +
         Config::kScoreStages * Config::kKeyGroups * 8192 + Config::kProbStages * 16384 + 1536;
}

// On the current device, which has `multiprocessors`. `tile_counter` is one word of device memory that the launch may
// overwrite. Defined in fwd.cuh.
template <typename Config>
cudaError_t LaunchForward(const ForwardParams& params, int32_t* tile_counter, int multiprocessors, cudaStream_t stream);

// The same for the backward, in bwd.cuh: what prepare.h and gates.h put into the workspace must be there, and what the
// inexact tiles and the sums of gates that it leaves call for comes after it.
template <typename Config>
cudaError_t LaunchBackward(const BackwardParams& params, const BackwardLayout& layout, void* workspace,
                           int multiprocessors, cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda::sm90
