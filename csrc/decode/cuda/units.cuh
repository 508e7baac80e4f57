// Units of work: a part of the steps of one tile of rows and one key/value head. They are numbered through all
// sequences; a CTA takes every gridDim.x-th. Of one part neighbouring numbers are the heads, which lie side by side in
// memory.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "decode/cuda/sequence.cuh"
#include "decode/cuda_limits.h"

namespace jax_bsk::decode::cuda {

struct Unit {
  int group, sequence, table, kv_head;  // the sequence counts in its group, `table` in all
  int first_token, q_len, kv_len;
  int row, rows;    // the tile's first row of the sequence, and how many it has
  int part, parts;  // of the tile's steps
  int step, steps;  // the part's first, counted among those visited, and how many it has; 0 steps: nothing to do
  bool narrow;      // tiles of 16 rows
  bool is_short;    // as partials.h says
};

// Units of one sequence, 0 for one that is not there; -1 if its offsets, or the number of its group's sequences, cannot
// be true.
template <typename Config>
__device__ __forceinline__ int CountUnitsOf(const KernelParams& params, int group, int number) {
  const Sequence sequence = Sequence::Read<Config>(params, group, number);
  if constexpr (!Config::kListed) {
    const int count = __ldg(params.num_seqs + group);
    if (count < 0 || count > params.seqs) return -1;
    if (number == 0 && (sequence.first < 0 || sequence.first > params.tokens)) return -1;
    if (number >= count) return 0;
    if (sequence.q_len < 0) return -1;
  }
  if (sequence.q_len == 0 || sequence.kv_len < 0) return 0;
  const RowTiles tiles = RowTiles::Of<Config>(params, sequence);
  const int parts = Parts::Of<Config>(params, tiles, MostStepsOf<Config>(params, sequence, tiles)).count;
  return tiles.Count<Config>() * parts * params.kv_heads;
}

// Units of the sequences before each, [sequences of all groups + 1]; groups whose offsets cannot be true have none, and
// get a flag for the merge. All threads call it, and may read `before` when it returns.
template <typename Config>
__device__ __forceinline__ void CountUnits(const KernelParams& params, int* before) {
  const int seqs = params.seqs, total = params.sequences;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  __shared__ int warp_sums[Config::kWarps];

  // A thread takes a run of sequences.
  const int run = (total + Config::kThreads - 1) / Config::kThreads;
  const int begin = min(thread * run, total), end = min(begin + run, total);
  bool any_bad = false;
  for (int i = begin; i < end; ++i) {
    const int group = params.by_seqs.Quotient(i);
    before[i] = CountUnitsOf<Config>(params, group, i - group * seqs);
    any_bad |= before[i] < 0;
  }
  any_bad = __syncthreads_or(any_bad);
  for (int group = thread; !Config::kListed && group < params.shape.groups; group += Config::kThreads) {
    bool bad = seqs == 0 && __ldg(params.num_seqs + group) != 0;
    for (int i = 0; any_bad && i < seqs; ++i) bad |= before[group * seqs + i] < 0;
    if (bad && seqs > 0) before[group * seqs] = -1;  // where the group's other sequences look
    if (blockIdx.x == 0) params.bad_groups[group] = bad;
  }
  if (any_bad) {
    static_assert(Limits::kMaxSequences <= 32 * Config::kThreads);
    __syncthreads();
    uint32_t bad = 0;
    for (int i = begin; i < end; ++i) {
      bad |= uint32_t{before[params.by_seqs.Quotient(i) * seqs] < 0} << (i - begin);
    }
    __syncthreads();
    for (int i = begin; i < end; ++i) before[i] = bad >> (i - begin) & 1 ? 0 : before[i];
  }

  // Exclusive sums over the run, the warp and the CTA.
  int sum = 0;
  for (int i = begin; i < end; ++i) {
    const int units = before[i];
    before[i] = sum;
    sum += units;
  }
  int upto = sum;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) warp_sums[warp] = upto;
  __syncthreads();
  int first = upto - sum;
  for (int w = 0; w < warp; ++w) first += warp_sums[w];
  for (int i = begin; i < end; ++i) before[i] += first;
  if (thread == Config::kThreads - 1) before[total] = first + sum;
  __syncthreads();
}

// The unit of a number below before[sequences], and the steps that its tile visits.
template <typename Config>
__device__ __forceinline__ Unit FindUnit(const KernelParams& params, const int* before, int number, Steps* visited) {
  // The last sequence with no more units before it: sequences without units are passed over.
  int low = 0, high = params.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (before[middle] <= number ? low : high) = middle;
  }
  Unit unit;
  unit.group = params.by_seqs.Quotient(low), unit.sequence = low - unit.group * params.seqs;
  const Sequence sequence = Sequence::Read<Config>(params, unit.group, unit.sequence);
  unit.first_token = sequence.first, unit.q_len = sequence.q_len, unit.kv_len = sequence.kv_len;
  unit.table = sequence.table;
  const RowTiles tiles = RowTiles::Of<Config>(params, sequence);
  const int rest = number - before[low], of_head = params.by_kv_heads.Quotient(rest);
  unit.kv_head = rest - of_head * params.kv_heads;
  int tile = 0;
  unit.part = of_head;
  if (!tiles.narrow) {
    const int parts = Parts::Of<Config>(params, tiles, MostStepsOf<Config>(params, sequence, tiles)).count;
    tile = tiles.Count<Config>() - 1 - of_head / parts;  // tiles with the most keys come first
    unit.part = of_head % parts;
  }
  unit.row = tile * tiles.Height<Config>();
  unit.rows = min(tiles.Height<Config>(), tiles.rows - unit.row);
  unit.narrow = tiles.narrow, unit.is_short = tiles.is_short;

  *visited = Steps::Of<Config>(params, sequence, params.by_group_heads.Quotient(unit.row),
                               params.by_group_heads.Quotient(unit.row + unit.rows - 1));
  const Parts parts = Parts::Of<Config>(params, tiles, visited->count);
  unit.parts = parts.count;
  unit.step = unit.part * parts.steps;
  unit.steps = max(0, min(parts.steps, visited->count - unit.step));
  return unit;
}

}  // namespace jax_bsk::decode::cuda
