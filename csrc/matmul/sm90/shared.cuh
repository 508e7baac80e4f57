// Everything that the warps of a product share: the layout of shared memory, and the messages that travel with the
// stages.
#pragma once

#include <cstdint>

#include "device/ptx/barrier.cuh"
#include "matmul/sm90/config.h"

namespace jax_bsk::matmul::cuda::sm90 {

using device::sm90::Barrier;
using device::sm90::ReadShared;
using device::sm90::Ring;

// One stage, from the producer to the consumers.
struct alignas(16) StepInfo {
  static constexpr int kUsed = 1;      // << warpgroup: it has something to multiply
  static constexpr int kPoisoned = 4;  // << warpgroup: its rows of the tile are NaN; in the last step
  static constexpr int kLast = 16;     // of the tile
  static constexpr int kEnd = 32;      // there are no more tiles
  static constexpr int kValid = 6;     // shift: which entries of a sampled item are to be stored, the others are 0
  static constexpr int kEntries = 10;  // shift: how many there are, less one
  int flags;
  // The position of the tile: rows (entries of a sampled product: the rows of the matrix), columns (entry), batch.
  int row;
  int column;
  int batch;
};

template <typename Element>
struct Shared {
  alignas(1024) Element left[kStages][kLeftPieces * kPieceElements];
  alignas(1024) Element right[kStages][kRightPieces * kPieceElements];
  alignas(1024) Element staging[kConsumers][2][kPieceElements];
  StepInfo steps[kStages];
  Barrier full[kStages], empty[kStages];
  int task;  // the next tile, from the scheduler to the producers
  Barrier full_task, empty_task;

  // Every warp of the consumers of `cluster` CTAs releases a stage.
  __device__ void Init(int cluster) {
    for (int i = 0; i < kStages; ++i) {
      device::sm90::InitBarrier(full[i], 1);
      device::sm90::InitBarrier(empty[i], 4 * kConsumers * cluster);
    }
    device::sm90::InitBarrier(full_task, 1);
    device::sm90::InitBarrier(empty_task, cluster);
    device::sm90::FenceBarrierInit();
  }

  // For the producer's thread: waits for a stage, fills in its message, and opens it for so many bytes.
  __device__ __forceinline__ void Announce(const Ring<kStages>& place, const StepInfo& info, int bytes) {
    const int stage = place.Stage();
    device::sm90::Wait(empty[stage], place.Empty());
    steps[stage] = info;
    if (bytes > 0) {
      device::sm90::ArriveExpecting(full[stage], bytes);
    } else {
      device::sm90::Arrive(full[stage]);
    }
  }
};

}  // namespace jax_bsk::matmul::cuda::sm90
