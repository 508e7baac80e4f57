// Dense x dense at the blocks of a pattern on Hopper (sm_90a): a producer and two consumer warpgroups. A CTA's tile is
// some blocks of one row, side by side, so that they share the left operand's rows: 256 columns, as for the product.
#pragma once

#include <utility>

#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "matmul/sm90/consumer.cuh"
#include "matmul/sm90/epilogue.cuh"

namespace jax_bsk::matmul::cuda::sm90 {

// The pipeline of a CTA. `stage n ==>` is filled and announced by barrier `full`, `<-- stage n` its release by `empty`.
//
//   producer (one thread)                              consumers (two warpgroups)
//   item: some entries of one row of blocks
//   stage n: 64 of the contracted length ============> blocks of 128 rows: each warpgroup has 64 rows, all columns
//     left: rows of the entries' row of blocks         blocks of 64 rows: both have these, and 128 columns each
//     right: columns of each entry                     wgmma n is issued, wgmma n-1 is waited for
//            <-- stage n-1 --------------------------- by every warp
//
// After an item's last stage its sums leave as the product's do (epilogue.cuh).

// ---- The producer: one thread takes every gridDim.x-th item and fetches its operands along the contracted length.
template <typename Element, bool kTransposeLeft, bool kTransposeRight>
class SampledProducer {
 public:
  __device__ SampledProducer(Shared<Element>& shared, const SampledParams& params, const SampledPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  // Items are handed out like cards, there and back: they come by falling size, so whoever had the larger one in a
  // round has the smaller one in the next.
  __device__ __forceinline__ void Run() {
    const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
    int batch = 0, before = 0;  // items of the batches before this one
    for (int round = 0;; ++round) {
      const int item = round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
      int list = 0, count = 0;
      for (; batch < params_.batch; ++batch, before += count) {
        list = params_.list_batch == 1 ? 0 : batch;
        count = __ldg(plan_.count + list);
        if (item - before < count) break;
      }
      if (batch == params_.batch) break;
      const int word = __ldg(plan_.items + list * params_.capacity + item - before);
      Load(batch, list, word & ((1 << kItemShift) - 1), (word >> kItemShift) + 1);
    }
    shared_.Announce(ring_, StepInfo{StepInfo::kEnd, 0, 0, 0}, 0);
  }

 private:
  static constexpr int kMaxEntries = kTileColumns / kPiece;

  __device__ __forceinline__ void Load(int batch, int list, int first, int entries) {
    const int64_t at = list * params_.capacity + first;
    const int row = __ldg(params_.row_ids + at);
    int columns[kMaxEntries];
    int valid = 0;
#pragma unroll
    for (int i = 0; i < kMaxEntries; ++i) {
      columns[i] = i < entries ? __ldg(params_.column_ids + at + i) : -1;
      if (columns[i] >= 0 && columns[i] < params_.column_blocks) valid |= 1 << i;
    }
    if (row < 0 || row >= params_.row_blocks) valid = 0;

    StepInfo info{0, row * static_cast<int>(params_.block_rows), first, batch};
    const int ends = StepInfo::kLast | valid << StepInfo::kValid | (entries - 1) << StepInfo::kEntries;
    if (valid == 0 || plan_.steps == 0) {
      info.flags = ends;
      shared_.Announce(ring_, info, 0);
      ring_.Advance();
      return;
    }
    const int left_pieces = static_cast<int>(params_.block_rows) / kPiece;
    const int entry_pieces = static_cast<int>(params_.block_columns) / kPiece;
    const int bytes = (left_pieces + __popc(valid) * entry_pieces) * kPieceBytes;
    for (int step = 0; step < plan_.steps; ++step) {
      info.flags = StepInfo::kUsed * 3 | (step == plan_.steps - 1 ? ends : 0);
      shared_.Announce(ring_, info, bytes);
      const int k = step * kPiece, stage = ring_.Stage();
      for (int i = 0; i < left_pieces; ++i) {
        const int r = info.row + i * kPiece;
        device::sm90::LoadBox(shared_.left[stage] + i * kPieceElements, plan_.left, shared_.full[stage],
                              kTransposeLeft ? r : k, kTransposeLeft ? k : r, params_.left_batch == 1 ? 0 : batch, 0);
      }
#pragma unroll
      for (int i = 0; i < kMaxEntries; ++i) {
        if (!(valid >> i & 1)) continue;
        for (int j = 0; j < entry_pieces; ++j) {
          const int c = columns[i] * static_cast<int>(params_.block_columns) + j * kPiece;
          device::sm90::LoadBox(shared_.right[stage] + (i * entry_pieces + j) * kPieceElements, plan_.right,
                                shared_.full[stage], kTransposeRight ? c : k, kTransposeRight ? k : c,
                                params_.right_batch == 1 ? 0 : batch, 0);
        }
      }
      ring_.Advance();
    }
  }

  Shared<Element>& shared_;
  const SampledParams& params_;
  const SampledPlan& plan_;
  Ring<kStages> ring_;
};

// ---- What a consumer does with a tile: its chunks belong to the item's entries one after the other. kColumns: of a
// warpgroup's part of the tile, 256 for blocks of 128 rows and 128 for blocks of 64.
template <typename Element, int kColumns>
class SampledStore {
 public:
  __device__ SampledStore(Shared<Element>& shared, const SampledParams& params, const SampledPlan& plan, int warpgroup)
      : params_(params), epilogue_(shared, plan.out, warpgroup), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void Take(float (&sums)[kColumns / 2], const StepInfo& info) {
    CutChunks(sums, info, std::make_integer_sequence<int, kChunks>());
    if (params_.out_dtype == DType::kF32) {
      StoreChunks(sums, info, std::make_integer_sequence<int, kChunks>());
    } else {
      epilogue_.Take(sums, info, *this);
    }
  }
  __device__ __forceinline__ void Flush() { epilogue_.Flush(*this); }
  __device__ __forceinline__ void Finish() { epilogue_.Finish(*this); }

  __device__ __forceinline__ Box operator()(const StepInfo& info, int chunk) const {
    const Place place(*this, info, chunk);
    return {place.column, place.row, static_cast<int>(place.entry), place.stored};
  }

 private:
  static constexpr bool kOwnRows = kColumns == kTileColumns;
  static constexpr int kChunks = kColumns / kPiece;
  static constexpr int kSums = kColumns / 2;

  // The position of a chunk.
  struct Place {
    int i;            // which of the item's entries
    int row, column;  // in its block
    int64_t entry;    // of all batches
    bool stored;

    __device__ __forceinline__ Place(const SampledStore& store, const StepInfo& info, int chunk) {
      const int block_columns = static_cast<int>(store.params_.block_columns), entry_pieces = block_columns / kPiece;
      const int piece = chunk + (kOwnRows ? 0 : store.warpgroup_ * kChunks);
      i = piece / entry_pieces;
      row = kOwnRows ? store.warpgroup_ * kPiece : 0;
      column = piece % entry_pieces * kPiece;
      entry = info.batch * store.params_.capacity + info.column + i;
      stored = i <= (info.flags >> StepInfo::kEntries & 3);
    }
  };

  // One by one by their numbers: indexed in a loop, the sums would lie in local memory.
  template <int... kChunk>
  __device__ __forceinline__ void CutChunks(float (&sums)[kSums], const StepInfo& info,
                                            std::integer_sequence<int, kChunk...>) const {
    (CutChunk<kChunk>(sums, info), ...);
  }
  template <int... kChunk>
  __device__ __forceinline__ void StoreChunks(const float (&sums)[kSums], const StepInfo& info,
                                              std::integer_sequence<int, kChunk...>) const {
    (StoreFloat<kChunk>(sums, info), ...);
  }

  // Elements beyond the matrix are 0, whatever the products were.
  template <int kChunk>
  __device__ __forceinline__ void CutChunk(float (&sums)[kSums], const StepInfo& info) const {
    const Place place(*this, info, kChunk);
    if (!place.stored) return;
    int rows = kPiece, columns = kPiece;
    if (!(info.flags >> (StepInfo::kValid + place.i) & 1)) {
      rows = 0;
    } else if (params_.rows % params_.block_rows != 0 || params_.columns % params_.block_columns != 0) {
      const int64_t list = params_.list_batch == 1 ? 0 : info.batch;
      const int id = __ldg(params_.column_ids + list * params_.capacity + info.column + place.i);
      rows = static_cast<int>(params_.rows) - info.row - place.row;
      columns = static_cast<int>(params_.columns) - id * static_cast<int>(params_.block_columns) - place.column;
    }
    if (rows < kPiece || columns < kPiece) Cut<kChunk>(sums, rows, columns);
  }

  __device__ __forceinline__ static int RowOf(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

  // Zeros from a row and a column on.
  template <int kChunk>
  __device__ __forceinline__ static void Cut(float (&sums)[kSums], int rows, int columns) {
    const int thread = device::ThreadHere() % 128;
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
      const int r = RowOf(thread) + (i & 2) * 4, c = i / 4 * 8 + thread % 4 * 2 + (i & 1);
      float& sum = sums[kChunk * (kPiece / 2) + i];
      sum = r < rows && c < columns ? sum : 0.f;
    }
  }

  template <int kChunk>
  __device__ __forceinline__ void StoreFloat(const float (&sums)[kSums], const StepInfo& info) const {
    const Place place(*this, info, kChunk);
    if (!place.stored) return;
    const int thread = device::ThreadHere() % 128;
    float* block = static_cast<float*>(params_.out) + place.entry * params_.block_rows * params_.block_columns;
#pragma unroll
    for (int i = 0; i < kPiece / 2; i += 2) {
      const int r = place.row + RowOf(thread) + (i & 2) * 4, c = place.column + i / 4 * 8 + thread % 4 * 2;
      const float* pair = sums + kChunk * (kPiece / 2) + i;
      *reinterpret_cast<float2*>(block + r * params_.block_columns + c) = make_float2(pair[0], pair[1]);
    }
  }

  const SampledParams& params_;
  Epilogue<Element, kColumns, false> epilogue_;
  const int warpgroup_;
};

template <typename Element, bool kTransposeLeft, bool kTransposeRight, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    SampledKernel(const __grid_constant__ SampledParams params, const __grid_constant__ SampledPlan plan) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Element>*>(shared_bytes);
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // uniform, and known to be
  if (threadIdx.x == 0) shared.Init(1);
  __syncthreads();

  if (warpgroup == kConsumers) {
    device::sm90::LowerRegisters<kProducerRegisters>();
    if (threadIdx.x % 128 == 0) {
      SampledProducer<Element, kTransposeLeft, kTransposeRight>(shared, params, plan).Run();
    }
  } else {
    device::sm90::RaiseRegisters<kConsumerRegisters>();
    SampledStore<Element, kColumns> store(shared, params, plan, warpgroup);
    Consumer<Element, kTransposeLeft, kTransposeRight, kColumns, 1, false>(shared, warpgroup, 0).Run(store);
    store.Finish();
  }
}

template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchSampled(const SampledParams& params, const SampledPlan& plan, int grid, cudaStream_t stream) {
  constexpr bool kTransposeLeft = kLeft == Layout::kMnMajor, kTransposeRight = kRight == Layout::kMnMajor;
  const auto kernel = params.block_rows == 128 ? SampledKernel<Element, kTransposeLeft, kTransposeRight, 256>
                                               : SampledKernel<Element, kTransposeLeft, kTransposeRight, 128>;
  constexpr int kBytes = sizeof(Shared<Element>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<grid, kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace jax_bsk::matmul::cuda::sm90
