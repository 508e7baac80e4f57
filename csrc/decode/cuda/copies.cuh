// From the steps of a unit to rows of keys and values in shared memory.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "decode/cuda/sequence.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"

namespace jax_bsk::decode::cuda {

// A key of a step as its consumers see it: its position in the sequence; kNoKey where there is none; ~position where
// its page cannot be true.
constexpr int kNoKey = static_cast<int>(0x80000000u);

template <typename Config>
struct Stage {
  device::Tile<typename Config::Element, Config::kTileKv, Config::kDim> key, value;
};

// What a thread finds out about a row of a step.
struct FoundRow {
  int row;  // of the cache of all groups, in positions
  int key;
};

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
    if (index >= params.selected) return {0, kNoKey};
    page = __ldg(params.selection + (int64_t{table} * params.kv_heads + kv_head) * params.selected + index);
    if (page < 0 || page >= params.max_pages) return {0, kNoKey};
    key = page * page_size + (place - index * page_size);
  }
  if (key >= kv_len) return {0, kNoKey};
  const int physical = __ldg(params.page_indices + int64_t{table} * params.max_pages + page);
  if (physical < 0 || physical >= params.pages) return {0, ~key};
  return {(group * params.pages + physical) * page_size + (key - page * page_size), key};
}

template <typename Config, Copies kCopies = Config::kCopies>
class StageCopies;

// ---- 16 bytes at a time

template <typename Config>
class StageCopies<Config, Copies::kVectors> {
 public:
  struct Shared {};
  static __device__ __forceinline__ void Init(Shared&) {}

  // The row that a thread finds: of its warp's 16, which two threads have each.
  static __device__ __forceinline__ int Row() { return RowOf(static_cast<int>(threadIdx.x) % 32); }
  static __device__ __forceinline__ bool Publishes() { return threadIdx.x % 32 < 16; }

  static __device__ __forceinline__ void Start(const KernelParams& params, Shared&, Stage<Config>& stage, int,
                                               const FoundRow& found, int kv_head) {
    CopyRows(stage.key, params.key, found, kv_head, params.dim);
    CopyRows(stage.value, params.value, found, kv_head, params.value_dim);
  }
  // A group for each step, and an empty one where there is none any more.
  static __device__ __forceinline__ void Started() { device::CommitCopies(); }

  // Until the stage is here and nobody reads the one before, which `start` may then fill.
  template <typename Start>
  static __device__ __forceinline__ void Next(Shared&, int, uint32_t, const Start& start) {
    device::WaitForGroups<Config::kStages - 2>();
    __syncthreads();
    start();
  }

 private:
  static __device__ __forceinline__ int RowOf(int lane) {
    return 2 * (static_cast<int>(threadIdx.x) / 32) + lane % 2 + lane % 16 / 2 * 8;
  }

  // kChunks lanes take a row at a time, of the one that found it.
  template <typename T>
  static __device__ __forceinline__ void CopyRows(T& tile, const Rows& rows, const FoundRow& found, int kv_head,
                                                  int dim) {
    constexpr int kLanes = T::kChunks < 32 ? T::kChunks : 32, kRowsAtOnce = 32 / kLanes;
    static_assert(T::kRows == 64 && T::kChunks % kLanes == 0);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto* first = static_cast<const typename T::Element*>(rows.first) + kv_head * rows.head_stride;
    // Unrolled whole, the addresses would spill; at 256 dimensions on sm_80 two rows' already do.
    constexpr int kUnroll = T::kDim > 128 ? 1 : 4;
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
        device::CopyAsync16(device::SharedAddress(tile.Chunk(RowOf(source), chunk)), from, valid);
      }
    }
  }
};

// ---- A row at a time, by the copy engine

// A row that is not there keeps what the stage had before. That reaches nobody: its pairs are masked, and in a masked
// step the consumers zero what is not finite.
template <typename Config>
class StageCopies<Config, Copies::kRows> {
 public:
  struct Shared {
    device::sm90::Barrier full[Config::kStages];  // a warp each arrives, and its rows' bytes
  };
  // A barrier of the CTA must follow.
  static __device__ __forceinline__ void Init(Shared& shared) {
    if (threadIdx.x != 0) return;
#pragma unroll
    for (auto& barrier : shared.full) device::sm90::InitBarrier(barrier, Config::kWarps);
    device::sm90::FenceBarrierInit();
  }

  // Two warps find and copy the keys' rows, the others those of the values.
  static __device__ __forceinline__ int Row() { return static_cast<int>(threadIdx.x) % 64; }
  static __device__ __forceinline__ bool Publishes() { return threadIdx.x < 64; }

  static __device__ __forceinline__ void Start(const KernelParams& params, Shared& shared, Stage<Config>& stage,
                                               int number, const FoundRow& found, int kv_head) {
    constexpr int kBytes = Config::kDim * static_cast<int>(sizeof(typename Config::Element));
    const uint32_t there = __ballot_sync(0xFFFFFFFFu, found.key >= 0);
    if (threadIdx.x % 32 == 0) device::sm90::ArriveExpecting(shared.full[number], kBytes * __popc(there));
    if (found.key < 0) return;
    const bool is_key = threadIdx.x < 64;
    const Rows& rows = is_key ? params.key : params.value;
    const auto* from = static_cast<const typename Config::Element*>(rows.first) + kv_head * rows.head_stride +
                       found.row * rows.stride;
    device::sm90::LoadBytes((is_key ? stage.key : stage.value).Chunk(Row(), 0), from, shared.full[number], kBytes);
  }
  static __device__ __forceinline__ void Started() {}

  template <typename Start>
  static __device__ __forceinline__ void Next(Shared& shared, int number, uint32_t parity, const Start& start) {
    device::sm90::FenceAsyncProxy();  // what this thread did in the stage before comes before the next copies
    __syncthreads();
    start();
    device::sm90::Wait(shared.full[number], parity);
  }
};

}  // namespace jax_bsk::decode::cuda
