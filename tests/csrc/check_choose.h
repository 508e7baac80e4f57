// Scores to choose blocks by, with all that makes choosing hard, and the plainest choice of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "lists/params.h"

namespace jax_bsk::check {

struct ChooseCase {
  lists::ChooseParams params{};
  std::vector<float> scores;
  std::vector<int8_t> states;
  std::vector<int32_t> candidates;

  // Causal: a row's groups end where the row does, and its own is required. Without `plain` some rows have ties,
  // infinities and so on, and some blocks are empty; with `spoiled` states, candidates, width and capacity make no
  // sense.
  ChooseCase(int64_t tables, int64_t rows, int64_t groups, int64_t group, int64_t k, bool plain, bool spoiled,
             uint64_t seed)
      : rng_(seed) {
    const int64_t blocks = groups == 0 ? 0 : groups * group - Pick(0, group - 1);
    params.tables = tables, params.rows = rows, params.groups = groups, params.blocks = blocks, params.group = group;
    params.k = k;
    int64_t listed = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t own = (row + 1) * groups / rows - 1, extra = plain ? 0 : Pick(0, 3) == 0 ? Pick(0, k) : 0;
      int64_t required = 0;
      for (int64_t n = 0; n < groups; ++n) {
        const bool must = n == own || (n < own && n >= own - extra);
        const lists::GroupState state = must ? lists::kRequired : n < own ? lists::kOpen : lists::kClosed;
        states.push_back(static_cast<int8_t>(spoiled && Pick(0, 4) == 0 ? Pick(-128, 127) : int64_t{state}));
        required += must;
      }
      params.width = std::max(params.width, std::min(std::max(required, k), groups));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block / group;
        const int64_t other = plain || Pick(0, 5) != 0 ? -1 : Pick(-2, 2);  // with a tile, or empty in an open group
        const int64_t tile = at > own ? -2 : at == own ? 0 : other;
        candidates.push_back(static_cast<int32_t>(spoiled && Pick(0, 4) == 0 ? Pick(INT32_MIN, INT32_MAX) : tile));
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const auto first = candidates.begin() + row * blocks;
      const int64_t there = std::count_if(first, first + blocks, [](int32_t tile) { return tile >= -1; });
      listed += std::min(there, params.width * group);
    }
    params.capacity = spoiled ? Pick(0, listed) : std::max<int64_t>(listed, 1);
    if (spoiled) params.width = Pick(0, groups);
    for (int64_t row = 0; row < tables * rows; ++row) {
      const int64_t kind = plain ? 0 : Pick(0, 5);
      for (int64_t n = 0; n < groups; ++n) scores.push_back(Score(kind));
    }
  }

  // Results one after the other: row_offsets, kv_blocks, tiles of all tables.
  struct Results {
    std::vector<int32_t> row_offsets, kv_blocks, tiles;
    bool operator==(const Results& other) const {
      return row_offsets == other.row_offsets && kv_blocks == other.kv_blocks && tiles == other.tiles;
    }
  };
  Results Empty(int32_t fill = -77) const {
    const size_t all = params.tables * params.capacity;
    return {std::vector<int32_t>(params.tables * (params.rows + 1), fill), std::vector<int32_t>(all, fill),
            std::vector<int32_t>(all, fill)};
  }

  // With numbers below the smallest normal one as they are, or as 0.
  Results Wanted(bool subnormal) const {
    Results wanted = Empty(-1);
    const auto& p = params;
    for (int64_t table = 0; table < p.tables; ++table) {
      int64_t end = 0;
      wanted.row_offsets[table * (p.rows + 1)] = 0;
      for (int64_t row = 0; row < p.rows; ++row) {
        std::vector<std::pair<double, int64_t>> may;  // by minus the score
        int64_t required = 0;
        for (int64_t n = 0; n < p.groups; ++n) {
          const int8_t state = states[row * p.groups + n];
          double score = scores[(table * p.rows + row) * p.groups + n];
          if (!subnormal && std::abs(score) < std::numeric_limits<float>::min()) score = 0;
          score = score > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : score;
          if (state == lists::kRequired) {
            ++required;
            may.push_back({-std::numeric_limits<double>::infinity(), n});
          } else if (state == lists::kOpen && score >= std::numeric_limits<float>::lowest()) {
            may.push_back({-score, n});
          }
        }
        std::sort(may.begin(), may.end());
        may.resize(std::min<size_t>(may.size(), std::min(std::max(p.k, required), p.width)));
        std::vector<std::pair<bool, int64_t>> blocks;  // full or not, number
        for (const auto& [score, n] : may) {
          for (int64_t block = n * p.group; block < std::min((n + 1) * p.group, p.blocks); ++block) {
            const int32_t tile = candidates[row * p.blocks + block];
            if (tile >= -1) blocks.push_back({tile == -1, block});
          }
        }
        std::sort(blocks.begin(), blocks.end());
        for (const auto& [full, block] : blocks) {
          if (end == p.capacity) break;
          wanted.kv_blocks[table * p.capacity + end] = static_cast<int32_t>(block);
          wanted.tiles[table * p.capacity + end++] = candidates[row * p.blocks + block];
        }
        wanted.row_offsets[table * (p.rows + 1) + row + 1] = static_cast<int32_t>(end);
      }
    }
    return wanted;
  }

  // Parameters with the given arrays for inputs and results.
  lists::ChooseParams With(const float* scores_at, const int8_t* states_at, const int32_t* outline_at,
                           int32_t* row_offsets, int32_t* kv_blocks, int32_t* tiles) const {
    lists::ChooseParams p = params;
    p.scores = scores_at, p.states = states_at, p.candidates = outline_at;
    p.row_offsets = row_offsets, p.kv_blocks = kv_blocks, p.tiles = tiles;
    return p;
  }

 private:
  int64_t Pick(int64_t low, int64_t high) {  // both inclusive
    return std::uniform_int_distribution<int64_t>(low, high)(rng_);
  }
  float Score(int64_t kind) {
    using Limits = std::numeric_limits<float>;
    static constexpr float kSpecial[] = {0.f,
                                         -0.f,
                                         Limits::infinity(),
                                         -Limits::infinity(),
                                         Limits::quiet_NaN(),
                                         -Limits::quiet_NaN(),
                                         Limits::max(),
                                         Limits::lowest(),
                                         Limits::min(),
                                         Limits::denorm_min(),
                                         -Limits::denorm_min()};
    const float normal = std::normal_distribution<float>(0, 1)(rng_);
    switch (kind) {
      case 1:  // ties
        return std::round(2 * normal);
      case 2:  // nothing else
        return 1.f;
      case 3:
        return Pick(0, 3) == 0 ? normal : kSpecial[Pick(0, std::size(kSpecial) - 1)];
      case 4:  // neighbours
        return std::nextafter(1.f, normal);
      case 5:  // few that may be chosen
        return Pick(0, 9) == 0 ? normal : -Limits::infinity();
      default:
        return normal;
    }
  }
  std::mt19937_64 rng_;
};

}  // namespace jax_bsk::check
