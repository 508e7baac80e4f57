// Block lists transposed by a counting sort, one CTA a table. Warps have consecutive parts of the entries and counters
// of their own, so that the order is stable and no bit depends on which warp comes first.
#include <algorithm>

#include "device/host.h"
#include "lists/launch.h"

namespace jax_bsk::lists::cuda {
namespace {

constexpr int kMaxWarps = 16;  // 32 would have too few registers

struct Table {
  int rows, keys, capacity;  // keys: 2 column, + 1 without a tile; the last for entries of no row or column
  const int32_t *offsets, *ids, *tiles;
  int32_t *col_offsets, *row_ids, *col_tiles, *to_columns, *to_rows;

  __device__ Table(const TransposeParams& p, int64_t table)
      : rows(static_cast<int>(p.rows)),
        keys(2 * static_cast<int>(p.columns) + 1),
        capacity(static_cast<int>(p.capacity)),
        offsets(p.offsets + table * (p.rows + 1)),
        ids(p.ids + table * p.capacity),
        tiles(p.tiles + table * p.capacity),
        col_offsets(p.col_offsets + table * (p.columns + 1)),
        row_ids(p.row_ids + table * p.capacity),
        col_tiles(p.col_tiles + table * p.capacity),
        to_columns(p.to_columns + table * p.capacity),
        to_rows(p.to_rows + table * p.capacity) {}

  // The sort key of an entry: its column and class, when entries of rows are [begin, end). Others come last.
  __device__ int Key(int entry, int begin, int end, int& tile) const {
    const int id = __ldg(ids + entry);
    tile = __ldg(tiles + entry);
    return entry >= begin && entry < end && id >= 0 && id < keys / 2 ? 2 * id + (tile == -1) : keys - 1;
  }
};

// One warp: the running maxima of the offsets, clipped to the capacity.
__device__ void ReadOffsets(const Table& table, int* offsets) {
  const int lane = threadIdx.x % 32;
  int largest = 0;  // what is below 0 counts as 0
  for (int first = 0; first <= table.rows; first += 32) {
    int x = first + lane <= table.rows ? min(__ldg(table.offsets + first + lane), table.capacity) : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xFFFFFFFFu, x, step);
      if (lane >= step) x = max(x, before);
    }
    x = max(x, largest);
    if (first + lane <= table.rows) offsets[first + lane] = x;
    largest = __shfl_sync(0xFFFFFFFFu, x, 31);
  }
}

// One warp: from the keys' totals to where they begin, and the columns' offsets.
__device__ void Scan(const Table& table, int* totals) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int first = 0; first < table.keys; first += 32) {
    const int key = first + lane, total = key < table.keys ? totals[key] : 0;
    int x = total;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xFFFFFFFFu, x, step);
      if (lane >= step) x += before;
    }
    if (key < table.keys) {
      totals[key] = sum + x - total;
      if (key % 2 == 0) table.col_offsets[key / 2] = sum + x - total;
    }
    sum += __shfl_sync(0xFFFFFFFFu, x, 31);
  }
}

// The words of an entry; key -1 past the part's end.
struct Entry {
  int key, tile, row;
};
__device__ Entry ReadEntry(const Table& table, int entry, int last, int begin, int end) {
  Entry found{-1, -1, -1};
  if (entry < last) {
    found.key = table.Key(entry, begin, end, found.tile);
    if (entry >= begin && entry < end) found.row = table.to_rows[entry];
  }
  return found;
}

__global__ void __launch_bounds__(32 * kMaxWarps) TransposeKernel(const TransposeParams params) {
  extern __shared__ int words[];
  const Table table(params, blockIdx.x);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int *const offsets = words, *const totals = offsets + table.rows + 1, *const counters = totals + table.keys;
  int* const own = counters + warp * table.keys;

  // ---- Offsets; counters of 0.
  if (warp == 0) ReadOffsets(table, offsets);
  for (int i = static_cast<int>(threadIdx.x); i < warps * table.keys; i += static_cast<int>(blockDim.x)) {
    counters[i] = 0;
  }
  __syncthreads();

  // ---- How many entries of each key a warp's part has; meanwhile each entry's row, where its place will be.
  const int begin = offsets[0], end = offsets[table.rows];
  const int part = ((table.capacity + warps - 1) / warps + 31) / 32 * 32;
  const int first = warp * part, last = min(table.capacity, first + part);
  for (int row = warp; row < table.rows; row += warps) {
    for (int entry = offsets[row] + lane; entry < offsets[row + 1]; entry += 32) table.to_rows[entry] = row;
  }
#pragma unroll 4
  for (int entry = first + lane; entry < last; entry += 32) {
    int tile;
    atomicAdd(own + table.Key(entry, begin, end, tile), 1);
  }
  __syncthreads();

  // ---- Where they begin.
  for (int key = static_cast<int>(threadIdx.x); key < table.keys; key += static_cast<int>(blockDim.x)) {
    int total = 0;
    for (int i = 0; i < warps; ++i) total += counters[i * table.keys + key];
    totals[key] = total;
  }
  __syncthreads();
  if (warp == 0) Scan(table, totals);
  __syncthreads();
  for (int key = static_cast<int>(threadIdx.x); key < table.keys; key += static_cast<int>(blockDim.x)) {
    int place = totals[key];
    for (int i = 0; i < warps; ++i) {
      const int count = counters[i * table.keys + key];
      counters[i * table.keys + key] = place;
      place += count;
    }
  }
  __syncthreads();

  // ---- The entries to their places, in order; what the next 32 have is read meanwhile.
  Entry next = ReadEntry(table, first + lane, last, begin, end);
  for (int base = first; base < last; base += 32) {
    const int entry = base + lane;
    const Entry now = next;
    next = ReadEntry(table, entry + 32, last, begin, end);
    const unsigned peers = __match_any_sync(0xFFFFFFFFu, now.key);
    const int rank = __popc(peers & ((1u << lane) - 1));
    const int place = now.key < 0 ? 0 : own[now.key] + rank;
    __syncwarp();
    if (now.key >= 0 && rank == 0) own[now.key] += __popc(peers);
    __syncwarp();
    if (now.key < 0) continue;
    const bool listed = now.key < table.keys - 1;
    table.row_ids[place] = listed ? now.row : -1;
    table.col_tiles[place] = listed ? now.tile : -1;
    table.to_columns[place] = entry;
    table.to_rows[entry] = place;
  }
}

int64_t Words(const TransposeParams& params, int64_t warps) {
  return params.rows + 1 + (2 * params.columns + 1) * (1 + warps);
}

}  // namespace

std::string TransposeRefusal(const TransposeParams& params) {
  if (Words(params, 1) > Limits::kMaxWords) {
    return "the CUDA kernels transpose lists with rows + 4 columns + 3 up to " + std::to_string(Limits::kMaxWords) +
           ", not of " + std::to_string(params.rows) + " and " + std::to_string(params.columns);
  }
  if (params.capacity > device::kMaxInt - 1024 || params.tables > device::kMaxInt) {
    return "the CUDA kernels transpose fewer than 2^31 lists of fewer than 2^31 entries";
  }
  return "";
}

cudaError_t LaunchTranspose(const TransposeParams& params, int device, cudaStream_t stream) {
  if (params.tables == 0) return cudaSuccess;
  const device::DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  device::DeviceFacts facts;
  if (const cudaError_t error = ReadDevice(device, &facts); error != cudaSuccess) return error;
  // A warp for each 128 entries, as far as their counters fit.
  const int64_t most = (facts.shared_bytes / 4 - Words(params, 0)) / (2 * params.columns + 1);
  const int64_t wanted = std::max<int64_t>(4, device::CeilDiv(params.capacity, 128));
  const int64_t warps = std::max<int64_t>(1, std::min({most, wanted, int64_t{kMaxWarps}}));
  const auto bytes = static_cast<int>(4 * Words(params, warps));
  // The most there is, whatever this call takes: the attribute is the kernel's, and other threads launch it, too.
  const cudaError_t error =
      cudaFuncSetAttribute(TransposeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, facts.shared_bytes);
  if (error != cudaSuccess) return error;
  TransposeKernel<<<static_cast<unsigned>(params.tables), static_cast<unsigned>(32 * warps), bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_bsk::lists::cuda
