// Problems of decoding, drawn at random, and what their results should be by a plain loop in float64: in other words
// what csrc/decode/params.h says. For the CUDA kernels; the CPU's take other sizes and types and have their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "decode/params.h"

namespace jax_bsk::check {

struct DecodeProblem {
  std::string name;
  decode::Shape shape{};
  bool both = true;  // keys and values in one array
  bool causal = true;
  int64_t window = 0, sink_tokens = 0, short_part = 128, long_part = 256;
  float scale = 0.1f, soft_cap = 0.f, value_scale = 1.f;
  std::vector<float> query, key, value, sinks;
  std::vector<int32_t> kv_lens, page_indices, cu_q_lens, num_seqs, selection;
  std::vector<uint32_t> tree;

  int64_t KeyIndex(int64_t group, int64_t page, int64_t row, int64_t head) const {
    const int64_t position = (group * shape.pages + page) * shape.page_size + row;
    return both ? (position * 2 * shape.kv_heads + 2 * head) * shape.head_dim
                : (position * shape.kv_heads + head) * shape.head_dim;
  }
  int64_t ValueIndex(int64_t group, int64_t page, int64_t row, int64_t head) const {
    const int64_t position = (group * shape.pages + page) * shape.page_size + row;
    return both ? (position * 2 * shape.kv_heads + 2 * head + 1) * shape.head_dim
                : (position * shape.kv_heads + head) * shape.value_dim;
  }
  const std::vector<float>& Values() const { return both ? key : value; }

  // The problem's numbers, without the arrays.
  decode::ForwardParams Params() const {
    decode::ForwardParams params{};
    params.shape = shape;
    params.causal = causal, params.window = window, params.sink_tokens = sink_tokens;
    params.scale = scale, params.soft_cap = soft_cap, params.value_scale = value_scale;
    params.short_part = short_part, params.long_part = long_part;
    return params;
  }
};

// What a result should be; `terms` bounds the rounding of what it is the sum of.
struct DecodeWanted {
  std::vector<double> out, terms, lse;
  std::vector<char> spoiled;  // rows that attend to a value that is not finite: their other columns may be NaN, too
};

inline DecodeWanted DecodeReference(const DecodeProblem& p) {
  const auto& s = p.shape;
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double none = std::numeric_limits<float>::lowest();
  const int64_t rows = s.groups * s.tokens * s.heads, group_heads = s.kv_heads ? s.heads / s.kv_heads : 1;
  DecodeWanted want{std::vector<double>(rows * s.value_dim), std::vector<double>(rows * s.value_dim),
                    std::vector<double>(rows, none), std::vector<char>(rows)};
  const auto fill = [&](int64_t group, int64_t token, double out, double lse) {
    const int64_t first = (group * s.tokens + token) * s.heads;
    std::fill_n(want.out.begin() + first * s.value_dim, s.heads * s.value_dim, out);
    std::fill_n(want.lse.begin() + first, s.heads, lse);
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    const int32_t* offsets = p.cu_q_lens.data() + g * (s.seqs + 1);
    const int64_t count = p.num_seqs[g];
    bool bad = count < 0 || count > s.seqs;
    if (!bad) {
      bad = offsets[0] < 0 || offsets[count] > s.tokens;
      for (int64_t i = 0; i < count; ++i) bad |= offsets[i] > offsets[i + 1];
    }
    if (bad) {
      for (int64_t t = 0; t < s.tokens; ++t) fill(g, t, nan, nan);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q_len = offsets[i + 1] - offsets[i], kv_len = p.kv_lens[g * s.seqs + i];
      for (int64_t q = 0; q < q_len; ++q) {
        const int64_t token = offsets[i] + q, position = kv_len - q_len + q;
        if (kv_len < 0 || kv_len > s.max_pages * s.page_size) {
          fill(g, token, nan, nan);
          continue;
        }
        for (int64_t n = 0; n < s.heads; ++n) {
          const int64_t k = n / group_heads, row = (g * s.tokens + token) * s.heads + n;
          // Positions that the row visits, in any order.
          std::vector<int64_t> keys;
          const auto visit = [&](int64_t key) {
            if (key >= kv_len) return;
            if (p.window > 0 && key <= position - p.window && key >= p.sink_tokens) return;
            const int64_t draft = key - (kv_len - q_len);
            if (!p.tree.empty() && q_len <= 64) {
              if (draft >= 0 && !(p.tree[2 * (g * s.tokens + token) + draft / 32] >> (draft % 32) & 1)) return;
            } else if (p.causal && key > position) {
              return;
            }
            keys.push_back(key);
          };
          if (p.selection.empty()) {
            for (int64_t key = 0; key < kv_len; ++key) visit(key);
          } else {
            for (int64_t j = 0; j < s.selected; ++j) {
              const int64_t page = p.selection[((g * s.seqs + i) * s.kv_heads + k) * s.selected + j];
              if (page < 0 || page >= s.max_pages) continue;
              for (int64_t r = 0; r < s.page_size; ++r) visit(page * s.page_size + r);
            }
          }
          const double sink = p.sinks.empty() ? -infinity : p.sinks[n];
          std::vector<double> logits;
          double largest = sink;
          bool poisoned = false;
          for (const int64_t key : keys) {
            const int64_t page = p.page_indices[(g * s.seqs + i) * s.max_pages + key / s.page_size];
            if (page < 0 || page >= s.pages) {
              poisoned = true;
              break;
            }
            const float* x = p.query.data() + row * s.head_dim;
            const float* y = p.key.data() + p.KeyIndex(g, page, key % s.page_size, k);
            double dot = 0;
            for (int64_t h = 0; h < s.head_dim; ++h) dot += double{x[h]} * y[h];
            dot *= p.scale;
            if (p.soft_cap != 0) dot = p.soft_cap * std::tanh(dot / p.soft_cap);
            logits.push_back(dot);
            largest = std::isnan(dot) ? nan : std::max(largest, dot);
          }
          double* out = want.out.data() + row * s.value_dim;
          double* terms = want.terms.data() + row * s.value_dim;
          if (poisoned) {
            std::fill_n(out, s.value_dim, nan);
            want.lse[row] = nan;
            continue;
          }
          if (keys.empty()) {
            want.lse[row] = sink == -infinity ? none : sink;
            continue;
          }
          double sum = sink == -infinity ? 0 : std::exp(sink - largest);
          for (const double logit : logits) sum += std::exp(logit - largest);
          want.lse[row] = largest + std::log(sum);
          for (size_t j = 0; j < keys.size(); ++j) {
            const int64_t page = p.page_indices[(g * s.seqs + i) * s.max_pages + keys[j] / s.page_size];
            const float* y = p.Values().data() + p.ValueIndex(g, page, keys[j] % s.page_size, k);
            const double weight = std::exp(logits[j] - largest) / sum * p.value_scale;
            for (int64_t h = 0; h < s.value_dim; ++h) {
              out[h] += weight * y[h];
              want.spoiled[row] |= !std::isfinite(y[h]);
              terms[h] += std::abs(weight * y[h]);
            }
          }
        }
      }
    }
  }
  return want;
}

// ---- Problems of every kind

// What problems are drawn from; these are those of every kind.
struct DecodeKinds {
  std::vector<int64_t> head_dims = {64, 64, 128, 128, 96, 40, 256};
  int64_t least_dim = 8;
  int64_t most_positions = 900, most_queries = 90;  // of a sequence
  double faults = 0.2;                              // share of problems in which something cannot be true
};

inline DecodeProblem DrawDecode(unsigned seed, const DecodeKinds& kinds = {}) {
  std::mt19937 rng(seed);
  const auto pick = [&](const std::vector<int64_t>& values) {
    return values[std::uniform_int_distribution<size_t>(0, values.size() - 1)(rng)];
  };
  const auto chance = [&](double p) { return std::bernoulli_distribution(p)(rng); };
  const auto upto = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  DecodeProblem p;
  p.name = "random-" + std::to_string(seed);
  auto& s = p.shape;
  s.groups = pick({1, 1, 1, 2, 3});
  s.kv_heads = pick({1, 2, 3});
  s.heads = s.kv_heads * pick({1, 2, 4, 5, 8, 16, 24});
  s.head_dim = pick(kinds.head_dims);
  p.both = chance(0.5);
  const int64_t largest_dim = *std::max_element(kinds.head_dims.begin(), kinds.head_dims.end());
  s.value_dim = p.both || chance(0.7) ? s.head_dim : std::clamp(pick({8, 64, 128}), kinds.least_dim, largest_dim);
  s.seqs = upto(1, 5);
  s.page_size = pick({1, 5, 16, 16, 32, 64, 64, 100, 128, 256});
  s.max_pages = std::max<int64_t>(1, upto(1, kinds.most_positions) / s.page_size);
  const int64_t positions = s.max_pages * s.page_size;
  p.causal = chance(0.85);
  if (chance(0.3)) p.window = upto(1, 300), p.sink_tokens = chance(0.5) ? upto(0, 140) : 0;
  if (chance(0.25)) p.soft_cap = 2.f;
  if (chance(0.2)) p.value_scale = 0.5f;
  if (chance(0.1)) p.scale = -0.1f;
  p.short_part = 64 * upto(1, 4), p.long_part = 64 * upto(1, 6);
  const bool has_tree = chance(0.25), has_selection = chance(0.3), many_queries = chance(0.4);
  s.tokens = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    int64_t token = chance(0.2) ? upto(0, 3) : 0;
    const int64_t count = chance(0.8) ? s.seqs : upto(0, s.seqs);
    p.num_seqs.push_back(static_cast<int32_t>(count));
    for (int64_t i = 0; i < s.seqs; ++i) {
      p.cu_q_lens.push_back(static_cast<int32_t>(token));
      const int64_t q_len = many_queries && chance(0.5) ? upto(0, kinds.most_queries) : pick({0, 1, 1, 1, 2, 3, 5});
      if (i < count) token += q_len;
      const int64_t least = chance(0.9) ? std::min(q_len, positions) : 0;
      p.kv_lens.push_back(static_cast<int32_t>(i < count ? upto(least, positions) : upto(-5, 5)));
      for (int64_t m = 0; m < s.max_pages; ++m) p.page_indices.push_back(-7);  // drawn below
    }
    p.cu_q_lens.push_back(static_cast<int32_t>(token));
    s.tokens = std::max(s.tokens, token + (chance(0.3) ? upto(0, 4) : 0));
  }
  s.tokens = std::max<int64_t>(s.tokens, 1);
  // Pages in any order, those that are needed and some more, which hold NaN.
  const auto pages_of = [&](int64_t g, int64_t i) {
    return (std::max(p.kv_lens[g * s.seqs + i], 0) + s.page_size - 1) / s.page_size;
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    int64_t needed = 0;
    for (int64_t i = 0; i < p.num_seqs[g]; ++i) needed += pages_of(g, i);
    s.pages = std::max(s.pages, needed + 2);
  }
  std::normal_distribution<float> normal(0.f, 1.f);
  const auto fill = [&](std::vector<float>& array, int64_t size) {
    array.resize(size);
    for (float& x : array) x = normal(rng);
  };
  const int64_t rows = s.groups * s.pages * s.page_size * s.kv_heads;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  fill(p.query, s.groups * s.tokens * s.heads * s.head_dim);
  p.key.assign(rows * s.head_dim * (p.both ? 2 : 1), nan);
  if (!p.both) p.value.assign(rows * s.value_dim, nan);
  for (int64_t g = 0; g < s.groups; ++g) {
    std::vector<int32_t> free(s.pages);
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int32_t>(i);
    std::shuffle(free.begin(), free.end(), rng);
    for (int64_t i = 0; i < p.num_seqs[g]; ++i) {
      const int64_t kv_len = p.kv_lens[g * s.seqs + i];
      for (int64_t m = 0; m < pages_of(g, i); ++m) {
        const int32_t page = free.back();
        free.pop_back();
        p.page_indices[(g * s.seqs + i) * s.max_pages + m] = page;
        for (int64_t r = 0; r < std::min(s.page_size, kv_len - m * s.page_size); ++r)
          for (int64_t k = 0; k < s.kv_heads; ++k) {
            for (int64_t h = 0; h < s.head_dim; ++h) p.key[p.KeyIndex(g, page, r, k) + h] = normal(rng);
            auto& values = p.both ? p.key : p.value;
            for (int64_t h = 0; h < s.value_dim; ++h) values[p.ValueIndex(g, page, r, k) + h] = normal(rng);
          }
      }
    }
  }
  if (has_tree) {
    std::uniform_int_distribution<uint32_t> word;
    for (int64_t t = 0; t < 2 * s.groups * s.tokens; ++t) p.tree.push_back(word(rng));
  }
  if (has_selection) {
    s.selected = upto(1, s.max_pages + 2);
    for (int64_t i = 0; i < s.groups * s.seqs * s.kv_heads * s.selected; ++i) {
      const int64_t page = chance(0.1) ? pick({-1, -5, s.max_pages, 1 << 30}) : upto(0, s.max_pages - 1);
      p.selection.push_back(static_cast<int32_t>(page));
    }
  }
  if (chance(0.3)) fill(p.sinks, s.heads);
  // What cannot be true.
  if (chance(kinds.faults)) {
    const int64_t g = upto(0, s.groups - 1), i = upto(0, s.seqs - 1);
    switch (upto(0, 5)) {
      case 0:
        p.kv_lens[g * s.seqs + i] = static_cast<int32_t>(chance(0.5) ? -1 : positions + 1);
        break;
      case 1:
        p.page_indices[(g * s.seqs + i) * s.max_pages + upto(0, s.max_pages - 1)] =
            static_cast<int32_t>(chance(0.5) ? -1 : s.pages);
        break;
      case 2:
        p.cu_q_lens[g * (s.seqs + 1) + i] = static_cast<int32_t>(chance(0.5) ? -1 : s.tokens + 1);
        break;
      case 3:
        p.num_seqs[g] = static_cast<int32_t>(chance(0.5) ? -1 : s.seqs + 1);
        break;
      default: {  // a key or value that is not finite, at a position that some queries attend to, or all
        const int64_t kv_len = p.kv_lens[g * s.seqs + i];
        if (i >= p.num_seqs[g] || kv_len < 1) break;
        const int64_t position = upto(0, kv_len - 1), k = upto(0, s.kv_heads - 1);
        const int32_t page = p.page_indices[(g * s.seqs + i) * s.max_pages + position / s.page_size];
        if (chance(0.6)) {
          auto& values = p.both ? p.key : p.value;
          values[p.ValueIndex(g, page, position % s.page_size, k)] =
              chance(0.5) ? nan : std::numeric_limits<float>::infinity();
        } else {
          p.key[p.KeyIndex(g, page, position % s.page_size, k)] = nan;
        }
      }
    }
  }
  return p;
}

}  // namespace jax_bsk::check
