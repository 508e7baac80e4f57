// Backward attention over block lists, sm_80 and newer, in two kernels without atomics, so that results are bit-equal
// from run to run: dQ walks the query-major list, dK and dV walk the key-major one. With x = scale q.k and
//   P = exp(cap(x) - lse),  dP = dO V^T,  dS = P (gate dP - delta) cap'(x):
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = gate P^T dO,  dgate = the sum of P o dP.
#pragma once

#include "attention/sm80/config.h"
#include "device/block_list.cuh"
#include "device/mma.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm80 {

// From x = q.k and dP of one pair to P and dS, in place; `rest` is the row's. A gate of 1 changes no bit.
template <typename Map>
__device__ __forceinline__ void PairGradient(float& product, float& dprob, const device::RowStatistics& row, float rest,
                                             float gate, const Map& map) {
  float slope = 1.f;
  if (!map.plain) {
    product = map(product);
    slope = map.Slope(product);
  }
  product = device::Probability(fmaf(product, map.multiplier, -row.lse), rest);
  dprob = product * fmaf(gate, dprob, -row.delta) * slope;
}

template <typename Config>
struct QueryShared {
  using Element = typename Config::Element;
  device::Tile<Element, kTile, Config::kDim> query;  // later the staging area of dQ
  device::Tile<Element, kTile, Config::kDim> dout;
  device::Tile<Element, Config::kQueryTileKv, Config::kDim> key;
  device::Tile<Element, Config::kQueryTileKv, Config::kDim> value;
  uint32_t bad_keys[2];  // see device::CleanRows
  int next_tile;         // see ForSelected
};

// dQ of 64 queries of one head.
template <typename Config>
__device__ __forceinline__ void QueryGradientTile(QueryShared<Config>& shared, const BackwardParams& params,
                                                  const int tile) {
  using Element = typename Config::Element;
  constexpr int kThreads = Config::kQueryThreads, kDim = Config::kDim, kTileKv = Config::kQueryTileKv;

  // Which tile.
  const Shape& shape = params.shape;
  const int q_len = static_cast<int>(shape.q_len), heads = static_cast<int>(shape.heads);
  const int block_q = static_cast<int>(shape.block_q), block_kv = static_cast<int>(shape.block_kv);
  const int q_tiles = (q_len + kTile - 1) / kTile;
  const int q_start = static_cast<int>(tile % q_tiles) * kTile;
  const int head = static_cast<int>(tile / q_tiles) % heads;
  const int batch = static_cast<int>(tile / q_tiles) / heads;
  const int kv_heads = static_cast<int>(shape.kv_heads), kv_head = head / (heads / kv_heads);
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int warp_row = thread / 32 * 16;
  const auto limit = device::ReadLengths(params.lengths, batch, q_len, static_cast<int>(shape.kv_len));
  const int q_rows = max(0, min(limit.query - q_start, kTile));

  const int query_stride = heads * head_dim, key_stride = kv_heads * head_dim;  // refused beyond 2^31
  const int value_stride = kv_heads * value_dim, dout_stride = heads * value_dim;
  const int64_t first_query = batch * shape.q_len + q_start, first_key = batch * shape.kv_len;
  const auto* query = static_cast<const Element*>(params.query) + first_query * query_stride + head * head_dim;
  const auto* dout = static_cast<const Element*>(params.dout) + first_query * dout_stride + head * value_dim;
  const auto* keys = static_cast<const Element*>(params.key) + first_key * key_stride + kv_head * head_dim;
  const auto* values = static_cast<const Element*>(params.value) + first_key * value_stride + kv_head * value_dim;

  // Prologue: queries, their gradients and the first values are on their way; statistics of this thread's two rows.
  device::BlockWalker<kTileKv> walker(params.rows, params.tiles, batch, head, q_start / block_q, block_kv, limit.key);
  device::Step step;
  bool more = walker.Next(step) && q_rows > 0;
  const auto read_gate = [&] {
    return device::ReadGate(params.row_gates,
                            device::GateIndex(params.rows, shape.heads, batch, head, walker.position()));
  };
  float next_gate = Config::kGated && more ? read_gate() : 1.f;
  if (thread < 2) shared.bad_keys[thread] = 0;
  if (more) {
    device::LoadTileAsync<kThreads>(shared.query, query, query_stride, q_rows, head_dim, thread);
    device::LoadTileAsync<kThreads>(shared.dout, dout, dout_stride, q_rows, value_dim, thread);
    device::LoadTileAsync<kThreads>(shared.value, values + int64_t{step.start} * value_stride, value_stride,
                                    limit.key - step.start, value_dim, thread);
  }
  const int64_t statistics = (int64_t{batch} * heads + head) * shape.q_len + q_start;
  device::RowStatistics rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + 8 * half + g;
    rows[half] = device::RowStatistics::None();
    if (row < q_rows) {
      rows[half] = device::RowStatistics::Of(__ldg(static_cast<const float*>(params.lse) + statistics + row),
                                             __ldg(static_cast<const float*>(params.lse_rest) + statistics + row),
                                             __ldg(static_cast<const float*>(params.delta) + statistics + row));
    }
  }
  const device::LogitMap map(params.scale, params.soft_cap);
  float dquery[1][kDim / 8][4];
  device::Clear(dquery);

  while (more) {
    const device::Step now = step;
    const float gate = next_gate;
    more = walker.Next(step);
    if (Config::kGated && more) next_gate = read_gate();

    // Values are here, and nobody reads the previous keys any more: fetch these keys during dO V^T.
    device::WaitForCopies();
    __syncthreads();
    device::LoadTileAsync<kThreads>(shared.key, keys + int64_t{now.start} * key_stride, key_stride,
                                    limit.key - now.start, head_dim, thread);
    const bool masked = now.tile >= 0 || now.start + kTileKv > limit.key;
    uint64_t attended[2];
    if (masked) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        attended[half] = device::FirstBits(limit.key - now.start);
        if (now.tile >= 0) {
          const int row = q_start % block_q + warp_row + 8 * half + g;
          const uint32_t* words =
              device::BitTileRow(params.tiles, batch, head, now.tile, row, block_q, block_kv) + now.offset / 32;
          attended[half] &= device::RowBits<kTileKv>(words);
        }
      }
    }
    float dscores[1][kTileKv / 8][4];
    device::Clear(dscores);
    device::MultiplyRows(dscores, shared.dout, warp_row, shared.value);

    // Keys are here, and nobody reads these values any more: fetch the next values during the rest.
    device::WaitForCopies();
    __syncthreads();
    if (more) {
      device::LoadTileAsync<kThreads>(shared.value, values + int64_t{step.start} * value_stride, value_stride,
                                      limit.key - step.start, value_dim, thread);
    }
    uint64_t bad = 0;
    if (now.tile >= 0) bad = device::CleanRows<kThreads>(shared.key, shared.bad_keys, thread);
    float scores[1][kTileKv / 8][4];
    device::Clear(scores);
    device::MultiplyRows(scores, shared.query, warp_row, shared.key);

#pragma unroll
    for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        PairGradient(scores[0][n][e], dscores[0][n][e], rows[e / 2], rows[e / 2].rest, gate, map);
    if (masked) {
#pragma unroll
      for (int n = 0; n < kTileKv / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 8 * n + 2 * t + e % 2;
          float& dscore = dscores[0][n][e];
          if (bad >> column & 1) dscore = device::QuietNan();
          if (!(attended[e / 2] >> column & 1)) dscore = 0.f;
        }
    }
    device::MultiplyColumns(dquery, dscores, shared.key);
  }

  // Epilogue.
  device::WaitForCopies();
  __syncthreads();
  device::RowFinish finish[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool valid = warp_row + 8 * half + g < q_rows;
    finish[half] = {valid && !walker.poisoned(), params.scale, valid ? device::QuietNan() : 0.f};
  }
  auto* dquery_rows = static_cast<Element*>(params.dquery) + first_query * query_stride + head * head_dim;
  device::StoreRows(dquery[0], finish, shared.query, warp_row, dquery_rows, query_stride, q_len - q_start, head_dim);
}

template <typename Config>
struct KeyShared {
  using Element = typename Config::Element;
  device::Tile<Element, kTile, Config::kDim> key;    // later the staging area of dK
  device::Tile<Element, kTile, Config::kDim> value;  // later the staging area of dV
  device::Tile<Element, Config::kKeyTileQ, Config::kDim> query;
  device::Tile<Element, Config::kKeyTileQ, Config::kDim> dout;
  device::RowStatistics rows[Config::kKeyTileQ];  // of the queries
  uint32_t attended[Config::kKeyTileQ][2];        // [query][key / 32], with a bit tile or gates
  uint32_t bad_queries[2];                        // see device::CleanRows
  uint32_t bad_douts[2];
  // For want of registers: the place of the current step's gate; each thread's P o dP, of the 64 x 64 pairs that the
  // step is part of.
  int gate;
  float gate_sums[Config::kGated ? Config::kKeyThreads : 1];
  int next_tile;  // see ForSelected
};

// The steps of every query head of a group, one head after the other.
template <int kTileQ>
class GroupWalker {
 public:
  __device__ GroupWalker(const BackwardParams& params, int batch, int first_head, int last_head, int kv_block,
                         int limit)
      : batch_(batch),
        head_(first_head),
        last_head_(last_head),
        kv_block_(kv_block),
        walker_(params.cols, params.tiles, batch, first_head, kv_block, static_cast<int>(params.shape.block_q), limit) {
  }

  // False after the last head's row, or when a row is poisoned.
  __device__ bool Next(device::Step& step, int& head) {
    while (!walker_.Next(step)) {
      if (walker_.poisoned() || head_ == last_head_) return false;
      ++head_;
      walker_.Restart(batch_, head_, kv_block_);
    }
    head = head_;
    return true;
  }
  __device__ bool poisoned() const { return walker_.poisoned(); }
  __device__ int64_t position() const { return walker_.position(); }

 private:
  int batch_, head_, last_head_, kv_block_;
  device::BlockWalker<kTileQ> walker_;
};

// The first of four words, one a warp, for 64 x 64 pairs of a visited block: see attention/gates.h.
__device__ __forceinline__ int64_t GateSumPlace(const Shape& shape, int gate, int kv_start, int q_offset) {
  const int q_pieces = static_cast<int>(shape.block_q) / 64, kv_pieces = static_cast<int>(shape.block_kv) / 64;
  return 4 * ((int64_t{gate} * kv_pieces + kv_start / 64 % kv_pieces) * q_pieces + q_offset / 64);
}

// NaN for the gates of every block that visits these keys, as their dK and dV are: the steps ended before their time.
template <int kThreads>
__device__ __forceinline__ void SpoilGateSums(const BackwardParams& params, float* gate_sums, int batch, int kv_head,
                                              int kv_start, int thread) {
  const Shape& shape = params.shape;
  const int group = static_cast<int>(shape.heads / shape.kv_heads);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const device::ListRow row = device::FindRow(params.cols, batch, head, kv_start / static_cast<int>(shape.block_kv));
    for (int entry = thread; entry < row.length; entry += kThreads) {
      const int gate = device::GateIndex(params.cols, shape.heads, batch, head, row.begin + entry);
      gate_sums[GateSumPlace(shape, gate, kv_start, 0)] = device::QuietNan();
    }
  }
}

// dK and dV of 64 keys of one key/value head; the query heads of the group are visited in turn. Scores are transposed
// here: rows are keys, columns queries.
template <typename Config>
__device__ __forceinline__ void KeyGradientTile(KeyShared<Config>& shared, const BackwardParams& params,
                                                float* gate_sums, const int tile) {
  using Element = typename Config::Element;
  constexpr int kThreads = Config::kKeyThreads, kTileQ = Config::kKeyTileQ, kDim = Config::kDim;

  // Which tile, and what this warp makes of it.
  const Shape& shape = params.shape;
  const int kv_len = static_cast<int>(shape.kv_len), kv_heads = static_cast<int>(shape.kv_heads);
  const int block_q = static_cast<int>(shape.block_q), block_kv = static_cast<int>(shape.block_kv);
  const int kv_tiles = (kv_len + kTile - 1) / kTile;
  const int kv_start = static_cast<int>(tile % kv_tiles) * kTile;
  const int kv_head = static_cast<int>(tile / kv_tiles) % kv_heads;
  const int batch = static_cast<int>(tile / kv_tiles) / kv_heads;
  const int heads = static_cast<int>(shape.heads), group = heads / kv_heads;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int warp = thread / 32 % 4, warp_row = warp * 16;
  const bool makes_dvalue = !Config::kSplit || thread < 128, makes_dkey = !Config::kSplit || thread >= 128;
  const auto limit = device::ReadLengths(params.lengths, batch, static_cast<int>(shape.q_len), kv_len);
  const int kv_rows = max(0, min(limit.key - kv_start, kTile));

  const int query_stride = heads * head_dim, key_stride = kv_heads * head_dim;  // refused beyond 2^31
  const int value_stride = kv_heads * value_dim, dout_stride = heads * value_dim;
  const int64_t first_query = batch * shape.q_len, first_key = batch * shape.kv_len + kv_start;
  const int64_t key_offset = first_key * key_stride + kv_head * head_dim;
  const int64_t value_offset = first_key * value_stride + kv_head * value_dim;
  const auto load_query = [&](const device::Step& step, int head) {
    device::LoadTileAsync<kThreads>(
        shared.query,
        static_cast<const Element*>(params.query) + (first_query + step.start) * query_stride + head * head_dim,
        query_stride, limit.query - step.start, head_dim, thread);
  };
  const auto load_dout = [&](const device::Step& step, int head) {
    device::LoadTileAsync<kThreads>(
        shared.dout,
        static_cast<const Element*>(params.dout) + (first_query + step.start) * dout_stride + head * value_dim,
        dout_stride, limit.query - step.start, value_dim, thread);
  };

  // Prologue: keys, values and the first output gradients are on their way.
  GroupWalker<kTileQ> walker(params, batch, kv_head * group, kv_head * group + group - 1, kv_start / block_kv,
                             limit.query);
  device::Step step;
  int head = 0;
  bool more = walker.Next(step, head) && kv_rows > 0;
  const auto gate_index = [&] { return device::GateIndex(params.cols, shape.heads, batch, head, walker.position()); };
  if constexpr (Config::kGated) shared.gate_sums[thread] = 0.f;
  if (thread < 2) shared.bad_queries[thread] = shared.bad_douts[thread] = 0;
  if (more) {
    device::LoadTileAsync<kThreads>(shared.key, static_cast<const Element*>(params.key) + key_offset, key_stride,
                                    kv_rows, head_dim, thread);
    device::LoadTileAsync<kThreads>(shared.value, static_cast<const Element*>(params.value) + value_offset,
                                    value_stride, kv_rows, value_dim, thread);
    load_dout(step, head);
  }
  const device::LogitMap map(params.scale, params.soft_cap);
  constexpr int kAccumulators = Config::kSplit ? 1 : 2;
  float gradients[kAccumulators][1][kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) device::Clear(gradients[i]);
  auto& dvalue = gradients[0];
  auto& dkey = gradients[kAccumulators - 1];

  while (more) {
    const device::Step now = step;
    const int now_head = head;
    if (Config::kGated && thread == 0) shared.gate = gate_index();
    more = walker.Next(step, head);

    // Output gradients are here, and nobody reads anything else of the previous step any more: fetch the queries,
    // their statistics and their masks during V dO^T.
    device::WaitForCopies();
    __syncthreads();
    load_query(now, now_head);
    device::RowStatistics row = device::RowStatistics::None();
    uint32_t word = Config::kGated ? ~0u : 0;
    if (thread < kTileQ && now.start + thread < limit.query) {
      const int64_t index = (int64_t{batch} * heads + now_head) * shape.q_len + now.start + thread;
      row = device::RowStatistics::Of(__ldg(static_cast<const float*>(params.lse) + index),
                                      __ldg(static_cast<const float*>(params.lse_rest) + index),
                                      __ldg(static_cast<const float*>(params.delta) + index));
    }
    if (now.tile >= 0 && thread < 2 * kTileQ) {
      word = __ldg(
          device::BitTileRow(params.tiles, batch, now_head, now.tile, now.offset + thread / 2, block_q, block_kv) +
          kv_start % block_kv / 32 + thread % 2);
    }
    // Queries past the length may have any logits; keys past it have rows of their own in the products, but not in the
    // gate's sum.
    if (now.start + thread / 2 >= limit.query) word = 0;
    if (Config::kGated) word &= static_cast<uint32_t>(device::FirstBits(kv_rows - 32 * (thread % 2)));
    uint64_t bad = 0;
    if (now.tile >= 0) bad = device::CleanRows<kThreads>(shared.dout, shared.bad_douts, thread);
    float dscores[1][kTileQ / 8][4];
    device::Clear(dscores);
    if (makes_dkey) device::MultiplyRows(dscores, shared.value, warp_row, shared.dout);
    if (thread < kTileQ) shared.rows[thread] = row;
    if (thread < 2 * kTileQ) shared.attended[thread / 2][thread % 2] = word;

    // Queries are here.
    device::WaitForCopies();
    __syncthreads();
    if (now.tile >= 0) bad |= device::CleanRows<kThreads>(shared.query, shared.bad_queries, thread);
    float scores[1][kTileQ / 8][4];
    device::Clear(scores);
    device::MultiplyRows(scores, shared.key, warp_row, shared.query);

    // Read anew for each pair: kept for the two that need it, it would spill.
    const auto rest_of = [&](int query) { return *static_cast<const volatile float*>(&shared.rows[query].rest); };
    if constexpr (Config::kGated) {
      const float gate = device::ReadGate(params.col_gates, shared.gate);  // not earlier, for want of registers
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kTileQ / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float &prob = scores[0][n][e], &dscore = dscores[0][n][e], dprob = dscore;
          PairGradient(prob, dscore, shared.rows[8 * n + 2 * t + e % 2], rest_of(8 * n + 2 * t + e % 2), gate, map);
          const int column = 8 * n + 2 * t + e % 2, bit = (warp_row + 8 * (e / 2) + g) % 32;
          if (bad >> column & 1) prob = dscore = dprob = device::QuietNan();
          if (!(shared.attended[column][warp_row / 32] >> bit & 1)) prob = dscore = dprob = 0.f;
          sum = fmaf(prob, dprob, sum);
          if (prob != 0.f) prob *= gate;
        }
      sum += shared.gate_sums[thread];
      if (makes_dkey && (!more || step.start != now.start + kTileQ || step.start % 64 == 0)) {
        sum = device::WarpSum(sum);
        if (lane == 0) gate_sums[GateSumPlace(shape, shared.gate, kv_start, now.offset) + warp] = sum;
        sum = 0.f;
      }
      shared.gate_sums[thread] = sum;
    } else {
#pragma unroll
      for (int n = 0; n < kTileQ / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          PairGradient(scores[0][n][e], dscores[0][n][e], shared.rows[8 * n + 2 * t + e % 2],
                       rest_of(8 * n + 2 * t + e % 2), 1.f, map);
      if (now.tile >= 0) {
#pragma unroll
        for (int n = 0; n < kTileQ / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = 8 * n + 2 * t + e % 2, bit = (warp_row + 8 * (e / 2) + g) % 32;
            if (bad >> column & 1) scores[0][n][e] = dscores[0][n][e] = device::QuietNan();
            if (!(shared.attended[column][warp_row / 32] >> bit & 1)) scores[0][n][e] = dscores[0][n][e] = 0.f;
          }
      }
    }
    if (makes_dvalue) device::MultiplyColumns(dvalue, scores, shared.dout);

    // Nobody reads these output gradients any more: fetch the next during dS^T Q.
    __syncthreads();
    if (more) load_dout(step, head);
    if (makes_dkey) device::MultiplyColumns(dkey, dscores, shared.query);
  }

  // Epilogue. Keys at and past the length get 0.
  device::WaitForCopies();
  __syncthreads();
  if constexpr (Config::kGated) {
    if (walker.poisoned() && kv_rows > 0) SpoilGateSums<kThreads>(params, gate_sums, batch, kv_head, kv_start, thread);
  }
  const auto finish_rows = [&](device::RowFinish(&finish)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = warp_row + 8 * half + g < kv_rows;
      finish[half] = {valid && !walker.poisoned(), scale, valid ? device::QuietNan() : 0.f};
    }
  };
  device::RowFinish finish[2];
  if (makes_dvalue) {
    finish_rows(finish, 1.f);
    device::StoreRows(dvalue[0], finish, shared.value, warp_row, static_cast<Element*>(params.dvalue) + value_offset,
                      value_stride, kv_len - kv_start, value_dim);
  }
  if (makes_dkey) {
    finish_rows(finish, params.scale);
    device::StoreRows(dkey[0], finish, shared.key, warp_row, static_cast<Element*>(params.dkey) + key_offset,
                      key_stride, kv_len - kv_start, head_dim);
  }
}

// The tiles of a launch: all of them, one a CTA; or those of a list of marks, of which each CTA looks at `span`.
struct Selection {
  const int32_t* marks;  // null: all; else [tiles], not 0 = to be done
  int tiles;
  int span;  // 1 without marks
};

// Calls work(tile) for the selected tiles of this CTA. `next` is a word of shared memory: the loop's state, which would
// cost the work registers that it does not have.
template <typename Work>
__device__ __forceinline__ void ForSelected(const Selection& selection, int threads, int& next, Work work) {
#if __CUDA_ARCH__ < 900
  work(static_cast<int>(blockIdx.x));  // only Hopper's kernels mark tiles, and the loop would spill here
#else
  const int first = static_cast<int>(blockIdx.x) * selection.span;
  if (selection.marks != nullptr) {
    const int last = min(first + selection.span, selection.tiles);
    bool any = false;
    for (int tile = first + static_cast<int>(threadIdx.x); tile < last; tile += threads) {
      any |= selection.marks[tile] != 0;
    }
    if (!__syncthreads_or(any)) return;
  }
  if (device::ThreadHere() == 0) next = first - 1;
  while (true) {
    if (device::ThreadHere() == 0) {
      const int end = min(static_cast<int>(blockIdx.x + 1) * selection.span, selection.tiles);
      do ++next;
      while (next < end && selection.marks != nullptr && selection.marks[next] == 0);
      if (next == end) next = -1;
    }
    __syncthreads();
    const int tile = next;
    if (tile < 0) return;
    work(tile);
    __syncthreads();
  }
#endif
}

template <typename Config>
__global__ void __launch_bounds__(Config::kQueryThreads, 2)
    QueryGradientKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ Selection selection) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<QueryShared<Config>*>(shared_bytes);
  ForSelected(selection, Config::kQueryThreads, shared.next_tile,
              [&](int tile) { QueryGradientTile<Config>(shared, params, tile); });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kKeyThreads, 256 / Config::kKeyThreads)
    KeyGradientKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ Selection selection,
                      float* gate_sums) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<KeyShared<Config>*>(shared_bytes);
  ForSelected(selection, Config::kKeyThreads, shared.next_tile,
              [&](int tile) { KeyGradientTile<Config>(shared, params, gate_sums, tile); });
}

template <typename Config>
cudaError_t LaunchBackward(const BackwardParams& params, const BackwardMarks& marks, float* gate_sums,
                           cudaStream_t stream) {
  constexpr int kQueryBytes = static_cast<int>(sizeof(QueryShared<Config>));
  constexpr int kKeyBytes = static_cast<int>(sizeof(KeyShared<Config>));
  static_assert(kQueryBytes <= BackwardSharedBytes<Config>() && kKeyBytes <= BackwardSharedBytes<Config>());
  const Shape& shape = params.shape;
  const auto launch = [&](auto kernel, int threads, int bytes, int64_t length, int64_t heads, const int32_t* marked,
                          auto... more) -> cudaError_t {
    const int tiles = static_cast<int>((length + kTile - 1) / kTile * heads * shape.batch);
    if (tiles == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const int span = marked == nullptr ? 1 : (tiles + marks.ctas - 1) / marks.ctas;
    kernel<<<(tiles + span - 1) / span, threads, bytes, stream>>>(params, Selection{marked, tiles, span}, more...);
    return cudaGetLastError();
  };
  const cudaError_t error =
      launch(QueryGradientKernel<Config>, Config::kQueryThreads, kQueryBytes, shape.q_len, shape.heads, marks.queries);
  if (error != cudaSuccess) return error;
  return launch(KeyGradientKernel<Config>, Config::kKeyThreads, kKeyBytes, shape.kv_len, shape.kv_heads, marks.keys,
                gate_sums);
}

}  // namespace jax_bsk::attention::cuda::sm80
