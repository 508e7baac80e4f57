// Sequences, their tiles of rows, and the steps of keys that each visits: integer arithmetic that the forward and the
// merge share. What comes from device memory is checked here.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"

namespace jax_bsk::decode::cuda {

constexpr int kStepKeys = static_cast<int>(kStep);

struct Sequence {
  int table;   // its number among the sequences of all groups
  int first;   // token, counted in its group
  int q_len;   // 0 for none
  int kv_len;  // -1: it cannot be true, and queries give NaN

  __device__ __forceinline__ Sequence(const KernelParams& params, int group, int number) {
    const int32_t* offsets = params.cu_q_lens + group * (params.seqs + 1) + number;
    table = group * params.seqs + number;
    first = __ldg(offsets);
    q_len = __ldg(offsets + 1) - first;
    kv_len = __ldg(params.kv_lens + table);
    if (kv_len < 0 || kv_len > params.max_pages * params.by_page_size.value()) kv_len = -1;
  }
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
    return {rows, narrow, narrow || sequence.q_len == 1};
  }
  template <typename Config>
  __device__ __forceinline__ int Count() const {
    return narrow ? 1 : (rows + Config::kWideRows - 1) / Config::kWideRows;
  }
  template <typename Config>
  __device__ __forceinline__ int Height() const {
    return narrow ? Config::kNarrowRows : Config::kWideRows;
  }
  __device__ __forceinline__ const device::Divisor& Part(const KernelParams& params) const {
    return is_short ? params.by_short_part : params.by_long_part;
  }
};

// The steps that a tile's queries visit between them: the first `sinks` of the sequence, then those from `first` on.
struct Steps {
  int sinks;
  int first;
  int count;

  Steps() = default;
  // Of the queries first_query .. last_query of the sequence.
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

  // The number of a visited step among the sequence's.
  __device__ __forceinline__ int operator[](int i) const { return i < sinks ? i : i - sinks + first; }
};

// Steps of any tile of the sequence at most, by which units are numbered.
template <typename Config>
__device__ __forceinline__ int MostStepsOf(const KernelParams& params, const Sequence& sequence,
                                           const RowTiles& tiles) {
  const int count = Steps(params, sequence, 0, sequence.q_len - 1).count;
  if (params.window == 0 || params.selection != nullptr) return count;
  const int64_t keys = params.window + params.by_group_heads.Ceiling(tiles.Height<Config>());
  const int64_t sinks = (params.sink_tokens + kStepKeys - 1) / kStepKeys;
  return static_cast<int>(min(int64_t{count}, sinks + keys / kStepKeys + 2));
}

}  // namespace jax_bsk::decode::cuda
