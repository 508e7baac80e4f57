#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "matmul/plan.h"

namespace jax_bsk::matmul::cuda {
namespace {

constexpr int kThreads = 1024;
// Every row is compared with every other; more rows than this fill the chip evenly in any order.
constexpr int kMaxOrdered = 2048;
constexpr int kMaxEntries = 4;  // of an item

struct Larger {
  __device__ __forceinline__ int operator()(int a, int b) const { return max(a, b); }
};

__device__ __forceinline__ int RowLength(const ProductParams& params, const int32_t* offsets, int row,
                                         int blocks_per_row) {
  int length = 0;
  for (int i = 0; i < blocks_per_row; ++i) {
    const int64_t block = int64_t{row} * blocks_per_row + i;
    if (block >= params.out_blocks) break;
    const int64_t size = int64_t{offsets[block + 1]} - offsets[block];
    length += static_cast<int>(min(max(size, int64_t{0}), params.capacity));
  }
  return length;
}

__global__ void __launch_bounds__(kThreads) OrderRows(const __grid_constant__ ProductParams params, int rows,
                                                      int blocks_per_row, int32_t* work_counter, int32_t* order) {
  __shared__ int lengths[kMaxOrdered];
  if (blockIdx.x == 0 && threadIdx.x == 0) *work_counter = 0;
  order += int64_t{blockIdx.x} * rows;
  if (rows > kMaxOrdered) {
    for (int row = threadIdx.x; row < rows; row += kThreads) order[row] = row;
    return;
  }
  const int32_t* offsets = params.lists.offsets + blockIdx.x * (params.out_blocks + 1);
  for (int row = threadIdx.x; row < rows; row += kThreads)
    lengths[row] = RowLength(params, offsets, row, blocks_per_row);
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const int length = lengths[row];
    int rank = 0;
    for (int other = 0; other < rows; ++other) {
      rank += lengths[other] > length || (lengths[other] == length && other < row);
    }
    order[rank] = row;
  }
}

// Two passes over the entries: where items begin and how large they are, and their places by falling size.
__global__ void __launch_bounds__(kThreads) GroupEntries(const __grid_constant__ SampledParams params, int entries,
                                                         int shift, int32_t* count, int32_t* items, int32_t* sizes) {
  // Warp by warp: the default algorithm needs more registers than 1,024 threads have.
  using Begins = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using Counts = cub::BlockScan<uint64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;  // of each size, 16 bits (<= 1,024)
  __shared__ union {
    typename Begins::TempStorage begins;
    typename Counts::TempStorage counts;
  } scratch;
  __shared__ int totals[kMaxEntries + 1];  // of each size; then where those of each size begin
  const int capacity = static_cast<int>(params.capacity), thread = static_cast<int>(threadIdx.x);
  const int32_t* rows = params.row_ids + int64_t{blockIdx.x} * capacity;
  items += int64_t{blockIdx.x} * capacity;
  sizes += int64_t{blockIdx.x} * capacity;
  if (thread <= kMaxEntries) totals[thread] = 0;
  __syncthreads();
  int first = 0;  // where the row began that the last chunk ended with
  for (int chunk = 0; chunk < capacity; chunk += kThreads) {
    const int entry = chunk + thread;
    const int row = entry < capacity ? rows[entry] : -1;
    const bool begins = entry < capacity && (entry == 0 || rows[entry - 1] != row);
    int begin = 0, last_begin = 0, size = 0;
    Begins(scratch.begins).InclusiveScan(begins ? entry : first, begin, Larger(), last_begin);
    __syncthreads();
    if (entry < capacity && (entry - begin) % entries == 0) {
      size = 1;
      while (size < entries && entry + size < capacity && rows[entry + size] == row) ++size;
    }
    for (int of = 1; of <= entries; ++of) {
      const int found = __syncthreads_count(size == of);
      if (thread == 0) totals[of] += found;
    }
    if (entry < capacity) sizes[entry] = size;
    first = last_begin;
  }
  if (thread == 0) {
    int begin = 0;
    for (int of = entries; of >= 1; --of) {
      const int found = totals[of];
      totals[of] = begin;
      begin += found;
    }
    count[blockIdx.x] = begin;
  }
  __syncthreads();
  for (int chunk = 0; chunk < capacity; chunk += kThreads) {
    const int entry = chunk + thread, size = entry < capacity ? sizes[entry] : 0;  // (its own writing)
    uint64_t before = 0, all = 0;
    Counts(scratch.counts).ExclusiveSum(size > 0 ? uint64_t{1} << (16 * (size - 1)) : 0, before, all);
    if (size > 0) {
      items[totals[size] + static_cast<int>(before >> (16 * (size - 1)) & 0xFFFF)] = entry | (size - 1) << shift;
    }
    __syncthreads();
    if (thread >= 1 && thread <= entries) totals[thread] += static_cast<int>(all >> (16 * (thread - 1)) & 0xFFFF);
    __syncthreads();
  }
}

}  // namespace

cudaError_t LaunchOrderRows(const ProductParams& params, int rows, int blocks_per_row, int32_t* work_counter,
                            int32_t* order, cudaStream_t stream) {
  OrderRows<<<static_cast<unsigned>(params.matrix_batch), kThreads, 0, stream>>>(params, rows, blocks_per_row,
                                                                                 work_counter, order);
  return cudaGetLastError();
}

cudaError_t LaunchGroupEntries(const SampledParams& params, int entries, int shift, int32_t* count, int32_t* items,
                               int32_t* sizes, cudaStream_t stream) {
  GroupEntries<<<static_cast<unsigned>(params.list_batch), kThreads, 0, stream>>>(params, entries, shift, count, items,
                                                                                  sizes);
  return cudaGetLastError();
}

}  // namespace jax_bsk::matmul::cuda
