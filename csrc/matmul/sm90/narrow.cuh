// BSR x dense of few columns on Hopper (sm_90a): bound by reading the blocks. A cluster has one out block; each of its
// CTAs streams a part of the block's entries through a ring of stages and multiplies them by mma.sync, and the parts
// are added through the cluster's shared memory. The design and what it was worth: docs/design/hopper-products.md.
#pragma once

#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cluster.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/matrix.cuh"
#include "device/ptx/thread.cuh"
#include "device/ring.cuh"
#include "matmul/sm90/config.h"

namespace jax_bsk::matmul::cuda::sm90 {

using device::sm90::Barrier;
using device::sm90::kReleasesPerWarp;
using device::sm90::Ring;

// The pipeline of a CTA. `x ==>` is what is filled and announced by barrier full, `<-- x` its release by barrier empty.
//
//   producer (one warp)                consumers (four warps)
//   reads 32 entries at a time
//   stage n =======================>   blocks: 64 of the contracted length x all rows of the out block
//                                      dense: the same 64 x the columns
//     <-- stage n --------------------  by every warp, when it has multiplied it
//   says whether an entry was wrong    sums to shared memory, over the stages
//   -------------------- all CTAs of the cluster meet --------------------
//                                      each adds 32 rows of all CTAs' sums, in the order of the CTAs
//   -------------------- all CTAs of the cluster meet --------------------
//
// Nothing is persistent: a CTA has one tile, and the hardware hands out the next cluster when one is done.

template <typename Element_, int kRows_, int kColumns_>
struct NarrowShared {
  using Element = Element_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kParts = kRows / kNarrowPartRows;  // CTAs of the cluster
  static constexpr int kStageBytes = (kRows + kColumns) * kPiece * 2;
  static constexpr int kStages = kNarrowRingBytes / kStageBytes < 12 ? kNarrowRingBytes / kStageBytes : 12;

  alignas(1024) Element blocks[kStages][kRows * kPiece];
  alignas(1024) Element dense[kStages][kColumns * kPiece];
  Barrier full[kStages], empty[kStages];
  int poisoned;  // an entry of this CTA's part, or the list as a whole

  __device__ void Init() {
    for (int i = 0; i < kStages; ++i) {
      device::sm90::InitBarrier(full[i], 1);
      device::sm90::InitBarrier(empty[i], kNarrowConsumers * kReleasesPerWarp);
    }
    device::sm90::FenceBarrierInit();
  }
};

// A CTA's tile and its part of the out block's stages.
struct NarrowTile {
  int matrix, dense, batch;
  int block;   // the out block
  int piece;   // of the out block: the tile's rows
  int row;     // the tile's first one
  int column;  // the tile's first one
  int begin;   // the first entry of the list
  int stored;  // entries of all the matrix's lists, unless these are wrong
  bool poisoned;
  int64_t first, last;  // stages of the list

  template <typename Shared>
  __device__ __forceinline__ static NarrowTile Of(const ProductParams& params, const NarrowPlan& plan, int rank) {
    NarrowTile x;
    const int pieces = static_cast<int>(params.out_block) / Shared::kRows;  // 1 or 2
    const int tile = static_cast<int>(blockIdx.x) / Shared::kParts, line = tile / plan.groups;
    x.column = (tile - line * plan.groups) * kNarrowColumns;
    const int blocks = static_cast<int>(params.out_blocks), line_block = line / pieces;
    x.piece = line - line_block * pieces;
    x.batch = line_block / blocks;
    x.block = line_block - x.batch * blocks;
    x.row = x.block * static_cast<int>(params.out_block) + x.piece * Shared::kRows;
    x.matrix = params.matrix_batch == 1 ? 0 : x.batch;
    x.dense = params.dense_batch == 1 ? 0 : x.batch;
    const int32_t* offsets = params.lists.offsets + x.matrix * (params.out_blocks + 1);
    const int end = __ldg(offsets + x.block + 1);
    x.begin = __ldg(offsets + x.block);
    x.stored = __ldg(offsets + params.out_blocks);
    x.poisoned = x.begin < 0 || end < x.begin || end > params.capacity;
    const int64_t stages = x.poisoned ? 0 : int64_t{end - x.begin} << plan.shift;
    x.first = stages * rank / Shared::kParts;
    x.last = stages * (rank + 1) / Shared::kParts;
    return x;
  }
};

// ---- Before the lists have been followed, a warp asks for what all CTAs of the matrix will need, to have it in L2: for
// an equal part of the lists, and where that pays of the blocks. So the memory is at work early, and for all
// multiprocessors alike however long the rows of blocks are.
template <typename Shared>
class NarrowPrefetch {
 public:
  __device__ __forceinline__ NarrowPrefetch(const ProductParams& params, const NarrowPlan& plan, const NarrowTile& tile,
                                            int rank)
      : params_(params), plan_(plan), tile_(tile), lane_(threadIdx.x % 32) {
    const int pieces = static_cast<int>(params.out_block) / Shared::kRows;
    part_ = int64_t{tile.block * pieces + tile.piece} * Shared::kParts + rank;
    parts_ = tile.batch == tile.matrix && tile.column == 0 ? params.out_blocks * pieces * Shared::kParts : 0;
  }

  // A line of 32 words a lane, of either list.
  __device__ __forceinline__ void Lists() const {
    if (parts_ == 0) return;
    const int64_t end = params_.capacity * (part_ + 1) / parts_;
    for (int64_t at = params_.capacity * part_ / parts_ + lane_ / 2 * 32; at < end; at += 16 * 32) {
      device::PrefetchL2((lane_ % 2 == 0 ? params_.lists.ids : params_.lists.places) + First() + at);
    }
  }

  __device__ __forceinline__ void Blocks() const {
    if (parts_ == 0 || plan_.prefetched == 0 || tile_.stored <= 0 || tile_.stored > params_.capacity) return;
    constexpr int kUnit = 4096;  // bytes: a half or less of a block
    const int64_t units = int64_t{tile_.stored} * (plan_.prefetched / kUnit), end = units * (part_ + 1) / parts_;
    const auto* data = static_cast<const unsigned char*>(params_.data) + First() * plan_.prefetched;
    for (int64_t unit = units * part_ / parts_ + lane_; unit < end; unit += 32) {
      device::sm90::PrefetchBytes(data + unit * kUnit, kUnit);
    }
  }

 private:
  __device__ __forceinline__ int64_t First() const { return tile_.matrix * params_.capacity; }

  const ProductParams& params_;
  const NarrowPlan& plan_;
  const NarrowTile& tile_;
  const int lane_;
  int64_t part_, parts_;  // this CTA's and all; 0: another tile's CTAs have the same parts
};

// ---- The producer: a warp walks a part of the list. Of an entry that makes no sense nothing is copied: its stage is
// passed on as it is, because the out block becomes NaN whatever is multiplied.
template <typename Shared, bool kTransposeLeft, bool kTransposeRight>
__device__ __forceinline__ void ProduceNarrow(Shared& shared, const ProductParams& params, const NarrowPlan& plan,
                                              const NarrowTile& tile) {
  const int lane = threadIdx.x % 32, shift = plan.shift;
  const int first_entry = tile.matrix * static_cast<int>(params.capacity);
  const int32_t* ids = params.lists.ids + first_entry + tile.begin;
  const int32_t* places = params.lists.places + first_entry + tile.begin;
  Ring<Shared::kStages> ring;
  bool poisoned = tile.poisoned;
  for (int64_t chunk = tile.first >> shift; chunk << shift < tile.last; chunk += 32) {
    // ---- An entry a lane
    const int64_t own = chunk + lane;
    int id = 0, place = 0;
    if (own << shift < tile.last) {
      id = __ldg(ids + own);
      place = __ldg(places + own);
      if (id < 0 || id >= params.in_blocks || place < 0 || place >= params.capacity) {
        id = -1;
        poisoned = true;
      }
    }
    // ---- Their stages
    const int64_t begin = max(chunk << shift, tile.first), end = min((chunk + 32) << shift, tile.last);
#pragma unroll 1
    for (int64_t step = begin; step < end; ++step) {
      const int source = static_cast<int>((step >> shift) - chunk), half = static_cast<int>(step) & shift;
      const int of = __shfl_sync(0xFFFFFFFFu, id, source), at = __shfl_sync(0xFFFFFFFFu, place, source);
      if (lane == 0) {
        const int stage = ring.Stage();
        device::sm90::Wait(shared.empty[stage], ring.Empty());
        if (of < 0) {
          device::sm90::Arrive(shared.full[stage]);
        } else {
          device::sm90::ArriveExpecting(shared.full[stage], Shared::kStageBytes);
          const int row = of * static_cast<int>(params.in_block) + half * kPiece;
          device::sm90::LoadBox(shared.blocks[stage], plan.data, shared.full[stage], 0,
                                kTransposeLeft ? half * kPiece : tile.piece * Shared::kRows,
                                kTransposeLeft ? tile.piece * (Shared::kRows / kPiece) : half, first_entry + at);
          device::sm90::LoadBox(shared.dense[stage], plan.dense, shared.full[stage],
                                kTransposeRight ? tile.column : row, kTransposeRight ? row : tile.column, tile.dense,
                                0);
        }
      }
      ring.Advance();
    }
  }
  poisoned = __any_sync(0xFFFFFFFFu, poisoned);
  if (lane == 0) shared.poisoned = poisoned;
}

// ---- The consumers: four warps with 32 rows each, and with blocks of 64 rows half of the contracted length each.
template <typename Shared, bool kTransposeLeft, bool kTransposeRight>
class NarrowConsumer {
 public:
  using Element = typename Shared::Element;
  static constexpr int kRows = Shared::kRows, kColumns = Shared::kColumns;
  static constexpr int kRowWarps = kRows / 32, kDepthWarps = kNarrowConsumers / kRowWarps;
  static constexpr int kSlices = kPiece / 16 / kDepthWarps;  // of 16 of the contracted length, of a stage
  // The sums in shared memory, over the stages: rows, or columns where the result lies so; four of them are stored at a
  // time. The pitches spread the accumulators of a warp over the banks.
  static constexpr int kPitch = kTransposeRight ? kColumns + 8 : kRows + 4;
  static constexpr int kSums = kPitch * (kTransposeRight ? kRows : kColumns);
  static_assert(kSums * kDepthWarps * 4 <= sizeof(Shared::blocks) + sizeof(Shared::dense));

  __device__ explicit NarrowConsumer(Shared& shared)
      : shared_(shared), lane_(threadIdx.x % 32), warp_(__shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0)) {}

  // Multiplies `count` stages and leaves the sums in shared memory.
  __device__ __forceinline__ void Run(int64_t count) {
    float sums[2][kColumns / 8][4];
    device::Clear(sums);
    Ring<Shared::kStages> ring;
    for (int64_t step = 0; step < count; ++step) {
      const int stage = ring.Stage();
      device::sm90::Wait(shared_.full[stage], ring.Full());
      MultiplyStage(sums, stage);
      device::sm90::FenceAsyncProxy();  // what was loaded has been read before the stage is filled again
      device::sm90::ReleaseForWarp(shared_.empty[stage]);
      ring.Advance();
    }
    // All stages have landed and are read: their memory is free.
    device::sm90::SyncNamed(1, 32 * kNarrowConsumers);
    Leave(sums);
  }

  // Adds 32 rows of all CTAs' sums, and stores them.
  __device__ __forceinline__ void Merge(const ProductParams& params, const NarrowTile& tile, int rank) const {
    constexpr int kParts = Shared::kParts, kVectors = kNarrowPartRows * kColumns / 4;
    bool poisoned = false;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      poisoned |= device::sm90::LoadFromCluster(device::sm90::ClusterAddress(&shared_.poisoned, part)) != 0;
    }
    const int length = static_cast<int>(params.out_length), width = static_cast<int>(params.width);
#pragma unroll
    for (int i = threadIdx.x; i < kVectors; i += 32 * kNarrowConsumers) {
      // Four columns of a row, or four rows of a column.
      const int row = rank * kNarrowPartRows + (kTransposeRight ? i / (kColumns / 4) : i % (kNarrowPartRows / 4) * 4);
      const int column = kTransposeRight ? i % (kColumns / 4) * 4 : i / (kNarrowPartRows / 4);
      const float* place = Sums() + (kTransposeRight ? row * kPitch + column : column * kPitch + row);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t address = device::sm90::ClusterAddress(place, part);
#pragma unroll
        for (int depth = 0; depth < kDepthWarps; ++depth) {
          const float4 x = device::sm90::LoadFourFromCluster(address + depth * kSums * 4);
          sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
      }
      if (poisoned) sum.x = sum.y = sum.z = sum.w = device::QuietNan();
      const int r = tile.row + row, c = tile.column + column;
      if (r >= length || c >= width) continue;
      Store(params,
            tile.batch * params.out_length * params.width +
                (kTransposeRight ? int64_t{r} * width + c : int64_t{c} * length + r),
            sum);
    }
  }

 private:
  __device__ __forceinline__ float* Sums() const { return reinterpret_cast<float*>(shared_.blocks); }

  __device__ __forceinline__ static void Store(const ProductParams& params, int64_t at, const float4& x) {
    if (params.out_dtype == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(params.out) + at) = x;
    } else {
      *reinterpret_cast<uint2*>(static_cast<Element*>(params.out) + at) =
          make_uint2(device::PackPair<Element>(x.x, x.y), device::PackPair<Element>(x.z, x.w));
    }
  }

  // Where 16-byte chunk `chunk` of a row lies in a box of rows of kBytes, swizzled by the copy engine.
  template <int kBytes>
  __device__ __forceinline__ static int Swizzled(int row, int chunk) {
    return row * kBytes + ((chunk ^ row * kBytes / 128 % (kBytes / 16)) << 4);
  }

  __device__ __forceinline__ void MultiplyStage(float (&sums)[2][kColumns / 8][4], int stage) const {
    const uint32_t blocks = device::SharedAddress(shared_.blocks[stage]);
    const uint32_t dense = device::SharedAddress(shared_.dense[stage]);
    const int first_row = warp_ % kRowWarps * 32, first_slice = warp_ / kRowWarps * kSlices;
    uint32_t right[4];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int k = first_slice + slice;
      // Four matrices: rows 0-7 and 8-15 of the first eight of the contracted length, then of the next eight.
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int row = first_row + 16 * m;
        if constexpr (kTransposeLeft) {
          const int at = Swizzled<128>(16 * k + lane_ / 16 * 8 + lane_ % 8, row % kPiece / 8 + lane_ / 8 % 2);
          device::LoadMatricesTransposed(left[m], blocks + row / kPiece * kPieceBytes + at);
        } else {
          device::LoadMatrices(left[m], blocks + Swizzled<128>(row + lane_ % 16, 2 * k + lane_ / 16));
        }
      }
      if constexpr (kColumns == 8) {
        // Four matrices of eight of the contracted length, for this slice and the next.
        if (slice % 2 == 0) {
          if constexpr (kTransposeRight) {
            device::LoadMatricesTransposed(right, dense + Swizzled<16>(16 * k + lane_, 0));
          } else {
            device::LoadMatrices(right, dense + Swizzled<128>(lane_ % 8, 2 * k + lane_ / 8));
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          device::MultiplyAccumulate<Element>(sums[m][0], left[m], right[slice % 2 * 2], right[slice % 2 * 2 + 1]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kColumns / 8; n += 2) {
          // Four matrices: the two of the slice for eight columns, then for the next eight.
          if constexpr (kTransposeRight) {
            const int at = Swizzled<2 * kColumns>(16 * k + lane_ % 16, n + lane_ / 16);
            device::LoadMatricesTransposed(right, dense + at);
          } else {
            const int at = Swizzled<128>(8 * n + lane_ / 16 * 8 + lane_ % 8, 2 * k + lane_ / 8 % 2);
            device::LoadMatrices(right, dense + at);
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            device::MultiplyAccumulate<Element>(sums[m][n], left[m], right[0], right[1]);
            device::MultiplyAccumulate<Element>(sums[m][n + 1], left[m], right[2], right[3]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void Leave(const float (&sums)[2][kColumns / 8][4]) const {
    float* target = Sums() + warp_ / kRowWarps * kSums;
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_ % kRowWarps * 32 + 16 * m + 8 * half + g;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const int column = 8 * n + 2 * t;
          const float low = sums[m][n][2 * half], high = sums[m][n][2 * half + 1];
          if constexpr (kTransposeRight) {
            *reinterpret_cast<float2*>(target + row * kPitch + column) = make_float2(low, high);
          } else {
            target[column * kPitch + row] = low;
            target[(column + 1) * kPitch + row] = high;
          }
        }
      }
  }

  Shared& shared_;
  const int lane_, warp_;
};

template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kRows, int kColumns>
__global__ void __cluster_dims__(kRows / kNarrowPartRows, 1, 1) __launch_bounds__(kNarrowThreads, kNarrowResident)
    NarrowKernel(const __grid_constant__ ProductParams params, const __grid_constant__ NarrowPlan plan) {
  using Shared = NarrowShared<Element, kRows, kColumns>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int rank = device::sm90::ClusterRank();
  if (threadIdx.x == 0) {
    shared.Init();
  } else if (threadIdx.x == 32 * kNarrowConsumers) {
    device::sm90::PrefetchTensorMap(plan.data);
    device::sm90::PrefetchTensorMap(plan.dense);
  }
  const NarrowTile tile = NarrowTile::Of<Shared>(params, plan, rank);
  const NarrowPrefetch<Shared> prefetch(params, plan, tile, rank);
  if (warp == 1) prefetch.Lists();
  __syncthreads();
  if (warp == 1) prefetch.Blocks();

  using Consumer = NarrowConsumer<Shared, kTransposeLeft, kTransposeRight>;
  if (warp == kNarrowConsumers) {
    ProduceNarrow<Shared, kTransposeLeft, kTransposeRight>(shared, params, plan, tile);
  } else {
    Consumer(shared).Run(tile.last - tile.first);
  }
  __syncwarp();
  device::sm90::SyncCluster();  // everybody's sums are there
  if (warp < kNarrowConsumers) Consumer(shared).Merge(params, tile, rank);
  __syncwarp();
  device::sm90::SyncCluster();  // no CTA leaves while another reads its sums
}

template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kRows, int kColumns>
cudaError_t LaunchNarrowTile(const ProductParams& params, const NarrowPlan& plan, cudaStream_t stream) {
  const auto kernel = NarrowKernel<Element, kTransposeLeft, kTransposeRight, kRows, kColumns>;
  constexpr int kBytes = sizeof(NarrowShared<Element, kRows, kColumns>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  const int64_t grid = params.batch * params.out_blocks * plan.groups * (params.out_block / kNarrowPartRows);
  kernel<<<static_cast<unsigned>(grid), kNarrowThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchNarrow(const ProductParams& params, const NarrowPlan& plan, int columns, cudaStream_t stream) {
  constexpr bool kL = kLeft == Layout::kMnMajor, kR = kRight == Layout::kMnMajor;
  const bool small = params.out_block < kNarrowRows;
  switch (columns) {
    case 8:
      return (small ? LaunchNarrowTile<Element, kL, kR, 64, 8>
                    : LaunchNarrowTile<Element, kL, kR, kNarrowRows, 8>)(params, plan, stream);
    case 32:
      return (small ? LaunchNarrowTile<Element, kL, kR, 64, 32>
                    : LaunchNarrowTile<Element, kL, kR, kNarrowRows, 32>)(params, plan, stream);
    default:
      return (small ? LaunchNarrowTile<Element, kL, kR, 64, 64>
                    : LaunchNarrowTile<Element, kL, kR, kNarrowRows, 64>)(params, plan, stream);
  }
}

}  // namespace jax_bsk::matmul::cuda::sm90
