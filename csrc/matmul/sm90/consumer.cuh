// The consumers of both products: a warpgroup multiplies the stages of a tile and writes its part of the result.
#pragma once

#include "device/tile.cuh"
#include "matmul/sm90/shared.cuh"

namespace jax_bsk::matmul::cuda::sm90 {

// kColumns: of a warpgroup's part, 256 (its own 64 rows of the left operand) or 128 (its own half of the right one).
// kSkips: a stage may be of use to one warpgroup alone.
template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kColumns, int kCluster, bool kSkips>
class Consumer {
 public:
  using Multiply = device::sm90::Multiply<Element, kColumns>;
  static constexpr bool kOwnRows = kColumns == kTileColumns;
  static constexpr int kChunks = kColumns / kPiece;
  static constexpr int kSums = kColumns / 2;  // a thread

  // `rank`: of the CTA in its cluster.
  __device__ Consumer(Shared<Element>& shared, int warpgroup, int rank)
      : shared_(shared),
        warpgroup_(warpgroup),
        rank_(rank),
        left_(device::sm90::TileDescriptor(shared.left[0] + (kOwnRows ? warpgroup * kPieceElements : 0), kPieceBytes)),
        right_(device::sm90::TileDescriptor(shared.right[0] + (kOwnRows ? 0 : warpgroup * kChunks * kPieceElements),
                                            kPieceBytes)) {}

  // Multiplies tile after tile; `store(sums, info)` is called with each.
  template <typename Store>
  __device__ __forceinline__ void Run(Store store) {
    while (true) {
      // ---- A tile's products
      float sums[kSums];
      int accumulate = 0;
      StepInfo info;
      if constexpr (kSkips) {
        // No product is unfinished where a stage may be skipped (ptxas would wait for all of them, C7518): while one
        // warpgroup waits the other multiplies.
        do {
          const int stage = Next(info);
          if (info.flags & StepInfo::kEnd) return;
          if (info.flags & (StepInfo::kUsed << warpgroup_)) {
            MultiplyStage(sums, stage, accumulate);
            device::sm90::WaitForProducts<0>();
            accumulate = 1;
          }
          Release(stage);
        } while (!(info.flags & StepInfo::kLast));
        device::sm90::Pin(sums);
      } else {
        int stage = Next(info), pending = stage;
        if (info.flags & StepInfo::kEnd) return;
        if (info.flags & (StepInfo::kUsed << warpgroup_)) {
          MultiplyStage(sums, stage, 0);
          accumulate = 1;
          while (!(info.flags & StepInfo::kLast)) {
            // One product may be unfinished, so that the next is issued behind it; the stage before is done with.
            stage = Next(info);
            MultiplyStage(sums, stage, 1);
            device::sm90::WaitForProducts<1>();
            Release(pending);
            pending = stage;
          }
          device::sm90::WaitForProducts<0>();
          device::sm90::Pin(sums);
        }
        Release(pending);
      }

      // ---- What is not a sum
      if (accumulate == 0) Fill(sums, 0.f);
      if (info.flags & (StepInfo::kPoisoned << warpgroup_)) Fill(sums, __int_as_float(0x7FC00000));
      store(sums, info);
    }
  }

  // A chunk of 64 columns of the sums, as 16-bit elements, to a box of the result: [64 rows][64 columns], or with
  // kTransposed [64 columns][64 rows].
  template <bool kTransposed>
  __device__ __forceinline__ void StoreChunk(const float* sums, const CUtensorMap& map, int c0, int c1, int c2) {
    const int thread = device::ThreadHere() % 128, lane = thread % 32, warp = thread / 32;
    // Two buffers in turns, whatever the tiles: the other's copy may still be under way, this one's of two chunks ago
    // not.
    Element* staging = shared_.staging[warpgroup_][stored_++ % 2];
    if (thread == 0) device::sm90::WaitForStoresRead<1>();
    Sync();
#pragma unroll
    for (int n = 0; n < kPiece / 16; ++n) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = device::PackPair<Element>(sums[8 * n + 2 * i], sums[8 * n + 2 * i + 1]);
      // The words are four 8x8 matrices: rows 0-7 and 8-15 of the first eight columns, then of the next eight.
      if constexpr (kTransposed) {
        const int row = 16 * n + lane / 16 * 8 + lane % 8, column = 2 * warp + lane / 8 % 2;
        device::sm90::StoreMatricesTransposed(Chunk(staging, row, column), words);
      } else {
        device::sm90::StoreMatrices(Chunk(staging, 16 * warp + lane % 16, 2 * n + lane / 16), words);
      }
    }
    device::sm90::FenceAsyncProxy();
    Sync();
    if (thread == 0) {
      device::sm90::StoreBox(map, staging, c0, c1, c2, 0);
      device::sm90::CommitStores();
    }
  }

  // Until all results are in memory.
  __device__ __forceinline__ void Finish() { device::sm90::WaitForStores(); }

 private:
  // Eight elements of a row of 64 in swizzled shared memory.
  __device__ __forceinline__ static uint32_t Chunk(const Element* piece, int row, int column) {
    return device::SharedAddress(piece) + row * 128 + ((column ^ (row % 8)) << 4);
  }

  // Waits for the next stage and reads its message.
  __device__ __forceinline__ int Next(StepInfo& info) {
    const int stage = place_.Stage();
    device::sm90::Wait(shared_.full[stage], place_.Full());
    info.flags = ReadShared(shared_.steps[stage].flags);
    if (info.flags & StepInfo::kLast) {
      info.row = ReadShared(shared_.steps[stage].row);
      info.column = ReadShared(shared_.steps[stage].column);
      info.batch = ReadShared(shared_.steps[stage].batch);
    }
    place_.Advance();
    return stage;
  }

  __device__ __forceinline__ void Sync() { device::sm90::SyncNamed(1 + warpgroup_, 128); }

  __device__ __forceinline__ static void Fill(float (&sums)[kSums], float value) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = value;
  }

  __device__ __forceinline__ void MultiplyStage(float (&sums)[kSums], int stage, int accumulate) {
    const uint32_t left = __shfl_sync(0xFFFFFFFFu, left_ + stage * (kLeftPieces * kPieceBytes / 16), 0);
    const uint32_t right = __shfl_sync(0xFFFFFFFFu, right_ + stage * (kRightPieces * kPieceBytes / 16), 0);
    device::sm90::FenceProducts();
#pragma unroll
    for (int k = 0; k < kPiece / 16; ++k) {
      Multiply::template Any<kTransposeLeft, kTransposeRight>(
          sums, device::sm90::FullDescriptor(left + k * (kTransposeLeft ? 128 : 2)),
          device::sm90::FullDescriptor(right + k * (kTransposeRight ? 128 : 2)), k == 0 ? accumulate : 1);
    }
    device::sm90::CommitProducts();
  }

  // A stage is written by the producers of all CTAs of the cluster, so all of them are told; this CTA's by lane 0,
  // which has read the stage's message.
  __device__ __forceinline__ void Release(int stage) {
    const int lane = device::ThreadHere() % 32;
    if constexpr (kCluster > 1) {
      if (lane < kCluster) device::sm90::ArriveAt(shared_.empty[stage], lane ^ rank_);
    } else {
      if (lane == 0) device::sm90::Arrive(shared_.empty[stage]);
    }
  }

  Shared<Element>& shared_;
  const int warpgroup_, rank_;
  uint32_t stored_ = 0;          // chunks
  const uint32_t left_, right_;  // descriptors of stage 0
  Ring<kStages> place_;
};

}  // namespace jax_bsk::matmul::cuda::sm90
