// The consumers of both products: a warpgroup multiplies the stages of a tile.
#pragma once

#include "device/ptx/barrier.cuh"
#include "device/ptx/cluster.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "device/ptx/wgmma.cuh"
#include "matmul/sm90/shared.cuh"

namespace jax_bsk::matmul::cuda::sm90 {

// kColumns: of a warpgroup's part, 256 (its own 64 rows of the left operand) or 128 (its own half of the right one).
// kSkips: a stage may be of use to one warpgroup alone.
template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kColumns, int kCluster, bool kSkips>
class Consumer {
 public:
  using Multiply = device::sm90::Multiply<Element, kColumns>;
  static constexpr bool kOwnRows = kColumns == kTileColumns;
  static constexpr int kSums = kColumns / 2;  // a thread

  // `rank`: of the CTA in its cluster.
  __device__ Consumer(Shared<Element>& shared, int warpgroup, int rank)
      : shared_(shared),
        warpgroup_(warpgroup),
        rank_(rank),
        left_(device::sm90::TileDescriptor(shared.left[0] + (kOwnRows ? warpgroup * kPieceElements : 0), kPieceBytes)),
        right_(device::sm90::TileDescriptor(shared.right[0] + (kOwnRows ? 0 : warpgroup * kColumns * kPiece),
                                            kPieceBytes)) {}

  // Multiplies tile after tile; `store.Take(sums, info)` is called with each, and `store.Flush()` while products of the
  // next are under way.
  template <typename Store>
  __device__ __forceinline__ void Run(Store& store) {
    while (true) {
      // ---- A tile's products
      float sums[kSums];
      int accumulate = 0, stages = 0;
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
          if (++stages == kFlushAt) store.Flush();
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
            if (++stages == kFlushAt) store.Flush();
          }
          device::sm90::WaitForProducts<0>();
          device::sm90::Pin(sums);
        }
        Release(pending);
      }

      // ---- What is not a sum
      if (accumulate == 0) Fill(sums, 0.f);
      if (info.flags & (StepInfo::kPoisoned << warpgroup_)) Fill(sums, __int_as_float(0x7FC00000));
      store.Take(sums, info);
    }
  }

 private:
  // The stage of a tile behind which the store may go on: what it sent before has left by then.
  static constexpr int kFlushAt = 3;

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
  // which has read the stage's message. Both arrivals must stay one instruction, behind the warp's last read. Where a
  // stage has nothing from the other CTA's producer, this warp may be a phase ahead of the other CTA, and its arrival
  // there may land before a late one of the phase before and be counted in its place. That is harmless only because
  // the late one has been issued, reads and all: this CTA's stage could not have become free without its twin. With
  // the two arrivals issued apart, a phase could complete while a warp still reads (tests/rings/products.py).
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
  const uint32_t left_, right_;  // descriptors of stage 0
  Ring<kStages> place_;
};

}  // namespace jax_bsk::matmul::cuda::sm90
