// Rows that share a block with a value that is not finite, but may not attend to it: a masked pair has probability 0,
// and 0 * NaN is NaN in a matrix product. Tiles with such outputs are noted when they are stored, and put right when
// the CTA has nothing else to do and all its registers for it: pair by pair, from the log-sum-exp, which is right
// already.
#pragma once

#include "attention/dropout.h"
#include "attention/params.h"
#include "attention/sm90/bias.cuh"
#include "attention/sm90/fwd_shared.cuh"
#include "attention/softmax.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/thread.cuh"
#include "device/tile.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// q.k of two rows of `dim` elements, a multiple of eight.
template <typename Element>
__device__ __forceinline__ float DotRows(const Element* a, const Element* b, int dim) {
  float sum = 0.f;
#pragma unroll 1
  for (int i = 0; i < dim; i += 8) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(a + i)), y = __ldg(reinterpret_cast<const uint4*>(b + i));
    const auto *p = reinterpret_cast<const Element*>(&x), *q = reinterpret_cast<const Element*>(&y);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = fmaf(device::ToFloat(p[e]), device::ToFloat(q[e]), sum);
  }
  return sum;
}

// Columns 64 c + 2 lane and the next of out[c], for query `row` of the tile: the sum over attended keys of
// e^(logit - lse) * value.
template <typename Config>
__device__ __forceinline__ void ExactRow(const ForwardParams& params, const TileHeader& tile, int row,
                                         const ForwardPlan& plan, const RowStatistics& statistics,
                                         float (&out)[Config::kChunks][2]) {
  using Element = typename Config::Element;
  const Shape& shape = params.shape;
  const int lane = device::ThreadHere() % 32, position = tile.q_start + row;
  const int block_q = static_cast<int>(shape.block_q), block_kv = static_cast<int>(shape.block_kv);
  const int value_dim = static_cast<int>(shape.value_dim);
  const auto* query = static_cast<const Element*>(params.query) +
                      ((tile.batch * shape.q_len + position) * shape.heads + tile.head) * shape.head_dim;
  const auto* keys = static_cast<const Element*>(params.key) +
                     (tile.batch * shape.kv_len * shape.kv_heads + tile.kv_head) * shape.head_dim;
  const auto* values = static_cast<const Element*>(params.value) +
                       (tile.batch * shape.kv_len * shape.kv_heads + tile.kv_head) * shape.value_dim;
#pragma unroll
  for (int c = 0; c < Config::kChunks; ++c) out[c][0] = out[c][1] = 0.f;

  const LogitMap& map = plan.logits;
  const int limit = tile.key_limit;
  lists::BlockWalker<32> walker(params.rows, params.tiles, tile.batch, tile.head, position / block_q, block_kv, limit);
  lists::Step step;
#pragma unroll 1
  while (walker.Next(step)) {
    // A key a lane.
    const int key = step.start + lane;
    bool attends = key < limit;
    if (attends && step.tile >= 0) {
      const uint32_t* words =
          lists::BitTileRow(params.tiles, tile.batch, tile.head, step.tile, position % block_q, block_q, block_kv);
      attends = __ldg(words + step.offset / 32) >> lane & 1;
    }
    float prob = 0.f;
    if (attends) {
      float x = DotRows(query, keys + key * shape.kv_heads * shape.head_dim, static_cast<int>(shape.head_dim));
      if constexpr (!Config::kPlain) x = map(x);
      if constexpr (Config::kExtras) {
        if (HasBias(params.bias)) {
          const int number = ReadBiasTile(params.bias, params.bias.row_tiles, walker.position());
          AddBiasOfPair<Element>(x, plan.bias_factor, params.bias, shape, tile.batch, tile.head, number, position, key);
        }
      }
      prob = Probability(fmaf(x, map.multiplier, -statistics.lse), statistics.rest);
      if constexpr (Config::kGated) {
        prob *= lists::ReadGate(params.gates,
                                lists::GateIndex(params.rows, shape.heads, tile.batch, tile.head, walker.position()));
      }
      if constexpr (Config::kExtras) {
        if (Drops(params.dropout)) {
          const uint32_t head_key = __ldg(params.dropout.keys + tile.batch * shape.heads + tile.head);
          const uint32_t word = DropoutWord(DropoutQueryWord(head_key, position), DropoutKeyWord(key));
          const bool dropped = IsDropped(word, DropoutByte(position, key), params.dropout.threshold);
          prob = dropped ? 0.f : prob * plan.kept_scale;
        }
      }
    }
    // A pair of columns a lane.
    bool finite = false;
#pragma unroll 1
    for (uint32_t left = __ballot_sync(0xFFFFFFFFu, attends); left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const float p = __shfl_sync(0xFFFFFFFFu, prob, source);
      const Element* value = values + (step.start + source) * shape.kv_heads * shape.value_dim;
      finite = false;
#pragma unroll
      for (int c = 0; c < Config::kChunks; ++c) {
        const int column = c * kChunk + 2 * lane;
        if (column >= value_dim) continue;
        out[c][0] = fmaf(p, device::ToFloat(value[column]), out[c][0]);
        out[c][1] = fmaf(p, device::ToFloat(value[column + 1]), out[c][1]);
        finite |= out[c][0] - out[c][0] == 0.f || out[c][1] - out[c][1] == 0.f;
      }
      if (!__any_sync(0xFFFFFFFFu, finite)) return;  // nothing can change any more
    }
  }
}

// Rows first_row .. first_row + 15 of a tile, by one warp.
template <typename Config>
__device__ __forceinline__ void FixRows(const ForwardParams& params, const ForwardPlan& plan, int tile_number,
                                        int first_row) {
  using Element = typename Config::Element;
  const Shape& shape = params.shape;
  TileHeader tile = PositionOf<Config>(tile_number, plan);
  const auto limit =
      lists::ReadLengths(params.lengths, tile.batch, static_cast<int>(shape.q_len), static_cast<int>(shape.kv_len));
  SetLimits<Config>(tile, shape, limit.query, limit.key);
  const int lane = device::ThreadHere() % 32, value_dim = static_cast<int>(shape.value_dim);
#pragma unroll 1
  for (int row = first_row; row < min(first_row + 16, tile.q_rows); ++row) {
    const int64_t position = tile.batch * shape.q_len + tile.q_start + row;
    auto* out = static_cast<Element*>(params.out) + (position * shape.heads + tile.head) * value_dim;
    const int64_t at = (tile.batch * shape.heads + tile.head) * shape.q_len + tile.q_start + row;
    const float lse = static_cast<const float*>(params.lse)[at];
    bool finite = true;
    for (int column = lane; column < value_dim; column += 32) {
      const float x = device::ToFloat(out[column]);
      finite &= x - x == 0.f;
    }
    // Where lse is NaN so is every output.
    if (__all_sync(0xFFFFFFFFu, finite) || lse - lse != 0.f) continue;
    float exact[Config::kChunks][2];
    const auto statistics = RowStatistics::Of(lse, static_cast<const float*>(params.lse_rest)[at], 0.f);
    ExactRow<Config>(params, tile, row, plan, statistics, exact);
#pragma unroll
    for (int c = 0; c < Config::kChunks; ++c) {
      const int column = c * kChunk + 2 * lane;
      if (column >= value_dim) continue;
      *reinterpret_cast<uint32_t*>(out + column) = device::PackPair<Element>(exact[c][0], exact[c][1]);
    }
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
