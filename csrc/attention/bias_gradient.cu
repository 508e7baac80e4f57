// The gradient of one term of the bias: S = Q K^T and dP = dO V^T once more, for 64 x 64 pairs at a time, and dS from
// them as in sm80/bwd.cuh, but without the soft cap's slope and the scale.
//
// Rows and columns are read in chunks of 128 bytes, so that one kernel is for all head sizes.
#include <algorithm>

#include "attention/bias.cuh"
#include "attention/bias_gradient.h"
#include "attention/dropout.cuh"
#include "attention/sm80/bwd_pairs.cuh"
#include "attention/sm80/query_tile.cuh"
#include "attention/sm90/bias_gradient.h"
#include "device/host.h"
#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/thread.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda {
namespace {

using Keep = BiasGradientPlan::Keep;

constexpr int kThreads = 256;  // eight warps, each of 16 queries and half the keys: more would spill
// A CTA waits for one thing after the other; two of them a multiprocessor hide half of it. (For sm_80 they would
// spill.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kCtas = 2;
#else
constexpr int kCtas = 1;
#endif
constexpr int kTile = 64;
constexpr int kHalf = kTile / 2;
constexpr int kSums = 2048;  // numbers that a slot keeps in shared memory

template <typename Element>
constexpr int kChunk = 128 / static_cast<int>(sizeof(Element));  // of a head size at a time

using Pairs = float[1][kHalf / 8][4];

// A thread's share of a tile: in its Pairs, [0][n][e] is query Query(e) and key Key(n, e).
struct Thread {
  int number, warp, lane, g, t;
  __device__ __forceinline__ Thread()
      : number(device::ThreadHere()), warp(number / 32), lane(number % 32), g(lane / 4), t(lane % 4) {}
  __device__ __forceinline__ int half() const { return warp / 4; }  // of the keys
  __device__ __forceinline__ int first_query() const { return warp % 4 * 16 + g; }
  __device__ __forceinline__ int first_key() const { return half() * kHalf + 2 * t; }
  __device__ __forceinline__ int Query(int e) const { return first_query() + 8 * (e / 2); }
  __device__ __forceinline__ int Key(int n, int e) const { return first_key() + 8 * n + e % 2; }
};

// What a CTA does.
struct Slot {
  int batch, head;             // of the result's table
  int64_t table;               // its number
  int batch_begin, batch_end;  // examples and heads that share it
  int head_begin, head_end;
  int q_begin, q_end;  // tiles of 64 queries
  int q_step;
  // Tiles of 64 keys: tile `key_tile`, which is counted from the query tile's number with distances; -1 and no
  // distances: those of all entries, or of each the part kv_part, if that is not negative.
  int key_tile, kv_part;
  int tile_begin, tile_end;  // of the bias's tiles, those that count

  Slot() = default;
  __device__ __forceinline__ Slot(const BiasGradientParams& params, const BiasGradientPlan& plan) {
    const Shape& shape = params.shape;
    int64_t number = blockIdx.x;
    table = number / plan.slots, number %= plan.slots;
    batch = static_cast<int>(table / plan.tables_heads), head = static_cast<int>(table % plan.tables_heads);
    const bool one_batch = plan.tables_batch == 1, one_head = plan.tables_heads == 1;
    batch_begin = one_batch ? 0 : batch, batch_end = one_batch ? static_cast<int>(shape.batch) : batch + 1;
    head_begin = one_head ? 0 : head, head_end = one_head ? static_cast<int>(shape.heads) : head + 1;
    const int q_tiles = static_cast<int>((shape.q_len + kTile - 1) / kTile);
    const int kv_tiles = static_cast<int>((shape.kv_len + kTile - 1) / kTile);
    q_begin = 0, q_end = q_tiles, q_step = 1;
    key_tile = kv_part = -1;
    tile_begin = 0, tile_end = 0;
    const int at = static_cast<int>(number);
    if (params.term == BiasTerm::kDense) {
      if (plan.keep == Keep::kPairs || plan.keep == Keep::kKeys) key_tile = at % kv_tiles;
      if (plan.keep == Keep::kPairs || plan.keep == Keep::kQueries) {
        q_begin = plan.keep == Keep::kPairs ? at / kv_tiles : at;
        q_end = q_begin + 1;
      }
    } else if (params.term == BiasTerm::kDistances) {
      key_tile = at - (q_tiles - 1);
      q_begin = max(0, -key_tile), q_end = min(q_tiles, kv_tiles - key_tile);
    } else if (plan.keep == Keep::kPairs) {
      const int q_parts = static_cast<int>(shape.block_q) / kTile, kv_parts = static_cast<int>(shape.block_kv) / kTile;
      kv_part = at % kv_parts;
      q_begin = at / kv_parts % q_parts, q_step = q_parts;
      tile_begin = at / kv_parts / q_parts, tile_end = tile_begin + 1;
    } else {
      tile_begin = at * plan.range;
      tile_end = static_cast<int>(min(params.bias.tiles_count, int64_t{tile_begin} + plan.range));
    }
  }
};

// One of the two products of a tile: left right^T over `dim` elements of 64 rows each; rows at and past left_rows and
// right_rows count as 0.
template <typename Element>
struct Product {
  const Element *left, *right;
  int left_stride, right_stride, left_rows, right_rows, dim;
  __device__ __forceinline__ int chunks() const { return (dim + kChunk<Element> - 1) / kChunk<Element>; }
};

// An entry of a list that a thread has found, and where in its row the thread goes on.
struct Found {
  int64_t position;  // in the list's arrays
  int q_tile, id, bits, bias_tile, next;
};

template <typename Element>
struct Shared {
  struct Stage {
    device::Tile<Element, kTile, kChunk<Element>> left;      // of queries or dO
    device::Tile<Element, kHalf, kChunk<Element>> right[2];  // of keys or values
  };
  static constexpr int kStages = 4;
  union {
    Stage stages[kStages];
    float pairs[kTile][kTile + 1];  // after the last chunk: biases; at the end what is summed along diagonals
  };
  float parts[4][kTile];  // of a sum, one a warp
  float sums[kSums];
  // Here, because their numbers would take registers that the products need.
  Slot slot;
  Found found[kThreads];
  uint32_t found_by[kThreads / 32];  // which of them count: a bit each
  int batch, head;                   // that they are of
  lists::LengthLimits limit;
  int row_end;  // the thread that found the end of the row before its time
  Product<Element> products[2];
  BiasViews views;  // of the entry
};

// ---- One 64 x 64 tile of pairs

// Queries of one head, as sm80::AttendedKeys has them.
struct Rows {
  int batch, head;
  lists::LengthLimits limit;
  int q_start;
};

// An entry, of which `step` is 64 keys.
struct Entry {
  lists::Step step;
  float gate;
  int bias_tile;
};

// Of an entry that was found, and a part of its keys. From shared memory each time they are needed: kept beside the
// products they would spill.
template <typename Element>
__device__ __forceinline__ Rows RowsOf(const Shared<Element>& shared, int number) {
  return {shared.batch, shared.head, shared.limit, shared.found[number].q_tile * kTile};
}
template <typename Element>
__device__ __forceinline__ Entry EntryOf(const Shared<Element>& shared, const BiasGradientParams& params, int number,
                                         int part) {
  const Found& found = shared.found[number];
  const int start = found.id * static_cast<int>(params.shape.block_kv) + part * kTile;
  float gate = 1.f;
  if (params.gates != nullptr) {
    gate = lists::ReadGate(
        params.gates, lists::GateIndex(params.rows, params.shape.heads, shared.batch, shared.head, found.position));
  }
  return {{start, part * kTile, found.bits}, gate, found.bias_tile};
}

// Adds the two products of shared.products to `first` and `second`. Chunks of both are one stream: three are on their
// way while one is used.
template <typename Element>
__device__ __forceinline__ void MultiplyChunks(Shared<Element>& shared, Pairs& first, Pairs& second) {
  constexpr int kStages = Shared<Element>::kStages;
  __syncthreads();  // the products are written; nobody reads the chunks of an earlier tile any more
  const Thread own;
  const int begin = shared.products[0].chunks(), end = begin + shared.products[1].chunks();
  const auto load = [&](int chunk) {
    if (chunk < end) {
      const Product<Element>& product = shared.products[chunk >= begin];
      const int at = (chunk >= begin ? chunk - begin : chunk) * kChunk<Element>, dim = product.dim - at;
      auto& stage = shared.stages[chunk % kStages];
      device::LoadTileAsync<kThreads>(stage.left, product.left + at, product.left_stride, product.left_rows, dim,
                                      own.number);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        device::LoadTileAsync<kThreads>(stage.right[half],
                                        product.right + at + int64_t{half * kHalf} * product.right_stride,
                                        product.right_stride, product.right_rows - half * kHalf, dim, own.number);
      }
    }
    device::CommitCopies();  // a group also where there is nothing left
  };
#pragma unroll 1
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  const auto multiply = [&](int chunk, Pairs& acc) {
    device::WaitForGroups<kStages - 2>();
    __syncthreads();
    load(chunk + kStages - 1);
    const auto& stage = shared.stages[chunk % kStages];
    device::MultiplyRows(acc, stage.left, own.warp % 4 * 16, stage.right[own.half()]);
  };
#pragma unroll 1
  for (int chunk = 0; chunk < begin; ++chunk) multiply(chunk, first);
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) multiply(chunk, second);
}

// The biases of the pairs of `rows` and `entry` to shared.pairs, where the chunks were. (As sums in registers they
// would spill.) Those past the ends are any.
template <typename Element>
__device__ __forceinline__ void StageBiases(Shared<Element>& shared, const BiasGradientParams& params, const Rows& rows,
                                            const Entry& entry) {
  const Shape& shape = params.shape;
  const int thread = device::ThreadHere(), column = thread % kTile;
  const int last_query = static_cast<int>(shape.q_len) - 1;
  const int key = min(entry.step.start + column, static_cast<int>(shape.kv_len) - 1);
  shared.views.WriteHead(params.bias, shape, rows.batch, rows.head, thread);
  if (thread == 2) shared.views.tile = entry.bias_tile;
  shared.views.WriteBlock(params.bias, shape, rows.q_start, entry.step.start, thread);
  __syncthreads();
  for (int row = thread / kTile; row < kTile; row += kThreads / kTile) shared.pairs[row][column] = 0.f;
#pragma unroll 1
  for (int term = 0; term < 3; ++term) {
    const BiasTermView& view = shared.views.terms[term];
    if (view.data == nullptr) continue;
    const auto add = [&](const auto* data) {
      data += view.first + static_cast<int64_t>(key) * view.step_kv;
#pragma unroll 4
      for (int row = thread / kTile; row < kTile; row += kThreads / kTile) {
        const int query = min(rows.q_start + row, last_query);
        shared.pairs[row][column] += LoadBias(data + static_cast<int64_t>(query) * view.step_q);
      }
    };
    if (std::is_same_v<Element, float> || view.wide) {
      add(static_cast<const float*>(view.data));
    } else {
      add(static_cast<const Element*>(view.data));
    }
  }
  __syncthreads();
}

// Writes what the products of an entry's pairs are of.
template <typename Element>
__device__ __forceinline__ void WriteProducts(Shared<Element>& shared, const BiasGradientParams& params, int number,
                                              int part) {
  const Shape& shape = params.shape;
  const Rows rows = RowsOf(shared, number);
  const int start = shared.found[number].id * static_cast<int>(shape.block_kv) + part * kTile;
  const int thread = device::ThreadHere();
  if (thread < 2) {
    const bool late = thread == 1;
    const int heads = static_cast<int>(shape.heads), kv_heads = static_cast<int>(shape.kv_heads);
    const int dim = static_cast<int>(late ? shape.value_dim : shape.head_dim);
    const int left_stride = heads * dim, right_stride = kv_heads * dim;
    const auto *left = static_cast<const Element*>(late ? params.dout : params.query),
               *right = static_cast<const Element*>(late ? params.value : params.key);
    shared.products[thread] = {
        left + (rows.batch * shape.q_len + rows.q_start) * left_stride + rows.head * dim,
        right + (rows.batch * shape.kv_len + start) * right_stride + rows.head / (heads / kv_heads) * dim,
        left_stride,
        right_stride,
        rows.limit.query - rows.q_start,
        rows.limit.key - start,
        dim};
  }
}

// total += dS of the pairs of an entry and a part that attend.
template <typename Element>
__device__ __forceinline__ void AddPairs(Shared<Element>& shared, const BiasGradientParams& params, int number,
                                         int part, Pairs& total) {
  const Shape& shape = params.shape;
  Pairs scores, dscores;
  device::Clear(scores);
  device::Clear(dscores);
  WriteProducts(shared, params, number, part);
  MultiplyChunks(shared, scores, dscores);

  const Thread own;
  const Rows rows = RowsOf(shared, number);
  const Entry entry = EntryOf(shared, params, number, part);
  const int heads = static_cast<int>(shape.heads), queries = rows.limit.query - rows.q_start;
  const LogitMap map(params.scale, params.soft_cap);
  RowStatistics statistics[2];
  uint64_t attended[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = own.Query(2 * half);
    statistics[half] = RowStatistics::None();
    attended[half] = 0;
    if (at < queries) {
      const int64_t index = (int64_t{rows.batch} * heads + rows.head) * shape.q_len + rows.q_start + at;
      statistics[half] = sm80::ReadStatistics(params, index);
      attended[half] = sm80::AttendedKeys<kTile>(params.tiles, shape, rows, at, entry.step) >> own.first_key();
    }
  }
  const bool biased = AnyTerm(params.bias), drops = params.dropout.keys != nullptr;
  const float factor = BiasFactor(map);
  if (biased) StageBiases(shared, params, rows, entry);
  DropoutWords<false, kHalf / 8> words;
  float kept = 1.f;
  if (drops) {
    kept = DropoutScale(params.dropout.threshold);
    const uint32_t head_key = __ldg(params.dropout.keys + int64_t{rows.batch} * heads + rows.head);
    words.Make(head_key, rows.q_start + own.first_query(), entry.step.start + own.first_key());
  }
#pragma unroll
  for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const RowStatistics& of = statistics[e / 2];
      float x = scores[0][n][e];
      if (!map.plain) x = map(x);
      if (biased) x = BiasedLogit(x, shared.pairs[own.Query(e)][own.Key(n, e)], factor);
      const float prob = Probability(fmaf(x, map.multiplier, -of.lse), of.rest);
      const float weight = drops && words.IsDropped(n, e, params.dropout.threshold) ? 0.f : kept;
      const float dscore = prob * fmaf(entry.gate * weight, dscores[0][n][e], -of.delta);
      if (attended[e / 2] >> (8 * n + e % 2) & 1) total[0][n][e] += dscore;
    }
}

// ---- Sums of a tile

// Adds to sums the sums of the pairs over their keys (64 numbers), their queries (64), or both (one). Contains
// barriers.
template <typename Element>
__device__ __forceinline__ void AddToSums(Shared<Element>& shared, const Pairs& pairs, Keep keep, float* sums) {
  const Thread own;
  auto& parts = shared.parts;
  if (keep == Keep::kKeys) {
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = pairs[0][n][e] + pairs[0][n][2 + e];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
        if (own.g == 0) parts[own.warp % 4][own.Key(n, e)] = sum;
      }
  } else {
    float rows[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) rows[e / 2] += pairs[0][n][e];
    if (keep == Keep::kQueries) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = device::QuadSum(rows[half]);
        if (own.t == 0) parts[own.half()][own.Query(2 * half)] = sum;
      }
    } else {
      const float sum = device::WarpSum(rows[0] + rows[1]);
      if (own.lane == 0) parts[own.warp % 4][own.half()] = sum;
    }
  }
  __syncthreads();
  const int i = own.number;
  if (keep == Keep::kKeys && i < kTile) sums[i] += (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]);
  if (keep == Keep::kQueries && i < kTile) sums[i] += parts[0][i] + parts[1][i];
  if (keep == Keep::kNothing && i == 0) {
    float sum = 0.f;
    for (int warp = 0; warp < 8; ++warp) sum += parts[warp % 4][warp / 4];
    *sums += sum;
  }
  __syncthreads();
}

// ---- What a CTA does

// Looks for entries, one a thread, at those of a row from `next` on; or, where a slot has one tile of keys in each of
// many rows (`row_each`), at a row a thread, each from where the thread last found one (the first time: `next` is 0).
// A row ends at the first entry that cannot be true. Returns whether there may be more. Contains barriers.
template <typename Element>
__device__ __forceinline__ bool FindEntries(Shared<Element>& shared, const BiasGradientParams& params, int batch,
                                            int head, const lists::LengthLimits& limit, int first_tile, bool row_each,
                                            int next) {
  const Slot& slot = shared.slot;
  const BlockList& list = params.rows;
  const bool distances = params.term == BiasTerm::kDistances, tiles = params.term == BiasTerm::kTiles;
  const bool one_key_tile = distances || slot.key_tile >= 0;
  const int thread = device::ThreadHere();
  Found& found = shared.found[thread];
  int at = !row_each ? next + thread : next == 0 ? 0 : found.next;
  __syncthreads();  // nobody reads what was found before
  if (thread == 0) shared.row_end = kThreads, shared.batch = batch, shared.head = head, shared.limit = limit;
  __syncthreads();
  const int q_tile = row_each ? first_tile + thread * slot.q_step : first_tile;
  const int key_tile = slot.key_tile + (distances ? q_tile : 0);
  lists::ListRow row{0, 0};
  if (q_tile < slot.q_end && q_tile * kTile < limit.query && (!one_key_tile || key_tile * kTile < limit.key)) {
    row = lists::FindRow(list, batch, head, q_tile * kTile / static_cast<int>(params.shape.block_q));
  }
  const int wanted = one_key_tile ? key_tile / (static_cast<int>(params.shape.block_kv) / kTile) : -1;
  bool is_found = false;
  for (; at < row.length && !is_found; ++at) {
    const int64_t position = row.begin + at;
    const int id = __ldg(list.ids + position), bits = __ldg(list.tiles + position);
    const int bias_tile = ReadBiasTile(params.bias, params.bias.row_tiles, position);
    if (id < 0 || id >= list.ids_end || bits < -1 || bits >= params.tiles.count) {
      if (!row_each) atomicMin(&shared.row_end, thread);
      at = row.length;
      break;
    }
    is_found = (wanted < 0 || id == wanted) && (!tiles || (bias_tile >= slot.tile_begin && bias_tile < slot.tile_end));
    if (is_found) found.position = position, found.id = id, found.bits = bits, found.bias_tile = bias_tile;
    if (!row_each) break;
  }
  found.q_tile = q_tile, found.next = at;
  const unsigned mask = __ballot_sync(0xFFFFFFFFu, is_found);
  if (thread % 32 == 0) shared.found_by[thread / 32] = mask;
  const bool any = __syncthreads_or(is_found);
  return row_each ? any : shared.row_end == kThreads && next + kThreads < row.length;
}

// Calls visit(number of an entry found, part of its keys) for every 64 x 64 tile of pairs of the slot, in an order that
// is always the same.
template <typename Element, typename Visit>
__device__ __forceinline__ void ForPairs(Shared<Element>& shared, const BiasGradientParams& params,
                                         const Visit& visit) {
  const Shape& shape = params.shape;
  const Slot& slot = shared.slot;
  const int block_kv = static_cast<int>(shape.block_kv), kv_parts = block_kv / kTile;
  const bool distances = params.term == BiasTerm::kDistances, one_key_tile = distances || slot.key_tile >= 0;
  const bool row_each = one_key_tile && slot.q_end - slot.q_begin > 1;
#pragma unroll 1
  for (int batch = slot.batch_begin; batch < slot.batch_end; ++batch) {
    const auto limit =
        lists::ReadLengths(params.lengths, batch, static_cast<int>(shape.q_len), static_cast<int>(shape.kv_len));
    const int q_end = min(slot.q_end, (limit.query + kTile - 1) / kTile);
#pragma unroll 1
    for (int head = slot.head_begin; head < slot.head_end; ++head)
#pragma unroll 1
      for (int first = slot.q_begin; first < q_end; first += row_each ? kThreads * slot.q_step : slot.q_step) {
        bool more = true;
#pragma unroll 1
        for (int next = 0; more; next += kThreads) {
          more = FindEntries(shared, params, batch, head, limit, first, row_each, next);
#pragma unroll 1
          for (int warp = 0; warp < kThreads / 32; ++warp) {
#pragma unroll 1
            for (unsigned mask = shared.found_by[warp]; mask != 0; mask &= mask - 1) {
              const int number = warp * 32 + __ffs(mask) - 1;
              if (number >= shared.row_end) break;
              const int only_part = (slot.key_tile + (distances ? shared.found[number].q_tile : 0)) % kv_parts;
#pragma unroll 1
              for (int part = 0; part < kv_parts; ++part) {
                if (one_key_tile ? part != only_part : slot.kv_part >= 0 && part != slot.kv_part) continue;
                if (shared.found[number].id * block_kv + part * kTile < limit.key) visit(number, part);
              }
            }
          }
        }
      }
  }
}

template <typename T>
__device__ __forceinline__ T Rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16_t>(device::PackPair<T>(x, 0.f))};
  }
}

// The 64 x 64 numbers of a thread's CTA to an array of rows `stride` elements apart, of which `rows` and `columns` are
// there.
template <typename T>
__device__ __forceinline__ void StorePairs(const Pairs& pairs, T* first, int64_t stride, int64_t rows,
                                           int64_t columns) {
  const Thread own;
#pragma unroll
  for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = own.Query(e), c = own.Key(n, e);
      if (r < rows && c < columns) first[r * stride + c] = Rounded<T>(pairs[0][n][e]);
    }
}

// The sums of a slot's diagonals, into the half that neighbouring slots do not write: element k - q + T - 1.
template <typename Element>
__device__ __forceinline__ void StoreDiagonals(Shared<Element>& shared, const Pairs& pairs,
                                               const BiasGradientParams& params, const Slot& slot) {
  const Thread own;
  __syncthreads();  // nobody reads the chunks any more
#pragma unroll
  for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) shared.pairs[own.Query(e)][own.Key(n, e)] = pairs[0][n][e];
  __syncthreads();
  const int distance = own.number - (kTile - 1);  // 127 of them
  const int64_t length = params.shape.q_len + params.shape.kv_len - 1;
  const int64_t at = int64_t{slot.key_tile} * kTile + distance + params.shape.q_len - 1;
  if (distance >= kTile || at < 0 || at >= length) return;
  float sum = 0.f;
  for (int query = max(0, -distance); query < min(kTile, kTile - distance); ++query) {
    sum += shared.pairs[query][query + distance];
  }
  static_cast<float*>(params.dbias)[(2 * slot.table + (slot.key_tile & 1)) * length + at] = sum;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, kCtas)
    BiasPairsKernel(const __grid_constant__ BiasGradientParams params, const __grid_constant__ BiasGradientPlan plan) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Element>*>(shared_bytes);
  if (threadIdx.x == 0) shared.slot = Slot(params, plan);
  __syncthreads();
  const Slot& slot = shared.slot;
  const int thread = static_cast<int>(threadIdx.x);
  const Shape& shape = params.shape;
  const Bias& bias = params.bias;
  const bool has_sums = plan.keep != Keep::kPairs && plan.keep != Keep::kDiagonals;
  if (has_sums) {
    for (int i = thread; i < kSums; i += kThreads) shared.sums[i] = 0.f;
  }

  // ---- Sums
  Pairs total;
  device::Clear(total);
  ForPairs(shared, params, [&](int number, int part) {
    AddPairs(shared, params, number, part, total);
    if (params.term != BiasTerm::kTiles || !has_sums) return;
    const Rows rows = RowsOf(shared, number);
    const Entry entry = EntryOf(shared, params, number, part);
    // Another entry may have another tile.
    const int place = plan.keep == Keep::kQueries ? rows.q_start % static_cast<int>(shape.block_q)
                      : plan.keep == Keep::kKeys  ? entry.step.offset
                                                  : 0;
    AddToSums(shared, total, plan.keep, shared.sums + (entry.bias_tile - slot.tile_begin) * plan.length + place);
    device::Clear(total);
  });

  // ---- Results
  if (plan.keep == Keep::kDiagonals) {
    StoreDiagonals(shared, total, params, slot);
  } else if (params.term == BiasTerm::kDense) {
    const int q_start = slot.q_begin * kTile, kv_start = slot.key_tile * kTile;
    const auto store = [&](auto* dbias) {
      using T = std::remove_pointer_t<decltype(dbias)>;
      T* table = dbias + slot.table * bias.dense_q * bias.dense_kv;
      if (plan.keep == Keep::kPairs) {
        StorePairs(total, table + q_start * shape.kv_len + kv_start, shape.kv_len, shape.q_len - q_start,
                   shape.kv_len - kv_start);
        return;
      }
      __syncthreads();  // the sums are 0
      AddToSums(shared, total, plan.keep, shared.sums);
      const int first = plan.keep == Keep::kQueries ? q_start : plan.keep == Keep::kKeys ? kv_start : 0;
      const int64_t length = plan.keep == Keep::kQueries ? shape.q_len : plan.keep == Keep::kKeys ? shape.kv_len : 1;
      if (thread < kTile && first + thread < length) table[first + thread] = Rounded<T>(shared.sums[thread]);
    };
    if (std::is_same_v<Element, float> || bias.dense_wide) {
      store(static_cast<float*>(params.dbias));
    } else {
      store(static_cast<Element*>(params.dbias));
    }
  } else {
    auto* table = static_cast<float*>(params.dbias) + slot.table * bias.tiles_count * bias.tiles_q * bias.tiles_kv;
    if (plan.keep == Keep::kPairs) {
      float* tile = table + slot.tile_begin * shape.block_q * shape.block_kv;
      StorePairs(total, tile + slot.q_begin * kTile * shape.block_kv + slot.kv_part * kTile, shape.block_kv, kTile,
                 kTile);
    } else {
      __syncthreads();
      const int count = (slot.tile_end - slot.tile_begin) * plan.length;
      for (int i = thread; i < count; i += kThreads) table[int64_t{slot.tile_begin} * plan.length + i] = shared.sums[i];
    }
  }
}

template <typename Element>
cudaError_t Launch(const BiasGradientParams& params, cudaStream_t stream) {
  const BiasGradientPlan plan(params);
  constexpr int kBytes = static_cast<int>(sizeof(Shared<Element>));
  const cudaError_t error =
      cudaFuncSetAttribute(BiasPairsKernel<Element>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  BiasPairsKernel<Element><<<static_cast<unsigned>(plan.ctas()), kThreads, kBytes, stream>>>(params, plan);
  return cudaGetLastError();
}

}  // namespace

BiasGradientPlan::BiasGradientPlan(const BiasGradientParams& params) {
  const Shape& shape = params.shape;
  const Bias& bias = params.bias;
  const int64_t q_tiles = device::CeilDiv(shape.q_len, kTile), kv_tiles = device::CeilDiv(shape.kv_len, kTile);
  const auto kept = [](int64_t queries, int64_t keys) {
    return queries == 1 ? (keys == 1 ? Keep::kNothing : Keep::kKeys) : keys == 1 ? Keep::kQueries : Keep::kPairs;
  };
  if (params.term == BiasTerm::kDense) {
    tables_batch = static_cast<int>(bias.dense_batch), tables_heads = static_cast<int>(bias.dense_heads);
    keep = kept(bias.dense_q, bias.dense_kv);
    slots = (bias.dense_q == 1 ? 1 : q_tiles) * (bias.dense_kv == 1 ? 1 : kv_tiles);
  } else if (params.term == BiasTerm::kDistances) {
    tables_batch = static_cast<int>(bias.distances_batch), tables_heads = static_cast<int>(bias.distances_heads);
    keep = Keep::kDiagonals;
    slots = q_tiles + kv_tiles - 1;
  } else {
    tables_batch = static_cast<int>(bias.tiles_batch), tables_heads = static_cast<int>(bias.tiles_heads);
    keep = kept(bias.tiles_q, bias.tiles_kv);
    if (keep == Keep::kPairs) {
      slots = bias.tiles_count * (shape.block_q / kTile) * (shape.block_kv / kTile);
    } else {
      // Each slot looks through all entries: as many tiles a slot as leave enough slots for the device.
      constexpr int64_t kEnough = 1024;
      length = static_cast<int>(bias.tiles_q * bias.tiles_kv);
      const int64_t all = int64_t{tables_batch} * tables_heads * bias.tiles_count;
      range = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(all / kEnough, kSums / length)));
      slots = device::CeilDiv(bias.tiles_count, range);
    }
  }
}

int64_t BiasGradientBytes(const BiasGradientParams& params) {
  const Bias& bias = params.bias;
  switch (params.term) {
    case BiasTerm::kDense:
      return bias.dense_batch * bias.dense_heads * bias.dense_q * bias.dense_kv *
             (bias.dense_wide || params.dtype == DType::kF32 ? 4 : 2);
    case BiasTerm::kDistances:
      return bias.distances_batch * bias.distances_heads * 2 *
             std::max<int64_t>(params.shape.q_len + params.shape.kv_len - 1, 0) * 4;
    case BiasTerm::kTiles:
      return bias.tiles_batch * bias.tiles_heads * bias.tiles_count * bias.tiles_q * bias.tiles_kv * 4;
  }
  return 0;
}

cudaError_t LaunchBiasGradientKernel(const BiasGradientParams& params, const device::DeviceFacts& facts,
                                     cudaStream_t stream, BiasGradientKernel kernel) {
  const Shape& shape = params.shape;
  const bool pairs = shape.batch != 0 && shape.heads != 0 && shape.q_len != 0 && shape.kv_len != 0;
  const int64_t bytes = BiasGradientBytes(params);
  if (bytes == 0) return cudaSuccess;
  // Between the diagonals of slots that share a half there is an element that neither writes.
  if (!pairs || params.term == BiasTerm::kDistances) {
    const cudaError_t error = cudaMemsetAsync(params.dbias, 0, static_cast<size_t>(bytes), stream);
    if (error != cudaSuccess || !pairs) return error;
  }
  if (kernel == BiasGradientKernel::kAutomatic && facts.capability == 90 && sm90::TakesBiasGradient(params)) {
    const sm90::BiasGradientGroups groups(params, facts.multiprocessors);
    return sm90::LaunchBiasGradient(params, groups, std::min(groups.count, facts.multiprocessors), stream);
  }
  switch (params.dtype) {
    case DType::kF32:
      return Launch<float>(params, stream);
    case DType::kF16:
      return Launch<device::Float16>(params, stream);
    case DType::kBF16:
      return Launch<device::BFloat16>(params, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorNotSupported;
}

}  // namespace jax_bsk::attention::cuda
