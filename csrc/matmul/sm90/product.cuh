// BSR x dense on Hopper (sm_90a): a scheduler, a producer that walks the block lists, two consumer warpgroups; clusters
// of two CTAs share the blocks. The design and what each choice was worth: docs/design/hopper-products.md.
#pragma once

#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/cluster.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "matmul/sm90/consumer.cuh"
#include "matmul/sm90/epilogue.cuh"

namespace jax_bsk::matmul::cuda::sm90 {

// The pipeline of a cluster of two CTAs. `x ==>` is what is filled and announced by barrier full_x, `<-- x` its release
// by barrier empty_x; stages have the barriers `full` and `empty`.
//
//   scheduler (one thread of CTA 0)   producer (one thread per CTA)    consumers (two warpgroups per CTA)
//   task ========================> both CTAs: the next tile
//        <-- task --------------- asked for kWorkLead stages before the tile ends
//                                  stage n ========================> left: 64 rows of blocks for each warpgroup
//                                    left of warpgroup 0 by CTA 0,     right: 256 columns of the CTA's own
//                                    of warpgroup 1 by CTA 1, to     wgmma n is issued, wgmma n-1 is waited for
//                                    both CTAs (multicast)
//                                    right by each CTA for itself
//                                         <-- stage n-1 ------------ by every warp, in both CTAs
//
// Where a stage may be of use to one warpgroup alone (two blocks of 64 rows), no product is in flight between stages.
// After a tile's last stage its sums become 16-bit words, leave by the copy engine, and the first three stages of the
// next tile hide the second half (epilogue.cuh).

// The tile of a work index. All rows of a panel of columns come before the next panel, so that the panel's part of
// the dense operand stays in L2 (rows first: 511 to 540 instead of 610 TFLOP/s). In a panel all columns of a row lie
// side by side, so that a row's blocks are read from memory once a panel. Every other panel is gone through backwards,
// so that it begins with the blocks that the one before it ended with (424 instead of 523 MB of device memory are read
// at 8192^3 and 22 %); not the last but one: the longest rows of the last two come first, and the chip is done at about
// the same time.
struct ProductTile {
  int batch;
  int column;  // of the cluster's
  int row;

  __device__ __forceinline__ ProductTile(const ProductParams& params, const ProductPlan& plan, int work) {
    batch = plan.batch_divider.Quotient(work);
    const int in_batch = plan.batch_divider.Remainder(work, batch);
    const int panel = plan.panel_divider.Quotient(in_batch), in_panel = plan.panel_divider.Remainder(in_batch, panel);
    const auto& divider = panel == plan.last_panel ? plan.last_part_divider : plan.part_divider;
    const int place = divider.Quotient(in_panel), part = divider.Remainder(in_panel, place);
    const int panels_left = plan.last_panel - panel;
    const int rank = panels_left > 1 && panels_left % 2 == 1 ? plan.rows - 1 - place : place;
    column = (panel * static_cast<int>(plan.part_divider.divisor) + part) * kClusterColumns;
    row = __ldg(plan.order + (params.matrix_batch == 1 ? 0 : batch) * plan.rows + rank);
  }
};

// The list of one out block, an entry at a time; the words of the two after it are under way.
class Entries {
 public:
  __device__ __forceinline__ Entries(const ProductParams& params, int matrix, int block) {
    if (block >= params.out_blocks) return;
    const int32_t* offsets = params.lists.offsets + matrix * (params.out_blocks + 1) + block;
    const int begin = __ldg(offsets), end = __ldg(offsets + 1);
    if (begin < 0 || end < begin || end > params.capacity) {
      poisoned_ = true;
      return;
    }
    left_ = asked_ = end - begin;
    ids_ = params.lists.ids + matrix * params.capacity + begin;
    places_ = params.lists.places + matrix * params.capacity + begin;
    Fetch();
    Fetch();
    Next(params);
  }

  __device__ __forceinline__ bool AtEnd() const { return id_ == kEnd; }
  __device__ __forceinline__ int left() const { return left_; }  // entries after this one
  __device__ __forceinline__ int id() const { return id_; }      // larger than any other at the end
  __device__ __forceinline__ int place() const { return place_; }
  __device__ __forceinline__ bool poisoned() const { return poisoned_; }

  // The next entry that makes sense.
  __device__ __forceinline__ void Next(const ProductParams& params) {
    id_ = kEnd;
    while (left_ > 0) {
      const int id = next_id_, place = next_place_;
      --left_;
      Fetch();
      if (id >= 0 && id < params.in_blocks && place >= 0 && place < params.capacity) {
        id_ = id;
        place_ = place;
        return;
      }
      poisoned_ = true;
    }
  }

 private:
  static constexpr int kEnd = 0x7FFFFFFF;

  // Asks for the next words there are (what there is not is not used).
  __device__ __forceinline__ void Fetch() {
    next_id_ = later_id_;
    next_place_ = later_place_;
    if (asked_ == 0) return;
    --asked_;
    later_id_ = __ldg(ids_++);
    later_place_ = __ldg(places_++);
  }

  const int32_t* ids_ = nullptr;
  const int32_t* places_ = nullptr;
  int left_ = 0, asked_ = 0;  // entries to come, and those of them not asked for yet
  int next_id_ = 0, next_place_ = 0, later_id_ = 0, later_place_ = 0;
  int id_ = kEnd, place_ = 0;
  bool poisoned_ = false;
};

// ---- The scheduler: one thread of a cluster hands work indices to the producers of its CTAs, each when both have
// asked for it. A tile taken early can no longer be taken by a cluster that is done before: with two in stock the last
// one ended 4.5 % later than the mean at 8192^3 and 22 % (0.9 % now), and 23 % later at 4096^3 (3 %).
template <typename Element>
__device__ __forceinline__ void ScheduleProduct(Shared<Element>& shared, const ProductPlan& plan) {
  Ring<1> place;
  int work;
  do {
    device::sm90::Wait(shared.empty_task, place.Empty());
    work = min(atomicAdd(plan.work_counter, 1), plan.work_count);
    for (int rank = 0; rank < kProductCluster; ++rank) {
      device::sm90::SendWord(shared.task, shared.full_task, rank, work);
    }
    place.Advance();
  } while (work < plan.work_count);
}

// ---- The producer: one thread a CTA walks the lists and fetches blocks and the dense operand. Both CTAs of a cluster
// walk the same lists, and each fetches one half of the blocks for both.
template <typename Element, bool kTransposeLeft, bool kTransposeRight>
class ProductProducer {
 public:
  __device__ ProductProducer(Shared<Element>& shared, const ProductParams& params, const ProductPlan& plan, int rank)
      : shared_(shared), params_(params), plan_(plan), rank_(rank) {}

  __device__ __forceinline__ void Run() {
    for (Ring<1> task;; task.Advance()) {
      const int work = device::sm90::WaitForWord(shared_.task, shared_.full_task, task.Full());
      if (work >= plan_.work_count) break;  // (so the word has been read before the next is asked for)
      Load(ProductTile(params_, plan_, work));
    }
    shared_.Announce(ring_, StepInfo{StepInfo::kEnd, 0, 0, 0}, 0);
  }

 private:
  // The next work index is asked for when fewer stages than this come after the next block's. It is there in the time
  // of two or three, and the stages in flight last for what must be read then, before the first of its tile's can be
  // fetched.
  static constexpr int kWorkLead = 2;

  __device__ __forceinline__ void Load(const ProductTile& tile) {
    const int matrix = params_.matrix_batch == 1 ? 0 : tile.batch, dense = params_.dense_batch == 1 ? 0 : tile.batch;
    const int column = tile.column + rank_ * kTileColumns;
    const bool two = plan_.blocks_per_row == 2;
    const int out_block = static_cast<int>(params_.out_block), in_block = static_cast<int>(params_.in_block);
    const int first_entry = matrix * static_cast<int>(params_.capacity);
    StepInfo info{0, tile.row * plan_.blocks_per_row * out_block, column, tile.batch};

    // One list for both warpgroups, or one for each, merged: what both want at the same place is fetched once.
    Entries upper(params_, matrix, tile.row * plan_.blocks_per_row);
    Entries lower(params_, matrix, two ? tile.row * 2 + 1 : static_cast<int>(params_.out_blocks));
    bool asked = false;  // for the next work index
    do {
      const int id = min(upper.id(), lower.id());
      const bool use_upper = !upper.AtEnd() && upper.id() == id, use_lower = two && !lower.AtEnd() && lower.id() == id;
      const int places[kConsumers] = {upper.place(), two ? lower.place() : upper.place()};
      if (use_upper) upper.Next(params_);
      if (use_lower) lower.Next(params_);
      const bool first = use_upper, second = two ? use_lower : use_upper;  // of the warpgroups
      const bool last = upper.AtEnd() && lower.AtEnd(), any = first || second;
      if (!asked && (last || max(upper.left(), lower.left()) * plan_.steps < kWorkLead)) {
        device::sm90::ArriveAt(shared_.empty_task, 0);
        asked = true;
      }
      const int steps = any ? plan_.steps : 1;
      for (int step = 0; step < steps; ++step) {
        info.flags = first * StepInfo::kUsed + second * (StepInfo::kUsed << 1);
        if (last && step == steps - 1) {
          info.flags |= StepInfo::kLast;
          if (upper.poisoned()) info.flags |= two ? StepInfo::kPoisoned : StepInfo::kPoisoned * 3;
          if (lower.poisoned()) info.flags |= StepInfo::kPoisoned << 1;
        }
        const int bytes = any ? (first + second + kRightPieces) * kPieceBytes : 0;
        shared_.Announce(ring_, info, bytes);
        if (any) {
          const int k = step * kPiece;
          if (first && Mine(0)) LoadBlock(0, first_entry + places[0], 0, k);
          if (second && Mine(1)) LoadBlock(1, first_entry + places[1], two ? 0 : kPiece, k);
          LoadDense(column, id * in_block + k, dense);
        }
        ring_.Advance();
      }
      if (last) break;
    } while (true);
  }

  // The blocks of which warpgroup this CTA fetches for the cluster.
  __device__ __forceinline__ bool Mine(int warpgroup) const { return warpgroup % kProductCluster == rank_; }

  // 64 x 64 of a block, out rows from `row` on, contracted from `k` on, to all CTAs.
  __device__ __forceinline__ void LoadBlock(int warpgroup, int entry, int row, int k) {
    const int stage = ring_.Stage();
    device::sm90::LoadBoxMulticast(shared_.left[stage] + warpgroup * kPieceElements, plan_.data, shared_.full[stage],
                                   (1 << kProductCluster) - 1, kTransposeLeft ? row : k, kTransposeLeft ? k : row,
                                   entry, 0);
  }

  // 64 of the contracted length x 256 columns, in one box where it can be: a thread that issues four is late.
  __device__ __forceinline__ void LoadDense(int column, int k, int batch) {
    const int stage = ring_.Stage();
    if (!kTransposeRight) {
      device::sm90::LoadBox(shared_.right[stage], plan_.dense, shared_.full[stage], k, column, batch, 0);
    } else if (plan_.whole) {
      device::sm90::LoadBox(shared_.right[stage], plan_.dense, shared_.full[stage], 0, k, column / kPiece, batch);
    } else {
#pragma unroll
      for (int i = 0; i < kRightPieces; ++i) {
        device::sm90::LoadBox(shared_.right[stage] + i * kPieceElements, plan_.dense, shared_.full[stage],
                              column + i * kPiece, k, batch, 0);
      }
    }
  }

  Shared<Element>& shared_;
  const ProductParams& params_;
  const ProductPlan& plan_;
  const int rank_;
  Ring<kStages> ring_;
};

// ---- What a consumer does with a tile. With the dense operand on the right (N-major), the result lies as computed; on
// the left, transposed.
template <typename Element, bool kTransposeRight>
class ProductStore {
 public:
  __device__ ProductStore(Shared<Element>& shared, const ProductParams& params, const ProductPlan& plan, int warpgroup)
      : params_(params), epilogue_(shared, plan.out, warpgroup), first_row_(warpgroup * kPiece) {}

  __device__ __forceinline__ void Take(const float (&sums)[kTileColumns / 2], const StepInfo& info) {
    if (params_.out_dtype == DType::kF32) return StoreFloat(sums, info);
    epilogue_.Take(sums, info, *this);
  }
  __device__ __forceinline__ void Flush() { epilogue_.Flush(*this); }
  __device__ __forceinline__ void Finish() { epilogue_.Finish(*this); }

  __device__ __forceinline__ Box operator()(const StepInfo& info, int chunk) const {
    const int row = info.row + first_row_, column = info.column + chunk * kPiece;
    return {kTransposeRight ? column : row, kTransposeRight ? row : column, info.batch};
  }

 private:
  __device__ __forceinline__ void StoreFloat(const float (&sums)[kTileColumns / 2], const StepInfo& info) const {
    const int row = info.row + first_row_, thread = device::ThreadHere() % 128,
              length = static_cast<int>(params_.out_length), width = static_cast<int>(params_.width);
    float* out = static_cast<float*>(params_.out) + info.batch * params_.out_length * params_.width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      if (r >= length) continue;
#pragma unroll
      for (int n = 0; n < kTileColumns / 8; ++n) {
        const int c = info.column + 8 * n + thread % 4 * 2;
        if (c >= width) continue;
        const float low = sums[4 * n + 2 * half], high = sums[4 * n + 2 * half + 1];
        if constexpr (kTransposeRight) {
          *reinterpret_cast<float2*>(out + int64_t{r} * width + c) = make_float2(low, high);
        } else {
          out[int64_t{c} * length + r] = low;
          if (c + 1 < width) out[int64_t{c + 1} * length + r] = high;
        }
      }
    }
  }

  const ProductParams& params_;
  Epilogue<Element, kTileColumns, !kTransposeRight> epilogue_;
  const int first_row_;  // of the tile's
};

// kPairs: two blocks of 64 rows a tile, each a warpgroup's, and not one of 128.
template <typename Element, bool kTransposeLeft, bool kTransposeRight, bool kPairs>
__global__ void __cluster_dims__(kProductCluster, 1, 1) __launch_bounds__(kThreads, 1)
    ProductKernel(const __grid_constant__ ProductParams params, const __grid_constant__ ProductPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Element>*>(shared_bytes);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // uniform, and known to be
  const int rank = device::sm90::ClusterRank();
  if (threadIdx.x == 0) shared.Init(kProductCluster);
  __syncwarp();
  device::sm90::SyncCluster();  // nobody reaches into a CTA whose barriers do not exist yet

  if (warpgroup == kConsumers) {
    device::sm90::LowerRegisters<kProducerRegisters>();
    const int thread = threadIdx.x % 128;
    if (thread == 0) {
      ProductProducer<Element, kTransposeLeft, kTransposeRight>(shared, params, plan, rank).Run();
    } else if (thread == 32 && rank == 0) {
      ScheduleProduct(shared, plan);
    }
  } else {
    device::sm90::RaiseRegisters<kConsumerRegisters>();
    ProductStore<Element, kTransposeRight> store(shared, params, plan, warpgroup);
    Consumer<Element, kTransposeLeft, kTransposeRight, kTileColumns, kProductCluster, kPairs>(shared, warpgroup, rank)
        .Run(store);
    store.Finish();
  }
  __syncwarp();
  device::sm90::SyncCluster();  // no CTA leaves while another may still signal it
}

template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchProduct(const ProductParams& params, const ProductPlan& plan, int grid, cudaStream_t stream) {
  constexpr bool kTransposeLeft = kLeft == Layout::kMnMajor, kTransposeRight = kRight == Layout::kMnMajor;
  const auto kernel = plan.blocks_per_row == 2 ? ProductKernel<Element, kTransposeLeft, kTransposeRight, true>
                                               : ProductKernel<Element, kTransposeLeft, kTransposeRight, false>;
  constexpr int kBytes = sizeof(Shared<Element>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<grid, kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace jax_bsk::matmul::cuda::sm90
