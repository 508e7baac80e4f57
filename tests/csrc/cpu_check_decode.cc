// The decoding call on the CPU against a float64 loop: random sequences, pages, selections, masks and faults, in arrays
// of exactly their size. Also whether a sequence has the same bits alone as beside others, and times.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_check.h"
#include "decode/cpu.h"

namespace jax_bsk::check {
namespace {

using namespace jax_bsk::decode;  // NOLINT: a test of this namespace

constexpr double kNone = std::numeric_limits<float>::lowest();

struct Case {
  ForwardParams params{};
  bool both = false;               // keys and values in one array
  Array query, key, value, sinks;  // `key` has both where they are in one array
  std::unique_ptr<int32_t[]> kv_lens, page_indices, cu_q_lens, num_seqs, selection;
  std::unique_ptr<uint32_t[]> tree;
  Array out, lse;

  // Elements of the arrays of keys and values.
  int64_t KeyAt(int64_t g, int64_t page, int64_t row, int64_t head) const {
    const Shape& s = params.shape;
    return ((g * s.pages + page) * s.page_size + row) * params.key.stride + head * params.key.head_stride;
  }
  int64_t ValueAt(int64_t g, int64_t page, int64_t row, int64_t head) const {
    const Shape& s = params.shape;
    return ((g * s.pages + page) * s.page_size + row) * params.value.stride + head * params.value.head_stride +
           (both ? s.head_dim : 0);
  }
  Array& Values() { return both ? key : value; }
  const Array& Values() const { return both ? key : value; }

  void SetStrides() {
    const Shape& s = params.shape;
    params.key = {nullptr, (both ? 2 : 1) * s.kv_heads * s.head_dim, (both ? 2 : 1) * s.head_dim};
    params.value = {nullptr, (both ? 2 : 1) * s.kv_heads * s.value_dim, (both ? 2 : 1) * s.value_dim};
  }

  void SetPointers() {
    ForwardParams& p = params;
    p.query = query.data.get();
    p.key.first = key.data.get();
    p.value.first = both ? key.data.get() + p.shape.head_dim * Size(p.dtype) : value.data.get();
    p.kv_lens = kv_lens.get();
    p.page_indices = page_indices.get();
    p.cu_q_lens = cu_q_lens.get();
    p.num_seqs = num_seqs.get();
    p.selection = p.shape.selected > 0 ? selection.get() : nullptr;
    p.tree = tree.get();
    p.sinks = sinks.size > 0 ? reinterpret_cast<const float*>(sinks.data.get()) : nullptr;
    p.out = out.data.get();
    p.lse = reinterpret_cast<float*>(lse.data.get());
  }
};

void RunCall(const ForwardParams& params, int workers) {
  cpu::Call call;
  if (!cpu::Plan(params, workers, &call)) return;
  Run(call, cpu::TaskCount(call), cpu::RunTasks, workers);
}

int64_t Capacity(const Shape& s) { return s.max_pages * s.page_size; }

// Whether a token at `position` of a sequence attends to `key`, pages apart.
bool Attends(const Case& c, int64_t g, int64_t token, int64_t q_len, int64_t kv_len, int64_t position, int64_t key) {
  const ForwardParams& p = c.params;
  if (key < 0 || key >= kv_len) return false;
  if (p.window > 0 && !(key > position - p.window || key < p.sink_tokens)) return false;
  const int64_t drafted = key - (kv_len - q_len);
  if (c.tree != nullptr && q_len <= 64 && drafted >= 0) {
    return c.tree[(g * p.shape.tokens + token) * 2 + drafted / 32] >> (drafted % 32) & 1;
  }
  return !p.causal || key <= position;
}

// Positions of a sequence and a key/value head in the order of their visits, with repeats.
std::vector<int64_t> Positions(const Case& c, int64_t g, int64_t seq, int64_t head) {
  const Shape& s = c.params.shape;
  const int64_t kv_len = c.kv_lens[g * s.seqs + seq];
  std::vector<int64_t> positions;
  if (s.selected == 0) {
    for (int64_t k = 0; k < kv_len; ++k) positions.push_back(k);
  }
  for (int64_t i = 0; i < s.selected; ++i) {
    const int64_t page = c.selection[((g * s.seqs + seq) * s.kv_heads + head) * s.selected + i];
    if (page < 0) continue;
    for (int64_t k = page * s.page_size; k < std::min((page + 1) * s.page_size, kv_len); ++k) positions.push_back(k);
  }
  return positions;
}

struct Expected {
  std::vector<double> out, out_terms, lse, lse_terms;
  std::vector<char> any;  // of a row: something in `out` is a NaN, and what the others become is not compared
};

bool Sound(const Case& c, int64_t g) {
  const Shape& s = c.params.shape;
  const int32_t* const cu = c.cu_q_lens.get() + g * (s.seqs + 1);
  if (c.num_seqs[g] < 0 || c.num_seqs[g] > s.seqs || cu[0] < 0) return false;
  for (int64_t i = 0; i < c.num_seqs[g]; ++i) {
    if (cu[i + 1] < cu[i]) return false;
  }
  return cu[c.num_seqs[g]] <= s.tokens;
}

// Calls visit(g, seq, token, position) for each token of each sequence with a length that is sound, and bad(g, token)
// for those of others.
template <class Visit, class Bad>
void ForTokens(const Case& c, const Visit& visit, const Bad& bad) {
  const Shape& s = c.params.shape;
  for (int64_t g = 0; g < s.groups; ++g) {
    if (!Sound(c, g)) {
      for (int64_t t = 0; t < s.tokens; ++t) bad(g, t);
      continue;
    }
    for (int64_t seq = 0; seq < c.num_seqs[g]; ++seq) {
      const int32_t* const cu = c.cu_q_lens.get() + g * (s.seqs + 1) + seq;
      const int64_t kv_len = c.kv_lens[g * s.seqs + seq];
      for (int64_t t = cu[0]; t < cu[1]; ++t) {
        if (kv_len < 0 || kv_len > Capacity(s)) {
          bad(g, t);
        } else {
          visit(g, seq, t, kv_len - (cu[1] - cu[0]) + (t - cu[0]));
        }
      }
    }
  }
}

int64_t QueryLength(const Case& c, int64_t g, int64_t seq) {
  const int32_t* const cu = c.cu_q_lens.get() + g * (c.params.shape.seqs + 1) + seq;
  return cu[1] - cu[0];
}

Expected Wanted(const Case& c) {
  const ForwardParams& p = c.params;
  const Shape& s = p.shape;
  const int64_t rows = s.groups * s.tokens * s.heads;
  Expected want{std::vector<double>(rows * s.value_dim), std::vector<double>(rows * s.value_dim),
                std::vector<double>(rows, kNone), std::vector<double>(rows), std::vector<char>(rows)};
  const auto spoil = [&](int64_t row) {
    want.lse[row] = kNaN;
    for (int64_t d = 0; d < s.value_dim; ++d) want.out[row * s.value_dim + d] = kNaN;
  };
  const auto bad = [&](int64_t g, int64_t t) {
    for (int64_t n = 0; n < s.heads; ++n) spoil((g * s.tokens + t) * s.heads + n);
  };
  const auto one = [&](int64_t g, int64_t seq, int64_t t, int64_t position, int64_t n) {
    const int64_t row = (g * s.tokens + t) * s.heads + n, head = n / (s.heads / s.kv_heads);
    const int64_t kv_len = c.kv_lens[g * s.seqs + seq];
    std::vector<double> logits;
    std::vector<int64_t> values;
    double maximum = -kInf, largest = 0;
    bool poisoned = false;
    for (const int64_t k : Positions(c, g, seq, head)) {
      if (!Attends(c, g, t, QueryLength(c, g, seq), kv_len, position, k)) continue;
      const int64_t page = c.page_indices[(g * s.seqs + seq) * s.max_pages + k / s.page_size];
      if (page < 0 || page >= s.pages) {
        poisoned = true;
        continue;
      }
      const int64_t key = c.KeyAt(g, page, k % s.page_size, head);
      double sum = 0, terms = 0;
      for (int64_t d = 0; d < s.head_dim; ++d) {
        const double term = double(p.scale) * c.query[row * s.head_dim + d] * c.key[key + d];
        sum += term;
        terms += std::fabs(term);
      }
      if (p.soft_cap != 0) sum = p.soft_cap * std::tanh(sum / p.soft_cap);
      poisoned |= std::isnan(sum);
      logits.push_back(sum);
      values.push_back(c.ValueAt(g, page, k % s.page_size, head));
      maximum = std::fmax(maximum, sum);
      largest = std::fmax(largest, terms);
    }
    const double sink = p.sinks != nullptr ? double(p.sinks[n]) : -kInf;
    if (poisoned || std::isnan(sink)) return spoil(row);
    maximum = std::fmax(maximum, sink);
    if (maximum == -kInf) return;
    const auto share = [&](double logit) { return sink == kInf ? 0 : std::exp(logit - maximum); };
    double sum = sink == kInf ? 1 : share(sink);
    for (const double logit : logits) sum += share(logit);
    want.lse[row] = maximum + std::log(sum);
    want.lse_terms[row] = sink == kInf ? 0 : 1 + largest + std::fabs(want.lse[row]);
    for (size_t i = 0; i < logits.size(); ++i) {
      for (int64_t d = 0; d < s.value_dim; ++d) {
        const double term = double(p.value_scale) * share(logits[i]) / sum * c.Values()[values[i] + d];
        want.out[row * s.value_dim + d] += term;
        want.out_terms[row * s.value_dim + d] += std::fabs(term) * (1 + largest);
        want.any[row] |= std::isnan(term);
      }
    }
  };
  ForTokens(
      c,
      [&](int64_t g, int64_t seq, int64_t t, int64_t position) {
        for (int64_t n = 0; n < s.heads; ++n) one(g, seq, t, position, n);
      },
      bad);
  return want;
}

bool Compare(const Case& c, const Expected& want) {
  const int64_t value_dim = c.params.shape.value_dim;
  for (int64_t i = 0; i < c.out.size; ++i) {
    const double x = c.out[i], y = want.out[i];
    if (want.any[i / value_dim] && !std::isnan(y)) continue;
    const double allowed = Allowed(c.out.dtype, c.params.dtype, y, want.out_terms[i]);
    if (std::isnan(y) ? std::isnan(x) : x == y || std::fabs(x - y) <= allowed) continue;
    std::printf("decode out[%ld]: %.9g instead of %.9g (allowed error %.3g)\n", i, x, y, allowed);
    return false;
  }
  for (int64_t i = 0; i < c.lse.size; ++i) {
    const double x = c.lse[i], y = want.lse[i];
    const double allowed = Allowed(DType::kF32, c.params.dtype, y, want.lse_terms[i]);
    if (std::isnan(y) ? std::isnan(x) : x == y || std::fabs(x - y) <= allowed) continue;
    std::printf("decode lse[%ld]: %.9g instead of %.9g (allowed error %.3g)\n", i, x, y, allowed);
    return false;
  }
  return true;
}

// NaN everywhere in the cache where no query reads, and anything in what is not looked at.
void SpoilOthers(Random& random, Case& c) {
  const Shape& s = c.params.shape;
  std::vector<char> reads(s.groups * s.pages * s.page_size * s.kv_heads);
  ForTokens(
      c,
      [&](int64_t g, int64_t seq, int64_t t, int64_t position) {
        for (int64_t head = 0; head < s.kv_heads; ++head) {
          for (const int64_t k : Positions(c, g, seq, head)) {
            if (!Attends(c, g, t, QueryLength(c, g, seq), c.kv_lens[g * s.seqs + seq], position, k)) continue;
            const int64_t page = c.page_indices[(g * s.seqs + seq) * s.max_pages + k / s.page_size];
            if (page < 0 || page >= s.pages) continue;
            reads[((g * s.pages + page) * s.page_size + k % s.page_size) * s.kv_heads + head] = 1;
          }
        }
      },
      [](int64_t, int64_t) {});
  for (size_t i = 0; i < reads.size(); ++i) {
    if (reads[i]) continue;
    const int64_t head = i % s.kv_heads, row = i / s.kv_heads;
    const double wild = random.Pick<double>({kNaN, kNaN, kInf});
    for (int64_t d = 0; d < s.head_dim; ++d) c.key.Set(c.KeyAt(0, 0, row, head) + d, wild);
    for (int64_t d = 0; d < s.value_dim; ++d) c.Values().Set(c.ValueAt(0, 0, row, head) + d, wild);
  }
}

int32_t Wild(Random& random, int64_t end) {
  return random.Pick<int32_t>({-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(end), static_cast<int32_t>(end + 1)});
}

void SetSequences(Random& random, Case& c) {
  Shape& s = c.params.shape;
  s.seqs = random.Int(0, 5);
  s.page_size = random.Pick<int64_t>({1, 3, 16, 16, 32, 64, 128, 300});
  s.max_pages = random.Int(0, std::max<int64_t>(2, 450 / s.page_size));
  s.pages = random.Int(0, 2 * s.max_pages + 1);
  std::vector<int32_t> cu, lens, table, counts;
  const bool short_ones = random.Chance(0.5);
  for (int64_t g = 0; g < s.groups; ++g) {
    int64_t at = random.Chance(0.1) ? random.Int(1, 3) : 0;
    counts.push_back(static_cast<int32_t>(random.Chance(0.7) ? s.seqs : random.Int(0, s.seqs)));
    cu.push_back(static_cast<int32_t>(at));
    for (int64_t i = 0; i < s.seqs; ++i) {
      const int64_t q_len = short_ones ? random.Pick<int64_t>({0, 1, 1, 1, 1, 2, 4})
                                       : random.Pick<int64_t>({1, 5, 16, 33, 64, 65, 80, random.Int(0, 40)});
      at += q_len;
      if (i < counts[g]) s.tokens = std::max(s.tokens, at);
      cu.push_back(static_cast<int32_t>(i < counts[g] ? at : Wild(random, at)));
      const int64_t most = Capacity(s);
      lens.push_back(
          static_cast<int32_t>(random.Chance(0.8) ? random.Int(std::min(q_len, most), most) : random.Int(0, most)));
      for (int64_t m = 0; m < s.max_pages; ++m) {
        const bool used = m * s.page_size < lens.back();
        const int64_t page = s.pages > 0 ? random.Int(0, s.pages - 1) : 0;
        table.push_back(used ? static_cast<int32_t>(page) : Wild(random, s.pages));
      }
    }
  }
  s.tokens += random.Chance(0.5) ? 0 : random.Int(1, 4);
  if (random.Chance(0.3)) {
    s.selected = random.Int(1, 7);
    std::vector<int32_t> selection;
    for (int64_t i = 0; i < s.groups * s.seqs * s.kv_heads * s.selected; ++i) {
      selection.push_back(random.Chance(0.1) ? Wild(random, s.max_pages)
                                             : static_cast<int32_t>(random.Int(-1, s.max_pages)));
    }
    c.selection = Exact(selection);
  }
  c.kv_lens = Exact(lens);
  c.cu_q_lens = Exact(cu);
  c.page_indices = Exact(table);
  c.num_seqs = Exact(counts);
  if (random.Chance(0.3)) {
    std::vector<uint32_t> words(s.groups * s.tokens * 2);
    const bool sparse = random.Chance(0.3);
    for (uint32_t& word : words) {
      word = static_cast<uint32_t>(random.Int(0, UINT32_MAX));
      if (sparse) word &= static_cast<uint32_t>(random.Int(0, UINT32_MAX)) & word >> 5;
    }
    c.tree = Exact(words);
  }
}

void Poison(Random& random, Case& c) {
  const Shape& s = c.params.shape;
  const int64_t seqs = s.groups * s.seqs;
  switch (random.Int(0, 3)) {
    case 0:
      if (seqs > 0) c.kv_lens[random.Int(0, seqs - 1)] = Wild(random, Capacity(s) + 1);
      break;
    case 1:
      if (seqs * s.max_pages > 0) c.page_indices[random.Int(0, seqs * s.max_pages - 1)] = Wild(random, s.pages);
      break;
    case 2:
      c.cu_q_lens[random.Int(0, s.groups * (s.seqs + 1) - 1)] = Wild(random, s.tokens + 1);
      break;
    default:
      c.num_seqs[random.Int(0, s.groups - 1)] = Wild(random, s.seqs + 1);
  }
}

Case MakeCase(Random& random) {
  Case c;
  ForwardParams& p = c.params;
  Shape& s = p.shape;
  p.dtype = random.Pick<DType>({DType::kF32, DType::kF32, DType::kBF16, DType::kF16, DType::kF64});
  s.groups = random.Pick<int64_t>({1, 1, 2});
  s.kv_heads = random.Int(1, 2);
  s.heads = s.kv_heads * random.Pick<int64_t>({1, 1, 2, 3, 4, 8, 13});
  s.head_dim = random.Pick<int64_t>({1, 3, 16, 16, 17, 32, 32, 40, 64, 128, 256});
  c.both = random.Chance(0.5);
  s.value_dim = c.both || random.Chance(0.5) ? s.head_dim : random.Pick<int64_t>({1, 5, 16, 33, 64, 128});
  SetSequences(random, c);
  c.SetStrides();
  const int64_t positions = s.groups * s.pages * s.page_size;
  c.query = random.Normals(p.dtype, s.groups * s.tokens * s.heads * s.head_dim);
  c.key = random.Normals(p.dtype, positions * p.key.stride);
  if (!c.both) c.value = random.Normals(p.dtype, positions * p.value.stride);
  p.causal = random.Chance(0.8);
  p.window = random.Chance(0.35) ? random.Pick<int64_t>({1, 5, 16, 64, 100, 300}) : 0;
  p.sink_tokens = random.Pick<int64_t>({0, 1, 4, 20, 100});
  p.scale = static_cast<float>(random.Pick<double>({1, 1, 1, 10, -1}) / std::sqrt(s.head_dim));
  p.soft_cap = random.Pick<float>({0, 0, 0, 2, 30});
  p.value_scale = random.Pick<float>({1, 1, 0.25f, -3});
  p.short_part = random.Pick<int64_t>({64, 64, 128, 512});
  p.long_part = random.Pick<int64_t>({64, 128, 512});
  if (random.Chance(0.3)) {
    c.sinks = random.Normals(DType::kF32, s.heads);
    if (random.Chance(0.3)) c.sinks.Set(0, random.Pick<double>({kNaN, kInf, -kInf}));
  }
  for (int64_t times = random.Chance(0.25) ? random.Int(1, 3) : 0; times > 0; --times) Poison(random, c);
  if (random.Chance(0.5)) SpoilOthers(random, c);
  if (random.Chance(0.2)) {  // some of these are read
    Array& array = *random.Pick<Array*>({&c.query, &c.key, &c.Values()});
    for (int64_t i = 0; array.size > 0 && i < 3; ++i) array.Set(random.Int(0, array.size - 1), kNaN);
  }
  c.out = Array(p.dtype, s.groups * s.tokens * s.heads * s.value_dim);
  c.lse = Array(DType::kF32, s.groups * s.tokens * s.heads);
  c.SetPointers();
  return c;
}

// Whether a sequence has the same bits alone.
bool SameAlone(Random& random, const Case& c) {
  const ForwardParams& p = c.params;
  const Shape& s = p.shape;
  const int64_t g = random.Int(0, s.groups - 1);
  if (!Sound(c, g) || c.num_seqs[g] == 0) return true;
  const int64_t seq = random.Int(0, c.num_seqs[g] - 1), at = g * s.seqs + seq;
  const int64_t first = g * s.tokens + c.cu_q_lens[g * (s.seqs + 1) + seq], q_len = QueryLength(c, g, seq);
  if (q_len == 0) return true;
  ForwardParams alone = p;
  alone.shape.groups = alone.shape.seqs = 1;
  alone.shape.tokens = q_len;
  const int32_t offsets[] = {0, static_cast<int32_t>(q_len)}, one = 1;
  const int64_t bytes = Size(p.dtype), group = g * s.pages * s.page_size * bytes;
  alone.query = c.query.data.get() + first * s.heads * s.head_dim * bytes;
  alone.key.first = static_cast<const char*>(p.key.first) + group * p.key.stride;
  alone.value.first = static_cast<const char*>(p.value.first) + group * p.value.stride;
  alone.kv_lens += at;
  alone.page_indices += at * s.max_pages;
  alone.cu_q_lens = offsets;
  alone.num_seqs = &one;
  if (p.selection != nullptr) alone.selection += at * s.kv_heads * s.selected;
  if (p.tree != nullptr) alone.tree += first * 2;
  Array out(p.dtype, q_len * s.heads * s.value_dim), lse(DType::kF32, q_len * s.heads);
  alone.out = out.data.get();
  alone.lse = reinterpret_cast<float*>(lse.data.get());
  RunCall(alone, 2);
  const char* const all = c.out.data.get() + first * s.heads * s.value_dim * bytes;
  if (std::memcmp(out.data.get(), all, out.size * bytes) == 0 &&
      std::memcmp(lse.data.get(), c.lse.data.get() + first * s.heads * 4, lse.size * 4) == 0) {
    return true;
  }
  std::printf("decode: sequence %ld differs alone\n", seq);
  return false;
}

// --- Timing

// `seqs` sequences of `length` positions, one page each.
void Time(const char* title, DType dtype, int64_t seqs, int64_t length, int64_t heads, int64_t kv_heads, int64_t q_len,
          int64_t page_size) {
  Random random(1);
  Case c;
  ForwardParams& p = c.params;
  const int64_t pages = length / page_size;
  p.dtype = dtype;
  p.shape = {1, seqs * q_len, heads, kv_heads, 128, 128, seqs, seqs * pages, page_size, pages, 0};
  c.SetStrides();
  std::vector<int32_t> cu = {0}, table;
  for (int64_t i = 0; i < seqs; ++i) cu.push_back(static_cast<int32_t>((i + 1) * q_len));
  for (int64_t i = 0; i < seqs * pages; ++i) table.push_back(static_cast<int32_t>(i));
  for (size_t i = table.size(); i > 1; --i) std::swap(table[i - 1], table[random.Int(0, i - 1)]);
  c.cu_q_lens = Exact(cu);
  c.page_indices = Exact(table);
  c.kv_lens = Exact(std::vector<int32_t>(seqs, static_cast<int32_t>(length)));
  c.num_seqs = Exact<int32_t>({static_cast<int32_t>(seqs)});
  c.query = random.Normals(dtype, seqs * q_len * heads * 128);
  c.key = Array(dtype, seqs * length * p.key.stride);
  c.value = Array(dtype, seqs * length * p.value.stride);
  for (Array* array : {&c.key, &c.value}) {
    for (int64_t i = 0; i < array->size; ++i) array->Set(i, (i * 7919 % 1999 - 999) * 1e-3);
  }
  c.out = Array(dtype, c.query.size);
  c.lse = Array(DType::kF32, seqs * q_len * heads);
  p.causal = true;
  p.scale = 0.088f;
  p.value_scale = 1;
  p.short_part = 512;
  p.long_part = 8192;
  c.SetPointers();
  const double bytes = 2.0 * c.key.size * Size(dtype);
  std::printf("decode %s, page %ld:", title, page_size);
  for (int workers = 1; workers <= 2; ++workers) {
    // What the threads read at best, in the same run.
    const auto read = [&] {
      std::vector<std::thread> threads;
      std::atomic<int64_t> total{0};
      for (int w = 0; w < workers; ++w) {
        threads.emplace_back([&, w] {
          int64_t sum = 0;
          for (const Array* array : {&c.key, &c.value}) {
            const auto* const words = reinterpret_cast<const int64_t*>(array->data.get());
            const int64_t count = array->size * Size(dtype) / 8 / workers;
            for (int64_t i = w * count; i < (w + 1) * count; ++i) sum += words[i];
          }
          total += sum;
        });
      }
      for (std::thread& thread : threads) thread.join();
      return total.load();
    };
    volatile int64_t sink = 0;
    const double floor = BestSeconds([&] { sink = read(); });
    const double seconds = BestSeconds([&] { RunCall(p, workers); });
    std::printf("  x%d %.1f ms (%.1f GB/s; a sum of the same bytes %.1f ms)", workers, seconds * 1e3,
                bytes / seconds * 1e-9, floor * 1e3);
  }
  std::printf("\n");
}

}  // namespace

bool CheckDecode(uint64_t seed) {
  Random random(seed);
  Case c = MakeCase(random);
  RunCall(c.params, 1);
  const bool good =
      Compare(c, Wanted(c)) && Repeats("decode out", c.out, [&](int workers) { RunCall(c.params, workers); }) &&
      Repeats("decode lse", c.lse, [&](int workers) { RunCall(c.params, workers); }) && SameAlone(random, c);
  if (!good) {
    const ForwardParams& p = c.params;
    const Shape& s = p.shape;
    std::printf(
        "seed %lu: G %ld T %ld N %ld K %ld H %ld Hv %ld Q %ld P %ld Z %ld M %ld selected %ld dtype %d window %ld "
        "sink tokens %ld parts %ld, %ld%s%s%s\n",
        seed, s.groups, s.tokens, s.heads, s.kv_heads, s.head_dim, s.value_dim, s.seqs, s.pages, s.page_size,
        s.max_pages, s.selected, static_cast<int>(p.dtype), p.window, p.sink_tokens, p.short_part, p.long_part,
        p.causal ? " causal" : "", c.tree != nullptr ? " tree" : "", c.both ? " both" : "");
  }
  return good;
}

void TimeDecode() {
  Time("float32 4 x 16384, 32 heads on 8 of 128", DType::kF32, 4, 16384, 32, 8, 1, 16384);
  Time("float32 4 x 16384, 32 heads on 8 of 128", DType::kF32, 4, 16384, 32, 8, 1, 16);
  Time("float32 4 x 16384, 32 heads on 8 of 128, 4 tokens", DType::kF32, 4, 16384, 32, 8, 4, 16384);
  Time("float32 4 x 8192, 16 heads on 16 of 128", DType::kF32, 4, 8192, 16, 16, 1, 8192);
  Time("float32 1 x 65536, 8 heads on 1 of 128", DType::kF32, 1, 65536, 8, 1, 1, 65536);
  Time("bfloat16 4 x 16384, 32 heads on 8 of 128", DType::kBF16, 4, 16384, 32, 8, 1, 16384);
  Time("float16 4 x 16384, 32 heads on 8 of 128", DType::kF16, 4, 16384, 32, 8, 1, 16384);
}

}  // namespace jax_bsk::check
