// Sequences, their tiles of rows, and the steps of keys that each visits: integer arithmetic that the forward and the
// merge share. What comes from device memory is checked here.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "lists/block_list.cuh"

namespace jax_bsk::decode::cuda {

constexpr int kStepKeys = static_cast<int>(kStep);

struct Sequence {
  int table;   // its number among the sequences of all groups
  int first;   // token, counted in its group
  int q_len;   // 0 for none; -1: its offsets cannot be true
  int kv_len;  // -1: it cannot be true, and queries give NaN

  // Sequence `number` of a group.
  template <typename Config>
  __device__ __forceinline__ static Sequence Read(const KernelParams& params, int group, int number) {
    if constexpr (Config::kListed) {
      const auto limit = lists::ReadLengths(params.lengths, group, params.tokens, params.by_page_size.value());
      return {group, 0, limit.query, ListOf(params, group).length < 0 ? -1 : limit.key};
    } else {
      return Sequence(params, group, number);
    }
  }
  __device__ __forceinline__ static lists::ListRow ListOf(const KernelParams& params, int group) {
    return lists::FindRow(params.rows, group, 0, 0);
  }

 private:
  __device__ __forceinline__ Sequence(int table, int first, int q_len, int kv_len)
      : table(table), first(first), q_len(q_len), kv_len(kv_len) {}
  __device__ __forceinline__ Sequence(const KernelParams& params, int group, int number) {
    const int32_t* offsets = params.cu_q_lens + group * (params.seqs + 1) + number;
    table = group * params.seqs + number;
    const int end = __ldg(offsets + 1);
    first = __ldg(offsets);
    // The difference of numbers that cannot be true may not be one of 32 bits.
    q_len = first < 0 || end < first || end > params.tokens ? -1 : end - first;
    kv_len = __ldg(params.kv_lens + table);
    if (kv_len < 0 || kv_len > params.max_pages * params.by_page_size.value()) kv_len = -1;
  }

 public:
  __device__ __forceinline__ bool HasTree(const KernelParams& params) const {
    return params.tree != nullptr && q_len <= 64;
  }
};

// How a sequence's rows, query * group_heads + head, are cut into tiles: one of 16, or some of 64.
struct RowTiles {
  int rows;  // of the sequence and one key/value head
  bool narrow;
  bool is_short;  // as partials.h says

  template <typename Config>
  __device__ __forceinline__ static RowTiles Of(const KernelParams& params, const Sequence& sequence) {
    const int rows = sequence.q_len * params.group_heads;
    const bool narrow = rows <= Config::kNarrowRows;
    return {rows, narrow, narrow || sequence.q_len == 1 || Config::kListed};
  }
  template <typename Config>
  __device__ __forceinline__ int Count() const {
    return narrow ? 1 : (rows + Config::kWideRows - 1) / Config::kWideRows;
  }
  template <typename Config>
  __device__ __forceinline__ int Height() const {
    return narrow ? Config::kNarrowRows : Config::kWideRows;
  }
};

// The steps that a tile's queries visit between them: the first `sinks` of the sequence, then those from `first` on.
struct Steps {
  int sinks;
  int first;
  int count;

  Steps() = default;
  // Of the queries first_query .. last_query of the sequence.
  template <typename Config>
  __device__ __forceinline__ static Steps Of(const KernelParams& params, const Sequence& sequence, int first_query,
                                             int last_query) {
    if constexpr (Config::kListed) {
      return Steps(0, 0, max(Sequence::ListOf(params, sequence.table).length, 0) * params.block_steps);
    } else {
      return Steps(params, sequence, first_query, last_query);
    }
  }

  // The number of a visited step among the sequence's.
  __device__ __forceinline__ int operator[](int i) const { return i < sinks ? i : i - sinks + first; }

 private:
  __device__ __forceinline__ Steps(int sinks, int first, int count) : sinks(sinks), first(first), count(count) {}
  __device__ __forceinline__ Steps(const KernelParams& params, const Sequence& sequence, int first_query,
                                   int last_query) {
    sinks = 0, first = 0;
    if (params.selection != nullptr) {
      count = (params.selected * params.by_page_size.value() + kStepKeys - 1) / kStepKeys;
      return;
    }
    const int start = sequence.kv_len - sequence.q_len;
    int end = sequence.kv_len;
    if (params.causal && !sequence.HasTree(params)) end = min(end, start + last_query + 1);
    if (params.window > 0) {
      const int64_t begin = start + first_query - params.window + 1;
      first = begin > 0 ? static_cast<int>(begin) / kStepKeys : 0;
      sinks = (min(static_cast<int>(params.sink_tokens), max(end, 0)) + kStepKeys - 1) / kStepKeys;
      if (sinks >= first) sinks = first = 0;
    }
    const int last = (max(end, 0) + kStepKeys - 1) / kStepKeys;
    count = sinks + max(last - first, 0);
  }
};

// Steps of any tile of the sequence at most, by which units are numbered.
template <typename Config>
__device__ __forceinline__ int MostStepsOf(const KernelParams& params, const Sequence& sequence,
                                           const RowTiles& tiles) {
  const int count = Steps::Of<Config>(params, sequence, 0, sequence.q_len - 1).count;
  const bool bounded = params.window > 0 && params.causal && !sequence.HasTree(params);  // a tile's keys, by the window
  if (Config::kListed || !bounded || params.selection != nullptr) return count;
  const int64_t keys = params.window + params.by_group_heads.Ceiling(tiles.Height<Config>());
  const int64_t sinks = (params.sink_tokens + kStepKeys - 1) / kStepKeys;
  return static_cast<int>(min(int64_t{count}, sinks + keys / kStepKeys + 2));
}

// Into which parts a tile's steps are cut.
struct Parts {
  int steps;  // of each but the last
  int count;

  template <typename Config>
  __device__ __forceinline__ static Parts Of(const KernelParams& params, const RowTiles& tiles, int steps) {
    if constexpr (Config::kListed) {
      // There is room for so many: their length follows from the list's, whose capacity may be any.
      const int length = max((steps + params.short_parts - 1) / params.short_parts, 1);
      return {length, (steps + length - 1) / length};
    } else {
      const device::Divisor& part = tiles.is_short ? params.by_short_part : params.by_long_part;
      return {part.value(), part.Ceiling(steps)};
    }
  }
};

}  // namespace jax_bsk::decode::cuda
