// Tile shapes of the portable kernels (mma.sync + cp.async, sm_80 and newer), and their launchers. No kernel code here:
// the host's compiler reads it, too.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "attention/params.h"
#include "attention/variant.h"
#include "device/element.h"

namespace jax_bsk::attention::cuda::sm80 {

// Rows of a kernel tile whose operand stays (queries of the forward and dQ, keys of dK and dV): the largest that
// divides every supported block.
constexpr int kTile = 64;

// Gates, biases and dropout are branches at run time of the variants kAny and kExtended, and compiled out of kUngated.
// One variant has all of them (kAny) for float32, but for the forward of 256 dimensions (where the gates' branch took
// 2.5 % of a call without gates), the backward of 128 and that of 256 (whose dQ would spill). Of the 16-bit kernels the
// gates' branch alone took 2.3 to 2.7 % of a backward without gates (H200).
template <Features kFeatures>
struct ExtrasConfig {
  static_assert(kFeatures == Features::kAny || kFeatures == Features::kUngated || kFeatures == Features::kExtended);
  static constexpr bool kMayBeExtended = kFeatures != Features::kUngated;
  static constexpr bool kAlwaysExtended = kFeatures == Features::kExtended;
};

// Four warps, each with 16 * kRowTiles query rows. Two row tiles a warp halve the shared memory traffic of keys and
// values per product, where the accumulators leave room (up to 128 dimensions, with extras 64: variants.py) and blocks
// are 128 queries.
template <typename Element_, int kDim_, Tile kTile_, Features kFeatures>
struct ForwardConfig : ExtrasConfig<kFeatures> {
  using Element = Element_;
  static constexpr int kDim = kDim_;  // of rows in shared memory: head_dim and value_dim, zero-padded
  static constexpr int kRowTiles = kTile_ == Tile::k128 ? 2 : 1;
  static constexpr int kThreads = 128;
  static constexpr int kTileQ = kTile * kRowTiles;
  static constexpr int kTileKv = kDim > 128 ? 32 : 64;  // 64 would spill beside the output accumulator
  static_assert(kDim * kRowTiles <= 256, "the output accumulator takes kDim * kRowTiles / 2 registers");
};

// dQ: four warps over 64 queries. dK and dV: four warps over 64 keys, each with both accumulators (kDim registers). At
// 128 dimensions this leaves registers for 32 queries at a time; at 256 it is all there is, so eight warps share the
// work: four make dV and four dK, from the same tiles. Rows of 512 bytes leave no registers for 32 queries and gates
// (60 bytes spill at 256 dimensions), so that kExtended has 16 queries there, and kUngated 32.
template <typename Element_, int kDim_, Tile kTile_, Features kFeatures>
struct BackwardConfig : ExtrasConfig<kFeatures> {
  using Element = Element_;
  static_assert(kTile_ == Tile::k64);
  static constexpr int kDim = kDim_;
  static constexpr bool kSplit = kDim > 128;
  static constexpr int kQueryTileKv =  // keys at a time for dQ; 32 would spill beside extras
      kDim <= 128                       ? 64
      : kFeatures == Features::kUngated ? 32
                                        : 16;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Element));
  static constexpr int kKeyTileQ =  // queries at a time for dK and dV
      kDim <= 64                                                                 ? 64
      : kRowBytes < 512 || (kRowBytes == 512 && kFeatures == Features::kUngated) ? 32
                                                                                 : 16;
  static constexpr int kQueryThreads = 128;
  static constexpr int kKeyThreads = kSplit ? 256 : 128;
};

// Bytes of dynamic shared memory, for refusals; the kernels assert that their structs are no larger.
template <typename Config>
constexpr int ForwardSharedBytes() {
  return (Config::kTileQ + 2 * Config::kTileKv) *
             (Config::kDim * static_cast<int>(sizeof(typename Config::Element)) + 16) +
         128;
}
template <typename Config>
constexpr int BackwardSharedBytes() {
  return 2 * (kTile + std::max(Config::kQueryTileKv, Config::kKeyTileQ)) *
             (Config::kDim * static_cast<int>(sizeof(typename Config::Element)) + 16) +
         2048;
}

// On the current device. Defined in fwd.cuh and bwd.cuh.
template <typename Config>
cudaError_t LaunchForward(const ForwardParams& params, cudaStream_t stream);

// Which tiles of 64 the backward is to do: all, or those that another kernel marked because it could not be exact.
struct BackwardMarks {
  const int32_t* queries = nullptr;  // [batch, heads, tiles], not 0 = to be done; null: all
  const int32_t* keys = nullptr;     // [batch, kv_heads, tiles]
  int ctas = 1;                      // that look at marks
};
// `gate_sums` as in attention/gates.h, for params with gates.
template <typename Config>
cudaError_t LaunchBackward(const BackwardParams& params, const BackwardMarks& marks, float* gate_sums,
                           cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda::sm80
