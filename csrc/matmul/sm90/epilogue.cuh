// The epilogue takes a warpgroup's finished sums to memory: to 16-bit words, through shared memory, out by the copy
// engine.
//
// A tile's 64 KB take some 2,000 cycles to leave, 32 bytes a cycle, and shared memory has room for half of them. So the
// other half waits in registers, as words, until products of the next tile are under way: 1,000 cycles between tiles.
#pragma once

#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/matrix.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"
#include "matmul/sm90/shared.cuh"

namespace jax_bsk::matmul::cuda::sm90 {

// The target of 64 columns of a warpgroup's sums: a box of the result's tensor map, or nowhere.
struct Box {
  int c0, c1, c2;
  bool stored = true;
};

// kColumns: of the sums, 256 or 128. kTransposed: the result's rows are the columns of the sums. Box of(info, chunk) is
// called with the numbers of the chunks of 64 columns.
template <typename Element, int kColumns, bool kTransposed>
class Epilogue {
 public:
  __device__ Epilogue(Shared<Element>& shared, const CUtensorMap& map, int warpgroup)
      : staging_(shared.staging[warpgroup]), map_(map), barrier_(1 + warpgroup) {}

  // Sends the first half of a tile, and keeps the other.
  template <typename BoxOf>
  __device__ __forceinline__ void Take(const float (&sums)[kColumns / 2], const StepInfo& info, const BoxOf& of) {
    Flush(of);  // if the tile was so short that the one before it waits still
    uint32_t words[kWords];
    Pack<0>(sums, words);
    Send<0>(words, info, of);
    if constexpr (kColumns == 2 * kHalf) {
      Pack<1>(sums, kept_);
      device::sm90::Pin(kept_);  // now: the sums' registers are the next tile's
      kept_info_ = info;
      keeps_ = true;
    }
  }

  // Sends what is kept, if anything is. Called with products under way, which take longer.
  template <typename BoxOf>
  __device__ __forceinline__ void Flush(const BoxOf& of) {
    if constexpr (kColumns == 2 * kHalf) {
      if (keeps_) Send<1>(kept_, kept_info_, of);
      keeps_ = false;
    }
  }

  // Sends what is kept, and waits until all results are in memory.
  template <typename BoxOf>
  __device__ __forceinline__ void Finish(const BoxOf& of) {
    Flush(of);
    device::sm90::WaitForStores();
  }

 private:
  static constexpr int kChunks = 2;  // of 64 columns, in a half
  static constexpr int kHalf = kChunks * kPiece;
  static constexpr int kWords = kHalf / 4;  // a thread's: 64 rows of them by 128 threads, two elements each

  template <int kWhich>
  __device__ __forceinline__ static void Pack(const float (&sums)[kColumns / 2], uint32_t (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float* pair = sums + 2 * (kWhich * kWords + i);
      words[i] = device::PackPair<Element>(pair[0], pair[1]);
    }
  }

  template <int kWhich, typename BoxOf>
  __device__ __forceinline__ void Send(const uint32_t (&words)[kWords], const StepInfo& info, const BoxOf& of) {
    const int thread = device::ThreadHere() % 128, lane = thread % 32, warp = thread / 32;
    if (thread == 0) device::sm90::WaitForStoresRead<0>();
    device::sm90::SyncNamed(barrier_, 128);
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const Element* chunk = staging_[i / 4];
      const int n = i % 4;
      // Four words are four 8x8 matrices: rows 0-7 and 8-15 of the first eight columns, then of the next eight.
      if constexpr (kTransposed) {
        const int row = 16 * n + lane / 16 * 8 + lane % 8, column = 2 * warp + lane / 8 % 2;
        device::sm90::StoreMatricesTransposed(Eight(chunk, row, column), words + 4 * i);
      } else {
        device::sm90::StoreMatrices(Eight(chunk, 16 * warp + lane % 16, 2 * n + lane / 16), words + 4 * i);
      }
    }
    device::sm90::FenceAsyncProxy();
    device::sm90::SyncNamed(barrier_, 128);
    if (thread != 0) return;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const Box box = of(info, kWhich * kChunks + i);
      if (box.stored) device::sm90::StoreBox(map_, staging_[i], box.c0, box.c1, box.c2, 0);
    }
    device::sm90::CommitStores();
  }

  // Eight elements of a row of 64 in swizzled shared memory.
  __device__ __forceinline__ static uint32_t Eight(const Element* chunk, int row, int column) {
    return device::SharedAddress(chunk) + row * 128 + ((column ^ (row % 8)) << 4);
  }

  Element (&staging_)[kChunks][kPieceElements];
  const CUtensorMap& map_;
  const int barrier_;
  bool keeps_ = false;
  StepInfo kept_info_;
  uint32_t kept_[kWords];
};

}  // namespace jax_bsk::matmul::cuda::sm90
