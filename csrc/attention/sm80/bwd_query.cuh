// dQ of the portable backward: a CTA has 64 queries of one head and walks the query-major list.
#pragma once

#include "attention/sm80/bwd_pairs.cuh"
#include "attention/sm80/config.h"
#include "attention/sm80/extras.cuh"
#include "attention/sm80/query_tile.cuh"
#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/copy_async.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm80 {

template <typename Config>
struct QueryShared {
  using Element = typename Config::Element;
  device::Tile<Element, kTile, Config::kDim> query;  // later the staging area of dQ
  device::Tile<Element, kTile, Config::kDim> dout;
  device::Tile<Element, Config::kQueryTileKv, Config::kDim> key;
  device::Tile<Element, Config::kQueryTileKv, Config::kDim> value;
  uint32_t bad_keys[2];  // see device::CleanRows
  int next_tile;         // see ForSelected
  BiasViews views;       // of the step's entry
};

// dS of a thread's pairs from S and dP, in place of the latter. Pairs that do not attend get 0, the others of a `bad`
// key NaN. extras_of(column): PairExtras of the kExtrasN8 columns of eight that begin there.
template <typename Extras, int kN8>
__device__ __forceinline__ void MakeScoreGradients(float (&scores)[1][kN8][4], float (&dscores)[1][kN8][4],
                                                   const RowStatistics (&rows)[2], float gate, const Extras& extras_of,
                                                   const LogitMap& map, bool masked, const uint64_t (&attended)[2],
                                                   uint64_t bad, int t) {
#pragma unroll
  for (int first = 0; first < kN8; first += kExtrasN8) {
    const auto extras = extras_of(8 * first);
#pragma unroll
    for (int n = 0; n < kExtrasN8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        PairGradient(scores[0][first + n][e], dscores[0][first + n][e], rows[e / 2], rows[e / 2].rest,
                     gate * extras.Weight(n, e), map, [&](float x) { return extras.Logit(x, n, e); });
  }
  if (!masked) return;
#pragma unroll
  for (int n = 0; n < kN8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * n + 2 * t + e % 2;
      float& dscore = dscores[0][n][e];
      if (bad >> column & 1) dscore = device::QuietNan();
      if (!(attended[e / 2] >> column & 1)) dscore = 0.f;
    }
}

// A thread's share of dQ: it has its warp's 16 rows, of which rows `row` and row + 8 are its own.
struct QueryThread {
  int thread, t, warp_row, row;
  RowStatistics statistics[2];

  __device__ __forceinline__ explicit QueryThread(int thread)
      : thread(thread), t(thread % 4), warp_row(thread / 32 * 16), row(warp_row + thread % 32 / 4) {}

  template <typename Tile>
  __device__ __forceinline__ void ReadRows(const BackwardParams& params, const Tile& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      statistics[half] = RowStatistics::None();
      if (at < tile.q_rows) statistics[half] = ReadStatistics(params, tile.Statistics(params.shape) + at);
    }
  }
};

// One tile of keys and values: dQ += dS K. Its values are on their way when it begins, and those of `next` when it
// ends.
template <typename Config>
__device__ __forceinline__ void QueryGradientStep(QueryShared<Config>& shared, const BackwardParams& params,
                                                  const QueryTile<typename Config::Element, kTile>& tile,
                                                  const TileLoader<Config::kQueryThreads>& load, const QueryThread& own,
                                                  const LogitMap& map, float gate, const lists::Step& now, bool more,
                                                  const lists::Step& next, float (&dquery)[1][Config::kDim / 8][4]) {
  constexpr int kTileKv = Config::kQueryTileKv;

  // Values are here, and nobody reads the previous keys any more: fetch these keys during dO V^T.
  device::WaitForCopies();
  __syncthreads();
  load.Keys(shared.key, tile, now);
  if (HasBias<Config>(params.bias)) {
    shared.views.WriteBlock(params.bias, params.shape, tile.q_start, now.start, own.thread);
  }
  const bool masked = now.tile >= 0 || now.start + kTileKv > tile.limit.key;
  uint64_t attended[2];
  if (masked) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      attended[half] = AttendedKeys<kTileKv>(params.tiles, params.shape, tile, own.row + 8 * half, now);
    }
  }
  float dscores[1][kTileKv / 8][4];
  device::Clear(dscores);
  device::MultiplyRows(dscores, shared.dout, own.warp_row, shared.value);

  // Keys are here, and nobody reads these values any more: fetch the next values during the rest.
  device::WaitForCopies();
  __syncthreads();
  if (more) load.Values(shared.value, tile, next);
  uint64_t bad = 0;
  if (now.tile >= 0) bad = device::CleanRows<Config::kQueryThreads>(shared.key, shared.bad_keys, own.thread);
  float scores[1][kTileKv / 8][4];
  device::Clear(scores);
  device::MultiplyRows(scores, shared.query, own.warp_row, shared.key);
  const auto make_gradients = [&](const auto& extras_of) {
    MakeScoreGradients(scores, dscores, own.statistics, gate, extras_of, map, masked, attended, bad, own.t);
  };
  if (HasBiasOrDropout<Config>(params)) {
    make_gradients([&](int column) {
      return PairExtras<Config, false>(params, shared.views, map, tile.batch, tile.head, tile.q_start + own.row,
                                       now.start + column + 2 * own.t);
    });
  } else {
    make_gradients([](int) { return NoPairExtras(); });
  }
  device::MultiplyColumns(dquery, dscores, shared.key);
}

// dQ of 64 queries of one head.
template <typename Config>
__device__ __forceinline__ void QueryGradientTile(QueryShared<Config>& shared, const BackwardParams& params,
                                                  const int number) {
  using Element = typename Config::Element;

  // ---- Position
  const QueryTile<Element, kTile> tile(params, number);
  const int thread = static_cast<int>(threadIdx.x);
  QueryThread own(thread);
  const int head_dim = static_cast<int>(params.shape.head_dim), value_dim = static_cast<int>(params.shape.value_dim);
  const TileLoader<Config::kQueryThreads> load(params.shape, thread);

  // ---- Prologue: queries, their gradients and the first values are on their way; the statistics of the thread's rows.
  lists::BlockWalker<Config::kQueryTileKv> walker(params.rows, params.tiles, tile.batch, tile.head,
                                                  tile.q_start / static_cast<int>(params.shape.block_q),
                                                  static_cast<int>(params.shape.block_kv), tile.limit.key);
  lists::Step step;
  bool more = walker.Next(step) && tile.q_rows > 0;
  const bool gated = HasGates<Config>(params.row_gates);
  const auto read_gate = [&] {
    return lists::ReadGate(params.row_gates,
                           lists::GateIndex(params.rows, params.shape.heads, tile.batch, tile.head, walker.position()));
  };
  float next_gate = gated && more ? read_gate() : 1.f;
  if (HasBias<Config>(params.bias)) {
    shared.views.WriteHead(params.bias, params.shape, tile.batch, tile.head, thread);
  }
  if (thread < 2) shared.bad_keys[thread] = 0;
  if (more) {
    const auto* dout =
        static_cast<const Element*>(params.dout) + tile.first_query * tile.out_stride + tile.head * value_dim;
    load.Queries(shared.query, tile);
    device::LoadTileAsync<Config::kQueryThreads>(shared.dout, dout, tile.out_stride, tile.q_rows, value_dim, thread);
    load.Values(shared.value, tile, step);
  }
  own.ReadRows(params, tile);
  const LogitMap map(params.scale, params.soft_cap);
  float dquery[1][Config::kDim / 8][4];
  device::Clear(dquery);

  // ---- Steps: a tile of keys and values each
  while (more) {
    const lists::Step now = step;
    const float gate = next_gate;
    if (HasBias<Config>(params.bias)) {
      shared.views.ReadTile(params.bias, params.bias.row_tiles, walker.position(), thread);
    }
    more = walker.Next(step);
    if (gated && more) next_gate = read_gate();
    QueryGradientStep<Config>(shared, params, tile, load, own, map, gate, now, more, step, dquery);
  }

  // ---- Epilogue
  device::WaitForCopies();
  __syncthreads();
  const TwoRows ends(own.row, tile.q_rows, walker.poisoned(), params.scale);
  auto* dquery_rows =
      static_cast<Element*>(params.dquery) + tile.first_query * tile.query_stride + tile.head * head_dim;
  device::StoreRows(dquery[0], ends.finish, shared.query, own.warp_row, dquery_rows, tile.query_stride,
                    static_cast<int>(params.shape.q_len) - tile.q_start, head_dim);
}

}  // namespace jax_bsk::attention::cuda::sm80
