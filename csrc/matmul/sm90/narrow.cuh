// BSR x dense of few columns on Hopper (sm_90a): bound by reading the blocks. A cluster has 64 rows of one out block;
// each of its CTAs streams a part of the block's entries through a ring of stages and multiplies them by mma.sync, and
// the parts are added through the cluster's shared memory. The design and what it was worth:
// docs/design/hopper-products.md.
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
//   stage n =======================>   blocks: 64 of the contracted length x the tile's 64 rows
//                                      dense: the same 64 x the columns
//     <-- stage n --------------------  by every warp, when it has multiplied it
//   says whether an entry was wrong    sums to shared memory, over the stages
//   -------------------- all CTAs of the cluster meet --------------------
//                                      each adds 32 rows of all CTAs' sums, in the order of the CTAs
//   -------------------- all CTAs of the cluster meet --------------------
//
// Nothing is persistent: a CTA has one tile, and the hardware hands out the next cluster when one is done.

template <typename Element_, int kColumns_>
struct NarrowShared {
  using Element = Element_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStageBytes = (kNarrowRows + kColumns) * kPiece * 2;
  static constexpr int kStages = kNarrowRingBytes / kStageBytes;

  alignas(1024) Element blocks[kStages][kNarrowRows * kPiece];
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

// A cluster's tile, and its CTA's part of the out block's stages.
struct NarrowTile {
  int matrix, dense, batch;
  int block;   // the out block
  int piece;   // of the out block: which 64 of its rows
  int row;     // the tile's first one
  int column;  // the tile's first one
  int begin;   // the first entry of the list
  bool poisoned;
  int64_t first, last;  // stages of the list

  __device__ __forceinline__ NarrowTile(const ProductParams& params, const NarrowPlan& plan, int rank) {
    const int pieces = static_cast<int>(params.out_block) / kNarrowRows;  // 1 or 2
    const int blocks = static_cast<int>(params.out_blocks);
    const int tile = static_cast<int>(blockIdx.x) / kNarrowParts, line = tile / plan.groups, of = line / pieces;
    column = (tile - line * plan.groups) * kNarrowColumns;
    piece = line - of * pieces;
    batch = of / blocks;
    block = of - batch * blocks;
    row = block * static_cast<int>(params.out_block) + piece * kNarrowRows;
    matrix = params.matrix_batch == 1 ? 0 : batch;
    dense = params.dense_batch == 1 ? 0 : batch;
    const int32_t* offsets = params.lists.offsets + matrix * (params.out_blocks + 1) + block;
    const int end = __ldg(offsets + 1);
    begin = __ldg(offsets);
    poisoned = begin < 0 || end < begin || end > params.capacity;
    const int64_t stages = poisoned ? 0 : int64_t{end - begin} << plan.shift;
    first = stages * rank / kNarrowParts;
    last = stages * (rank + 1) / kNarrowParts;
  }
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
                                (kTransposeLeft ? half : tile.piece) * kPiece, kTransposeLeft ? tile.piece : half,
                                first_entry + at);
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

// ---- The consumers: four warps with 32 of the rows and half of a stage's contracted length each.
template <typename Shared, bool kTransposeLeft, bool kTransposeRight>
class NarrowConsumer {
 public:
  using Element = typename Shared::Element;
  static constexpr int kColumns = Shared::kColumns;
  static constexpr int kRowWarps = kNarrowRows / 32, kDepthWarps = kNarrowConsumers / kRowWarps;
  static constexpr int kSlices = kPiece / 16 / kDepthWarps;  // of 16 of the contracted length, of a stage
  // The sums in shared memory, over the stages: rows, or columns where the result lies so; four of them are stored at a
  // time. The pitches spread the accumulators of a warp over the banks.
  static constexpr int kPitch = kTransposeRight ? kColumns + 8 : kNarrowRows + 4;
  static constexpr int kSums = kPitch * (kTransposeRight ? kNarrowRows : kColumns);
  static_assert(kSums * kDepthWarps * 4 <= sizeof(Shared::blocks));

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
    constexpr int kOwn = kNarrowRows / kNarrowParts, kVectors = kOwn * kColumns / 4;  // rows of this CTA
    bool poisoned = false;
#pragma unroll
    for (int part = 0; part < kNarrowParts; ++part) {
      poisoned |= device::sm90::LoadFromCluster(device::sm90::ClusterAddress(&shared_.poisoned, part)) != 0;
    }
    const int length = static_cast<int>(params.out_length), width = static_cast<int>(params.width);
#pragma unroll
    for (int i = threadIdx.x; i < kVectors; i += 32 * kNarrowConsumers) {
      // Four columns of a row, or four rows of a column.
      const int row = rank * kOwn + (kTransposeRight ? i / (kColumns / 4) : i % (kOwn / 4) * 4);
      const int column = kTransposeRight ? i % (kColumns / 4) * 4 : i / (kOwn / 4);
      const float* place = Sums() + (kTransposeRight ? row * kPitch + column : column * kPitch + row);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int part = 0; part < kNarrowParts; ++part) {
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
          const int at = Swizzled<128>(16 * k + lane_ / 16 * 8 + lane_ % 8, row / 8 + lane_ / 8 % 2);
          device::LoadMatricesTransposed(left[m], blocks + at);
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

template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kColumns>
__global__ void __cluster_dims__(kNarrowParts, 1, 1) __launch_bounds__(kNarrowThreads, kNarrowResident)
    NarrowKernel(const __grid_constant__ ProductParams params, const __grid_constant__ NarrowPlan plan) {
  using Shared = NarrowShared<Element, kColumns>;
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
  const NarrowTile tile(params, plan, rank);
  __syncthreads();

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

template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kColumns>
cudaError_t LaunchNarrowTile(const ProductParams& params, const NarrowPlan& plan, int grid, cudaStream_t stream) {
  const auto kernel = NarrowKernel<Element, kTransposeLeft, kTransposeRight, kColumns>;
  constexpr int kBytes = sizeof(NarrowShared<Element, kColumns>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(grid), kNarrowThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchNarrow(const ProductParams& params, const NarrowPlan& plan, int columns, int grid,
                         cudaStream_t stream) {
  constexpr bool kL = kLeft == Layout::kMnMajor, kR = kRight == Layout::kMnMajor;
  switch (columns) {
    case 8:
      return LaunchNarrowTile<Element, kL, kR, 8>(params, plan, grid, stream);
    case 32:
      return LaunchNarrowTile<Element, kL, kR, 32>(params, plan, grid, stream);
    default:
      return LaunchNarrowTile<Element, kL, kR, kNarrowColumns>(params, plan, grid, stream);
  }
}

}  // namespace jax_bsk::matmul::cuda::sm90
