#include <algorithm>

#include "attention/prepare.h"
#include "attention/sm90/bwd_plan.h"
#include "attention/softmax.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void ConvertStatistics(const BackwardParams& params, float* statistics) {
  const Shape& shape = params.shape;
  const int64_t padded = (shape.q_len + 63) / 64 * 64, count = shape.batch * shape.heads * padded;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += gridDim.x * int64_t{kThreads}) {
    const int64_t row = i / padded;
    const int position = static_cast<int>(i % padded);
    const auto limit = lists::ReadLengths(params.lengths, static_cast<int>(row / shape.heads),
                                          static_cast<int>(shape.q_len), static_cast<int>(shape.kv_len));
    auto result = RowStatistics::None();
    if (position < limit.query) {
      const int64_t at = row * shape.q_len + position;
      result = RowStatistics::Of(__ldg(static_cast<const float*>(params.lse) + at),
                                 __ldg(static_cast<const float*>(params.lse_rest) + at),
                                 __ldg(static_cast<const float*>(params.delta) + at));
    }
    float* tile = statistics + (i / 64) * sm90::kStatisticsWords + i % 64;
    tile[0] = result.lse;
    tile[64] = result.delta;
    // Where it is below 2^-15, and so of no account to 16-bit probabilities, no tile asks for the slower exponentials.
    tile[128] = fabsf(result.lse) < 1024.f ? 0.f : result.rest;
  }
}

// Matches: one CTA a row, one warp an entry at a time.
__device__ __forceinline__ void MatchRow(const BackwardParams& params, int2* matches) {
  const BlockList &rows = params.rows, &cols = params.cols;
  const int table = static_cast<int>(blockIdx.x / rows.rows), row_id = static_cast<int>(blockIdx.x % rows.rows);
  if (table >= rows.batch * rows.heads) return;
  const int batch = table / static_cast<int>(rows.heads), head = table % static_cast<int>(rows.heads);
  const lists::ListRow row = lists::FindRow(rows, batch, head, row_id);
  // Rows or columns that have entries in common would write each other's matches and subtiles of dS. Those that have
  // more entries than there are blocks list some of them twice, which is allowed, but would make the search take time
  // in proportion to the product of their lengths: with them, no row takes longer than one of a full mask does. Such
  // rows have no match, and the portable kernels see to them. (Both lists have the same tables.)
  const bool in_order = lists::InOrder<kThreads>(rows, table) && lists::InOrder<kThreads>(cols, table);
  const bool searched = !__syncthreads_or(!in_order) && row.length <= rows.ids_end;
  const int lane = threadIdx.x % 32;
  for (int entry = threadIdx.x / 32; entry < row.length; entry += kThreads / 32) {
    const int64_t at = row.begin + entry;
    const int id = __ldg(rows.ids + at), tile = __ldg(rows.tiles + at);
    int match = -1;
    const bool readable = id >= 0 && id < rows.ids_end && tile >= -1 && tile < params.tiles.count;
    const lists::ListRow col = searched && readable ? lists::FindRow(cols, batch, head, id) : lists::ListRow{0, -1};
    if (col.length <= cols.ids_end) {
      bool sound = true;
      // A block may be listed more than once, and then each entry has its own gate: as many of the same are before its
      // match as are before it. Without gates any of them will do.
      int before = 0;
      for (int i = 0; params.dgates != nullptr && col.length > 0 && i < entry; i += 32) {
        const bool same = i + lane < entry && __ldg(rows.ids + row.begin + i + lane) == id &&
                          __ldg(rows.tiles + row.begin + i + lane) == tile;
        before += __popc(__ballot_sync(0xFFFFFFFFu, same));
      }
      for (int i = 0; i < col.length; i += 32) {
        const bool inside = i + lane < col.length;
        const int col_id = inside ? __ldg(cols.ids + col.begin + i + lane) : -1;
        const int col_tile = inside ? __ldg(cols.tiles + col.begin + i + lane) : -1;
        const bool bad =
            inside && (col_id < 0 || col_id >= cols.ids_end || col_tile < -1 || col_tile >= params.tiles.count);
        sound = sound && !__any_sync(0xFFFFFFFFu, bad);
        unsigned found = __ballot_sync(0xFFFFFFFFu, inside && col_id == row_id && col_tile == tile);
        for (; found != 0 && before > 0; --before) found &= found - 1;
        if (found != 0 && match < 0) {
          const int64_t first = lists::TableIndex(cols.batch, cols.heads, batch, head) * cols.capacity;
          match = static_cast<int>(col.begin - first) + i + __ffs(found) - 1;
        }
      }
      if (!sound) match = -1;
    }
    if (lane == 0) matches[at] = make_int2(match, row_id);
  }
}

// The order of a slice's items of keys, by one CTA.
__device__ __forceinline__ void OrderItems(const BackwardParams& params, const Preparation& preparation, int slice) {
  constexpr int kEach = 4;  // items a thread has at a time: their loads overlap
  const BlockList& cols = params.cols;
  const int group = static_cast<int>(params.shape.heads / params.shape.kv_heads);
  const int kv_heads = static_cast<int>(params.shape.kv_heads),
            kv_rows = static_cast<int>(params.shape.batch) * kv_heads;
  const int items = preparation.slice_heads * preparation.key_tiles, thread = static_cast<int>(threadIdx.x);
  const auto entries = [&](int item) {
    const int row = slice * preparation.slice_heads + item / preparation.key_tiles;
    const int block = item % preparation.key_tiles / preparation.tile_blocks;
    int sum = 0;
    for (int i = 0; item < items && row < kv_rows && i < group; ++i) {
      sum += max(0, lists::FindRow(cols, row / kv_heads, row % kv_heads * group + i, block).length);
    }
    return sum;
  };
  __shared__ unsigned long long total;
  __shared__ int heavy, first[2];
  if (thread == 0) total = 0, heavy = 0;
  __syncthreads();
  unsigned long long own = 0;
#pragma unroll kEach
  for (int item = thread; item < items; item += kThreads) own += entries(item);
  atomicAdd(&total, own);
  __syncthreads();
  const unsigned long long all = total;
  const auto is_heavy = [&](int item) { return entries(item) * static_cast<unsigned long long>(items) > 2 * all; };
  int count = 0;
#pragma unroll kEach
  for (int item = thread; item < items; item += kThreads) count += is_heavy(item);
  atomicAdd(&heavy, count);
  __syncthreads();
  if (thread == 0) first[0] = heavy, first[1] = 0;
  // Whose places come first is of no account for any result, but the order is the same from run to run.
  __shared__ int warps[2][kThreads / 32];
  const int lane = thread % 32, warp = thread / 32;
  for (int base = 0; base < items; base += kThreads) {
    const int item = base + thread;
    const bool is_item = item < items, chosen = is_item && is_heavy(item);
    const unsigned mine = __ballot_sync(0xFFFFFFFFu, chosen), others = __ballot_sync(0xFFFFFFFFu, is_item && !chosen);
    if (lane == 0) warps[1][warp] = __popc(mine), warps[0][warp] = __popc(others);
    __syncthreads();
    int place = first[chosen] + __popc((chosen ? mine : others) & ((1u << lane) - 1));
    for (int i = 0; i < warp; ++i) place += warps[chosen][i];
    if (is_item) preparation.order[int64_t{slice} * items + place] = item;
    __syncthreads();
    if (thread < 2) {
      for (int i = 0; i < kThreads / 32; ++i) first[thread] += warps[thread][i];
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    PrepareKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ Preparation preparation) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < preparation.zero_count;
       i += gridDim.x * int64_t{kThreads}) {
    preparation.zeros[i] = 0;
  }
  ConvertStatistics(params, preparation.statistics);
  MatchRow(params, preparation.matches);
  for (int slice = static_cast<int>(gridDim.x - 1 - blockIdx.x); slice < preparation.slices; slice += gridDim.x) {
    OrderItems(params, preparation, slice);
  }
}

}  // namespace

cudaError_t LaunchPrepare(const BackwardParams& params, const Preparation& preparation, cudaStream_t stream) {
  const Shape& shape = params.shape;
  const int64_t match_ctas = params.rows.batch * params.rows.heads * params.rows.rows;
  const int64_t statistics_ctas = shape.batch * shape.heads * ((shape.q_len + 63) / 64) * 64 / kThreads;
  const auto grid = static_cast<unsigned>(std::max<int64_t>({1, match_ctas, std::min<int64_t>(statistics_ctas, 2048)}));
  PrepareKernel<<<grid, kThreads, 0, stream>>>(params, preparation);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda
