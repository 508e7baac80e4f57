// Lists of the best blocks, a row at a time: the k-th greatest key by partial sorting, then all from it upwards in
// order.
#include <algorithm>
#include <cstring>
#include <functional>

#include "cpu/worker.h"
#include "lists/cpu.h"
#include "lists/score_key.h"

namespace jax_bsk::lists::cpu {
namespace {

constexpr uint32_t kSmallestNormal = 0x00800000u;

// Keys from `least` upwards are chosen, of those equal to it the first `ties`.
struct Choice {
  uint32_t least;
  int64_t ties;
};

Choice FindLeast(const ChooseParams& p, const uint32_t* keys, uint32_t* order) {
  const int64_t required = std::count(keys, keys + p.groups, kRequiredKey);
  const int64_t open = p.groups - std::count(keys, keys + p.groups, 0u);
  const int64_t limit = std::min(std::max(p.k, required), p.width);
  if (open <= limit) return {1, p.groups};
  if (limit == 0) return {kRequiredKey, 0};
  std::copy_n(keys, p.groups, order);
  std::nth_element(order, order + (limit - 1), order + p.groups, std::greater<uint32_t>());
  const uint32_t least = order[limit - 1];
  return {least, limit - std::count_if(keys, keys + p.groups, [&](uint32_t key) { return key > least; })};
}

void ChooseTable(const ChooseParams& p, int64_t table, uint32_t* scratch) {
  uint32_t *const keys = scratch, *const chosen = scratch + p.groups;
  int32_t* const row_offsets = p.row_offsets + table * (p.rows + 1);
  int32_t* const kv_blocks = p.kv_blocks + table * p.capacity;
  int32_t* const tiles = p.tiles + table * p.capacity;
  int64_t end = 0;
  row_offsets[0] = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    // --- Keys of the groups.
    const float* const scores = p.scores + (table * p.rows + row) * p.groups;
    const int8_t* const states = p.states + row * p.groups;
    for (int64_t group = 0; group < p.groups; ++group) {
      uint32_t bits;
      std::memcpy(&bits, scores + group, sizeof(bits));
      const uint32_t key = ScoreKey(bits, kSmallestNormal);
      keys[group] = states[group] == kRequired ? kRequiredKey : states[group] == kOpen ? key : 0;
    }

    // --- The chosen ones, ascending.
    const Choice choice = FindLeast(p, keys, chosen);
    int64_t ties = choice.ties, count = 0;
    for (int64_t group = 0; group < p.groups; ++group) {
      if (keys[group] < choice.least || (keys[group] == choice.least && ties-- <= 0)) continue;
      chosen[count++] = static_cast<uint32_t>(group);
    }

    // --- Their blocks: those with a bit tile, then full ones.
    const int32_t* const candidates = p.candidates + row * p.blocks;
    for (const bool partial : {true, false}) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = chosen[i] * p.group, last = std::min(first + std::min(p.group, p.blocks), p.blocks);
        for (int64_t block = first; block < last; ++block) {
          const int32_t tile = candidates[block];
          if (!(partial ? tile >= 0 : tile == -1) || end >= p.capacity) continue;
          kv_blocks[end] = static_cast<int32_t>(block);
          tiles[end++] = tile;
        }
      }
    }
    row_offsets[row + 1] = static_cast<int32_t>(end);
  }
  std::fill(kv_blocks + end, kv_blocks + p.capacity, -1);
  std::fill(tiles + end, tiles + p.capacity, -1);
}

}  // namespace

bool RunChooseTasks(const ChooseParams& params, std::atomic<int64_t>& next) noexcept {
  const auto bytes = static_cast<size_t>(2 * params.groups) * sizeof(uint32_t);
  return jax_bsk::cpu::TakeTasks(bytes, params.tables, next, [&](int64_t table, void* scratch) {
    ChooseTable(params, table, static_cast<uint32_t*>(scratch));
  });
}

}  // namespace jax_bsk::lists::cpu
