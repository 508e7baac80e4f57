// A counting sort by column and class, two passes over the entries.
#include "lists/cpu.h"

#include <algorithm>

#include "cpu/worker.h"

namespace jax_bsk::lists::cpu {
namespace {

// Calls visit(entry, row, key) for all entries of a table in order. Keys are 2 column, + 1 without a tile, and the last
// for entries of no row or column.
template <class Visit>
void ForEntries(const TransposeParams& p, int64_t table, const Visit& visit) {
  const int32_t* const offsets = p.offsets + table * (p.rows + 1);
  const int32_t* const ids = p.ids + table * p.capacity;
  const int32_t* const tiles = p.tiles + table * p.capacity;
  const auto clip = [&](int64_t x) { return std::clamp<int64_t>(x, 0, p.capacity); };
  int64_t largest = offsets[0], entry = 0;
  for (; entry < clip(largest); ++entry) visit(entry, -1, 2 * p.columns);
  for (int64_t row = 0; row < p.rows; ++row) {
    largest = std::max<int64_t>(largest, offsets[row + 1]);
    for (; entry < clip(largest); ++entry) {
      const bool inside = ids[entry] >= 0 && ids[entry] < p.columns;
      visit(entry, row, inside ? 2 * int64_t{ids[entry]} + (tiles[entry] == -1) : 2 * p.columns);
    }
  }
  for (; entry < p.capacity; ++entry) visit(entry, -1, 2 * p.columns);
}

void TransposeTable(const TransposeParams& p, int64_t table, int32_t* places) {
  int32_t* const col_offsets = p.col_offsets + table * (p.columns + 1);
  int32_t* const row_ids = p.row_ids + table * p.capacity;
  int32_t* const col_tiles = p.col_tiles + table * p.capacity;
  int32_t* const entries = p.to_columns + table * p.capacity;

  // --- Where each key begins.
  std::fill_n(places, 2 * p.columns + 1, 0);
  ForEntries(p, table, [&](int64_t, int64_t, int64_t key) { ++places[key]; });
  int32_t total = 0;
  for (int64_t key = 0; key <= 2 * p.columns; ++key) {
    if (key % 2 == 0) col_offsets[key / 2] = total;
    const int32_t count = places[key];
    places[key] = total;
    total += count;
  }

  // --- The entries to their places.
  ForEntries(p, table, [&](int64_t entry, int64_t row, int64_t key) {
    const int32_t place = places[key]++;
    const bool listed = key < 2 * p.columns;
    row_ids[place] = listed ? static_cast<int32_t>(row) : -1;
    col_tiles[place] = listed ? p.tiles[table * p.capacity + entry] : -1;
    entries[place] = static_cast<int32_t>(entry);
    p.to_rows[table * p.capacity + entry] = place;
  });
}

}  // namespace

bool RunTransposeTasks(const TransposeParams& params, std::atomic<int64_t>& next) noexcept {
  const auto bytes = static_cast<size_t>(2 * params.columns + 1) * sizeof(int32_t);
  return jax_bsk::cpu::TakeTasks(bytes, params.tables, next, [&](int64_t table, void* scratch) {
    TransposeTable(params, table, static_cast<int32_t*>(scratch));
  });
}

}  // namespace jax_bsk::lists::cpu
