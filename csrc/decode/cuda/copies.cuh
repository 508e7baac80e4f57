// From the steps of a unit to rows of keys and values in shared memory.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "decode/cuda/sequence.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"

namespace jax_bsk::decode::cuda {

// A key of a step as its consumers see it: its position in the sequence; kNoKey where there is none; ~position where
// its page cannot be true.
constexpr int kNoKey = static_cast<int>(0x80000000u);

template <typename Config>
struct Stage {
  device::SwizzledTile<typename Config::Cache, Config::kTileKv, Config::kDim> key, value;
};

// What a thread finds out about a row of a step.
struct FoundRow {
  int row;  // of the cache of all groups, in positions
  int key;
};
constexpr FoundRow kNoRow = {0, kNoKey};

// Row `at` of the visited step number `step`, of a sequence and key/value head.
__device__ __forceinline__ FoundRow FindRow(const KernelParams& params, int table, int group, int kv_head, int kv_len,
                                            const Steps& steps, int step, int at) {
  const int page_size = params.by_page_size.value();
  int key, page;
  if (params.selection == nullptr) {
    key = steps[step] * kStepKeys + at;
    page = params.by_page_size.Quotient(key);
  } else {
    const int place = step * kStepKeys + at, index = params.by_page_size.Quotient(place);
    if (index >= params.selected) return kNoRow;
    page = __ldg(params.selection + (int64_t{table} * params.kv_heads + kv_head) * params.selected + index);
    if (page < 0 || page >= params.max_pages) return kNoRow;
    key = page * page_size + (place - index * page_size);
  }
  if (key >= kv_len) return kNoRow;
  const int physical = __ldg(params.page_indices + int64_t{table} * params.max_pages + page);
  if (physical < 0 || physical >= params.pages) return {0, ~key};
  return {(group * params.pages + physical) * page_size + (key - page * page_size), key};
}

// The same of the visited blocks of a list, and the bit tile of the step's block, or -1.
__device__ __forceinline__ FoundRow FindListed(const KernelParams& params, int group, int kv_len, int step, int at,
                                               int* tile) {
  const int entry = params.block_steps == 1 ? step : step / 2;  // blocks are 64 or 128 keys
  const int64_t position = Sequence::ListOf(params, group).begin + entry;
  const int block = __ldg(params.rows.ids + position), number = __ldg(params.rows.tiles + position);
  *tile = -1;
  if (block < 0 || block >= params.rows.ids_end || number < -1 || number >= params.bit_tiles.count) return {0, ~0};
  *tile = number;
  const int key = block * params.block_kv + (step - entry * params.block_steps) * kStepKeys + at;
  if (key >= kv_len) return kNoRow;
  return {group * params.by_page_size.value() + key, key};
}

// The row that a lane finds, of its warp's 16; two lanes have each.
__device__ __forceinline__ int RowOfLane(int warp, int lane) { return 2 * warp + lane % 2 + lane % 16 / 2 * 8; }

// Starts a thread's part of the copies of a step whose rows its warp found: kChunks lanes take a row at a time.
template <typename T>
__device__ __forceinline__ void CopyRows(T& tile, const Rows& rows, const FoundRow& found, int kv_head, int dim) {
  constexpr int kLanes = T::kChunks < 32 ? T::kChunks : 32, kRowsAtOnce = 32 / kLanes;
  static_assert(T::kRows == 64 && T::kChunks % kLanes == 0);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto* first = static_cast<const typename T::Element*>(rows.first) + kv_head * rows.head_stride;
  // Unrolled whole, the addresses would spill; at 256 dimensions, or of bytes, two rows' already do on sm_80.
  constexpr int kUnroll = T::kDim > 128 || sizeof(typename T::Element) == 1 ? 1 : 4;
#pragma unroll kUnroll
  for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    const int source = i * kRowsAtOnce + lane / kLanes;
    const int row = __shfl_sync(0xFFFFFFFFu, found.row, source);
    const int key = __shfl_sync(0xFFFFFFFFu, found.key, source);
#pragma unroll
    for (int part = 0; part < T::kChunks / kLanes; ++part) {
      const int chunk = part * kLanes + lane % kLanes;
      const bool valid = key >= 0 && chunk * T::kPerChunk < dim;
      const auto* from = first + (valid ? row * rows.stride + chunk * T::kPerChunk : 0);
      device::CopyAsync16(device::SharedAddress(tile.Chunk(RowOfLane(warp, source), chunk)), from, valid);
    }
  }
}

#if __CUDA_ARCH__ >= 900
// The same by the copy engine: starts the copies of a step, in boxes of rows that follow each other in the cache. A box
// whose first row is none is not read, and its part of the tiles keeps what it has; the rows of a box behind the
// sequence's last are whatever follows there. Both are masked: what is not finite in them is cleaned. One warp calls
// it, a lane of which has found its row and the 32nd behind it.
template <typename Config>
__device__ __forceinline__ void StartBoxes(Stage<Config>& stage, device::sm90::Barrier& full, const CacheMaps& maps,
                                           const FoundRow (&found)[2], int kv_head) {
  using Tile = decltype(stage.key);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool begins[2] = {(lane & (maps.rows - 1)) == 0 && found[0].key >= 0,
                          (lane & (maps.rows - 1)) == 0 && maps.rows <= 32 && found[1].key >= 0};
  const int boxes = __popc(__ballot_sync(0xFFFFFFFFu, begins[0])) + __popc(__ballot_sync(0xFFFFFFFFu, begins[1]));
  if (lane == 0) device::sm90::ArriveExpecting(full, boxes * maps.rows * 2 * Tile::kPanels * 128);
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!begins[half]) continue;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int offset = panel * Tile::kPanelBytes + (lane + 32 * half) * 128;
      device::sm90::LoadBox(stage.key.data + offset, maps.key, full, panel * 128, found[half].row, kv_head, 0);
      device::sm90::LoadBox(stage.value.data + offset, maps.value, full, panel * 128, found[half].row, kv_head, 0);
    }
  }
}
#endif

}  // namespace jax_bsk::decode::cuda
