// Block lists to transpose, a third of them with what no list should have, and the plainest transpose of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "lists/params.h"

namespace jax_bsk::check {

struct ListCase {
  lists::TransposeParams params{};
  std::vector<int32_t> offsets, ids, tiles;

  ListCase(int64_t tables, int64_t rows, int64_t columns, int64_t capacity, bool spoiled, uint64_t seed) {
    std::mt19937_64 rng(seed);
    const auto pick = [&](int64_t low, int64_t high) {  // both inclusive
      return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(rng));
    };
    params.tables = tables, params.rows = rows, params.columns = columns, params.capacity = capacity;
    for (int64_t table = 0; table < tables; ++table) {
      std::vector<int32_t> ends(rows + 1);
      for (int32_t& end : ends) end = pick(0, capacity);
      std::sort(ends.begin(), ends.end());
      ends[0] = 0;
      for (const int32_t end : ends) {
        offsets.push_back(spoiled && pick(0, 9) == 0 ? pick(-50, capacity + 50) : end);
      }
      for (int64_t entry = 0; entry < capacity; ++entry) {
        ids.push_back(spoiled && pick(0, 9) == 0 ? pick(INT32_MIN, INT32_MAX)
                                                 : pick(0, std::max<int64_t>(columns, 1) - 1));
        tiles.push_back(spoiled && pick(0, 9) == 0 ? pick(-9, 9) : pick(-1, 2));
      }
    }
  }

  // Results one after the other: col_offsets, row_ids, col_tiles, entries, places of all tables.
  struct Results {
    std::vector<int32_t> col_offsets, row_ids, col_tiles, entries, places;
    bool operator==(const Results& other) const {
      return col_offsets == other.col_offsets && row_ids == other.row_ids && col_tiles == other.col_tiles &&
             entries == other.entries && places == other.places;
    }
  };
  Results Empty() const {
    const size_t all = params.tables * params.capacity;
    return {std::vector<int32_t>(params.tables * (params.columns + 1), -77), std::vector<int32_t>(all, -77),
            std::vector<int32_t>(all, -77), std::vector<int32_t>(all, -77), std::vector<int32_t>(all, -77)};
  }

  Results Wanted() const {
    Results wanted = Empty();
    const int64_t capacity = params.capacity, columns = params.columns;
    for (int64_t table = 0; table < params.tables; ++table) {
      const int64_t first = table * capacity;
      std::vector<int64_t> rows(capacity, -1), keys(capacity, 2 * columns), order(capacity);
      int64_t end = std::clamp<int64_t>(offsets[table * (params.rows + 1)], 0, capacity);
      for (int64_t row = 0; row < params.rows; ++row) {
        const int64_t next = std::clamp<int64_t>(offsets[table * (params.rows + 1) + row + 1], 0, capacity);
        for (; end < next; ++end) rows[end] = row;
      }
      for (int64_t entry = 0; entry < capacity; ++entry) {
        const int64_t id = ids[first + entry];
        if (rows[entry] >= 0 && id >= 0 && id < columns) keys[entry] = 2 * id + (tiles[first + entry] == -1);
      }
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
      for (int64_t column = 0; column <= columns; ++column) {
        wanted.col_offsets[table * (columns + 1) + column] = static_cast<int32_t>(
            std::count_if(keys.begin(), keys.end(), [&](int64_t key) { return key < 2 * column; }));
      }
      for (int64_t place = 0; place < capacity; ++place) {
        const int64_t entry = order[place];
        const bool listed = keys[entry] < 2 * columns;
        wanted.row_ids[first + place] = listed ? static_cast<int32_t>(rows[entry]) : -1;
        wanted.col_tiles[first + place] = listed ? tiles[first + entry] : -1;
        wanted.entries[first + place] = static_cast<int32_t>(entry);
        wanted.places[first + entry] = static_cast<int32_t>(place);
      }
    }
    return wanted;
  }

  // Parameters with the given arrays for inputs and results.
  lists::TransposeParams With(const int32_t* offsets_at, const int32_t* ids_at, const int32_t* tiles_at,
                              int32_t* col_offsets, int32_t* row_ids, int32_t* col_tiles, int32_t* entries,
                              int32_t* places) const {
    lists::TransposeParams p = params;
    p.offsets = offsets_at, p.ids = ids_at, p.tiles = tiles_at;
    p.col_offsets = col_offsets, p.row_ids = row_ids, p.col_tiles = col_tiles, p.to_columns = entries,
    p.to_rows = places;
    return p;
  }
};

}  // namespace jax_bsk::check
