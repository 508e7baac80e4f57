#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "matmul/plan.h"

namespace jax_bsk::matmul::cuda {
namespace {

constexpr int kThreads = 1024;
// Every row is compared with every other; more rows than this fill the chip evenly in any order.
constexpr int kMaxOrdered = 2048;

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
                                                      int blocks_per_row, int32_t* ticket, int32_t* order) {
  __shared__ int lengths[kMaxOrdered];
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
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

__global__ void __launch_bounds__(kThreads)
    GroupEntries(const __grid_constant__ SampledParams params, int entries, int shift, int32_t* count, int32_t* items) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scratch;
  const int capacity = static_cast<int>(params.capacity);
  const int32_t* rows = params.row_ids + int64_t{blockIdx.x} * capacity;
  items += int64_t{blockIdx.x} * capacity;
  int first = 0, total = 0;  // where the row began that the last chunk ended with; items so far
  for (int chunk = 0; chunk < capacity; chunk += kThreads) {
    const int entry = chunk + threadIdx.x;
    const int row = entry < capacity ? rows[entry] : -1;
    const bool begins = entry < capacity && (entry == 0 || rows[entry - 1] != row);
    int begin = 0, last_begin = 0, place = 0, added = 0;
    Scan(scratch).InclusiveScan(begins ? entry : first, begin, Larger(), last_begin);
    __syncthreads();
    const bool leads = entry < capacity && (entry - begin) % entries == 0;
    Scan(scratch).ExclusiveSum(leads ? 1 : 0, place, added);
    __syncthreads();
    if (leads) {
      int size = 1;
      while (size < entries && entry + size < capacity && rows[entry + size] == row) ++size;
      items[total + place] = entry | (size - 1) << shift;
    }
    first = last_begin;
    total += added;
  }
  if (threadIdx.x == 0) count[blockIdx.x] = total;
}

}  // namespace

cudaError_t LaunchOrderRows(const ProductParams& params, int rows, int blocks_per_row, int32_t* ticket, int32_t* order,
                            cudaStream_t stream) {
  OrderRows<<<static_cast<unsigned>(params.matrix_batch), kThreads, 0, stream>>>(params, rows, blocks_per_row, ticket,
                                                                                 order);
  return cudaGetLastError();
}

cudaError_t LaunchGroupEntries(const SampledParams& params, int entries, int shift, int32_t* count, int32_t* items,
                               cudaStream_t stream) {
  GroupEntries<<<static_cast<unsigned>(params.list_batch), kThreads, 0, stream>>>(params, entries, shift, count, items);
  return cudaGetLastError();
}

}  // namespace jax_bsk::matmul::cuda
