// Checks the native CPU kernels against a naive float64 computation over random shapes, masks and faults, without XLA
// or Python, so that it can be built with -fsanitize=address,undefined: every array is allocated exactly. Also times
// them.
//
//   cpu_check [--cases N] [--seed S] [--time]
//
// A failing case prints its seed; `--cases 1 --seed S` repeats it. JAX_BSK_CPU_ISA chooses the instruction set.
#include "cpu_check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention/cpu.h"

namespace {

using namespace jax_bsk::attention;  // NOLINT: a test of this namespace
using namespace jax_bsk::check;      // NOLINT

DType Statistics(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

// --- Cases
// ------------------------------------------------------------------------------------------------------------

struct Lists {
  int64_t batch, heads, rows, ids_end, capacity;
  std::unique_ptr<int32_t[]> offsets, ids, tiles;
  BlockList View() const { return {offsets.get(), ids.get(), tiles.get(), batch, heads, rows, ids_end, capacity}; }
};

struct Entry {
  int32_t id, tile;
};

using Rows = std::vector<std::vector<Entry>>;  // entries of each row

Lists MakeLists(const std::vector<Rows>& per_head, int64_t batch, int64_t heads, int64_t ids_end, int64_t slack) {
  Lists lists{batch, heads, static_cast<int64_t>(per_head[0].size()), ids_end, 0, nullptr, nullptr, nullptr};
  for (const Rows& rows : per_head) {
    int64_t count = 0;
    for (const auto& row : rows) count += row.size();
    lists.capacity = std::max(lists.capacity, count + slack);
  }
  std::vector<int32_t> offsets, ids, tiles;
  for (const Rows& rows : per_head) {
    const size_t begin = ids.size();
    offsets.push_back(0);
    for (const auto& row : rows) {
      for (const Entry& entry : row) {
        ids.push_back(entry.id);
        tiles.push_back(entry.tile);
      }
      offsets.push_back(static_cast<int32_t>(ids.size() - begin));
    }
    ids.resize(begin + lists.capacity, -1);
    tiles.resize(begin + lists.capacity, -1);
  }
  lists.offsets = Exact(offsets);
  lists.ids = Exact(ids);
  lists.tiles = Exact(tiles);
  return lists;
}

int64_t Leading(int64_t batch, int64_t heads, int64_t b, int64_t h) {
  return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
}

// Whether a row of a list is to be refused; written apart from the kernels' own check.
bool Broken(const Lists& lists, int64_t n_tiles, int64_t leading, int64_t row) {
  const int64_t begin = lists.offsets[leading * (lists.rows + 1) + row];
  const int64_t end = lists.offsets[leading * (lists.rows + 1) + row + 1];
  if (begin < 0 || end < begin || end > lists.capacity) return true;
  for (int64_t i = leading * lists.capacity + begin; i < leading * lists.capacity + end; ++i) {
    if (lists.ids[i] < 0 || lists.ids[i] >= lists.ids_end) return true;
    if (lists.tiles[i] < -1 || lists.tiles[i] >= n_tiles) return true;
  }
  return false;
}

// A bias's arrays with the leading dimensions of each, 1 or whole; arrays of no size are not given.
struct BiasArrays {
  Array dense, distances, tiles;
  bool dense_wide = false;
  int64_t dense_dims[4] = {}, distances_dims[2] = {}, tiles_dims[5] = {};
  std::unique_ptr<int32_t[]> row_tiles, col_tiles;  // with nothing to do with each other, as the gates

  Bias View() const {
    const auto data = [](const Array& array) { return array.size > 0 ? array.data.get() : nullptr; };
    return {data(dense),     dense_wide,        dense_dims[0],     dense_dims[1],   dense_dims[2],  dense_dims[3],
            data(distances), distances_dims[0], distances_dims[1], data(tiles),     tiles_dims[0],  tiles_dims[1],
            tiles_dims[2],   tiles_dims[3],     tiles_dims[4],     row_tiles.get(), col_tiles.get()};
  }
};

struct Case {
  Shape shape;
  DType dtype;
  Array query, key, value, dout, sinks, lse, lse_rest, delta;
  Lists rows, cols;
  int64_t tiles_batch, tiles_heads, n_tiles, lengths_batch, sinks_batch, sinks_heads;
  std::unique_ptr<uint32_t[]> words;
  std::unique_ptr<int32_t[]> lengths;
  double scale, soft_cap;  // float32 numbers but for float64 inputs
  bool gated;
  Array gates, col_gates;  // of the two lists' entries, with nothing to do with each other: no kernel reads both
  BiasArrays bias;
  std::unique_ptr<uint32_t[]> dropout_keys;
  int dropout = 0;  // in 256ths
  // Results of the kernels.
  Array out, got_lse, got_lse_rest, dquery, dkey, dvalue, dgates;
  Array ddense, ddistances, dtiles;  // of the distances both halves

  ForwardParams Forward() {
    return {shape,
            dtype,
            query.data.get(),
            key.data.get(),
            value.data.get(),
            rows.View(),
            {words.get(), tiles_batch, tiles_heads, n_tiles},
            {lengths.get(), lengths_batch},
            sinks.size > 0 ? sinks.data.get() : nullptr,
            sinks_batch,
            sinks_heads,
            gated ? gates.data.get() : nullptr,
            bias.View(),
            {dropout_keys.get(), dropout},
            static_cast<float>(scale),
            static_cast<float>(soft_cap),
            out.data.get(),
            got_lse.data.get(),
            got_lse_rest.data.get(),
            scale,
            soft_cap};
  }
  BackwardParams Backward() {
    return {shape,
            dtype,
            dout.data.get(),
            query.data.get(),
            key.data.get(),
            value.data.get(),
            lse.data.get(),
            lse_rest.data.get(),
            delta.data.get(),
            rows.View(),
            cols.View(),
            {words.get(), tiles_batch, tiles_heads, n_tiles},
            {lengths.get(), lengths_batch},
            gated ? gates.data.get() : nullptr,
            gated ? col_gates.data.get() : nullptr,
            gated ? dgates.data.get() : nullptr,
            bias.View(),
            {dropout_keys.get(), dropout},
            static_cast<float>(scale),
            static_cast<float>(soft_cap),
            dquery.data.get(),
            dkey.data.get(),
            dvalue.data.get(),
            scale,
            soft_cap};
  }
  BiasGradientParams BiasGradient(BiasTerm term) {
    return {shape,
            dtype,
            dout.data.get(),
            query.data.get(),
            key.data.get(),
            value.data.get(),
            lse.data.get(),
            lse_rest.data.get(),
            delta.data.get(),
            rows.View(),
            {words.get(), tiles_batch, tiles_heads, n_tiles},
            {lengths.get(), lengths_batch},
            gated ? gates.data.get() : nullptr,
            bias.View(),
            {dropout_keys.get(), dropout},
            term,
            static_cast<float>(scale),
            static_cast<float>(soft_cap),
            (term == BiasTerm::kDense       ? ddense
             : term == BiasTerm::kDistances ? ddistances
                                            : dtiles)
                .data.get(),
            scale,
            soft_cap};
  }
  int64_t QueryLength(int64_t b) const {
    return std::min<int64_t>(std::max(0, lengths[2 * (lengths_batch == 1 ? 0 : b)]), shape.q_len);
  }
  int64_t KeyLength(int64_t b) const {
    return std::min<int64_t>(std::max(0, lengths[2 * (lengths_batch == 1 ? 0 : b) + 1]), shape.kv_len);
  }
};

// Gates of a random case, of both signs and some 0, and room for the gradients.
void SetGates(Random& random, Case& c) {
  c.gated = random.Chance(0.5);
  if (!c.gated) return;
  const DType dtype = Statistics(c.dtype);
  const int64_t leading = c.shape.batch * c.shape.heads;
  for (auto [gates, lists] : {std::pair{&c.gates, &c.rows}, std::pair{&c.col_gates, &c.cols}}) {
    *gates = random.Normals(dtype, leading * lists->capacity);
    for (int64_t i = 0; i < gates->size; ++i) {
      if (random.Chance(0.1)) gates->Set(i, 0);
    }
    if (random.Chance(0.1)) Spoil(random, *gates, random.Int(1, 2));
  }
  c.dgates = Array(dtype, c.col_gates.size);
}

std::unique_ptr<int32_t[]> TileNumbers(Random& random, const Lists& lists, int64_t count) {
  std::vector<int32_t> numbers(lists.batch * lists.heads * lists.capacity);
  for (int32_t& number : numbers) number = static_cast<int32_t>(random.Int(-1, count));
  if (!numbers.empty() && random.Chance(0.2)) numbers[0] = random.Pick<int32_t>({INT32_MIN, INT32_MAX});
  return Exact(numbers);
}

// Biases and dropout of a random case, of every second seed, so that the others stay what they are.
void SetExtras(uint64_t seed, Case& c) {
  if (seed % 2 == 0) return;
  Random random(seed + (uint64_t{2} << 32));
  const Shape& s = c.shape;
  BiasArrays& bias = c.bias;
  const DType stats = Statistics(c.dtype);
  const auto some = [&](int64_t size) { return random.Chance(0.5) ? 1 : size; };
  const auto array = [&](DType dtype, int64_t size) {
    Array result = random.Normals(dtype, size);
    const bool masks = random.Chance(0.3);
    for (int64_t i = 0; i < size && masks; ++i) {
      if (random.Chance(0.4)) result.Set(i, -kInf);
    }
    if (random.Chance(0.1)) Spoil(random, result, random.Int(1, 2));
    return result;
  };
  if (random.Chance(0.5)) {
    const int64_t dims[] = {some(s.batch), some(s.heads), some(s.q_len), some(s.kv_len)};
    std::copy(dims, dims + 4, bias.dense_dims);
    bias.dense_wide = random.Chance(0.5) || c.dtype == stats;
    bias.dense = array(bias.dense_wide ? stats : c.dtype, dims[0] * dims[1] * dims[2] * dims[3]);
    c.ddense = Array(bias.dense.dtype, bias.dense.size);
  }
  if (random.Chance(0.5) && s.q_len + s.kv_len > 1) {
    bias.distances_dims[0] = some(s.batch), bias.distances_dims[1] = some(s.heads);
    const int64_t size = bias.distances_dims[0] * bias.distances_dims[1] * (s.q_len + s.kv_len - 1);
    bias.distances = array(stats, size);
    c.ddistances = Array(stats, 2 * size);
  }
  if (random.Chance(0.5)) {
    const int64_t dims[] = {some(s.batch), some(s.heads), random.Int(1, 20), some(s.block_q), some(s.block_kv)};
    std::copy(dims, dims + 5, bias.tiles_dims);
    bias.tiles = array(stats, dims[0] * dims[1] * dims[2] * dims[3] * dims[4]);
    c.dtiles = Array(stats, bias.tiles.size);
    bias.row_tiles = TileNumbers(random, c.rows, dims[2]);
    bias.col_tiles = TileNumbers(random, c.cols, dims[2]);
  }
  if (random.Chance(0.5)) {
    std::vector<uint32_t> keys(s.batch * s.heads);
    for (uint32_t& key : keys) key = static_cast<uint32_t>(random.Int(0, UINT32_MAX));
    c.dropout_keys = Exact(keys);
    c.dropout = static_cast<int>(random.Pick<int64_t>({1, 26, 128, 255, random.Int(1, 255)}));
  }
}

void Poison(Random& random, Lists& lists, int64_t n_tiles, int64_t times) {
  const int64_t leading = lists.batch * lists.heads;
  for (int64_t t = 0; t < times; ++t) {
    const int64_t at_row = random.Int(0, leading * (lists.rows + 1) - 1);
    const int32_t wild = random.Pick<int32_t>({-1, -2, INT32_MIN, INT32_MAX, static_cast<int32_t>(lists.capacity + 1)});
    if (random.Chance(0.4) || lists.capacity == 0) {
      lists.offsets[at_row] = wild;
    } else {
      const int64_t at = random.Int(0, leading * lists.capacity - 1);
      if (random.Chance(0.5)) {
        lists.ids[at] = random.Chance(0.5) ? static_cast<int32_t>(lists.ids_end) : wild;
      } else {
        lists.tiles[at] = random.Chance(0.5) ? static_cast<int32_t>(n_tiles) : std::min(wild, -2);
      }
    }
  }
}

// Any offsets: rows have entries in common, and some have nearly all.
void Scramble(Random& random, Lists& lists) {
  for (int64_t i = 0; i < lists.batch * lists.heads * (lists.rows + 1); ++i) {
    lists.offsets[i] = static_cast<int32_t>(random.Int(0, lists.capacity));
  }
}

void SetLists(Random& random, Case& c, bool poisoned, double density) {
  const Shape& s = c.shape;
  const int64_t batch = random.Chance(0.5) ? 1 : s.batch;
  const int64_t heads = random.Chance(0.5) ? 1 : s.heads;
  std::vector<Rows> rows(batch * heads, Rows(s.q_blocks)), cols(batch * heads, Rows(s.kv_blocks));
  for (Rows& of_head : rows) {
    for (auto& row : of_head) {
      if (random.Chance(0.1)) continue;  // an empty row
      for (int64_t j = 0; j < s.kv_blocks; ++j) {
        if (!random.Chance(density)) continue;
        const bool full = c.n_tiles == 0 || random.Chance(0.5);
        row.push_back({static_cast<int32_t>(j), full ? -1 : static_cast<int32_t>(random.Int(0, c.n_tiles - 1))});
      }
    }
  }
  const int64_t slack = random.Int(0, 3);
  c.rows = MakeLists(rows, batch, heads, s.kv_blocks, slack);
  if (poisoned) Poison(random, c.rows, c.n_tiles, random.Int(1, 3));
  for (int64_t l = 0; l < batch * heads; ++l) {
    for (int64_t i = 0; i < s.q_blocks; ++i) {
      if (Broken(c.rows, c.n_tiles, l, i)) continue;
      const int32_t* offsets = c.rows.offsets.get() + l * (s.q_blocks + 1) + i;
      for (int64_t e = l * c.rows.capacity + offsets[0]; e < l * c.rows.capacity + offsets[1]; ++e) {
        cols[l][c.rows.ids[e]].push_back({static_cast<int32_t>(i), c.rows.tiles[e]});
      }
    }
  }
  c.cols = MakeLists(cols, batch, heads, s.q_blocks, slack);
  if (poisoned && s.kv_blocks > 0) Poison(random, c.cols, c.n_tiles, random.Int(0, 2));
}

Case MakeCase(uint64_t seed) {
  Random random(seed);
  Case c;
  Shape& s = c.shape;
  s.batch = random.Int(1, 2);
  s.kv_heads = random.Int(1, 2);
  s.heads = s.kv_heads * random.Pick<int64_t>({1, 1, 2, 3});
  s.q_len = random.Pick<int64_t>({1, 17, 63, 64, 65, 128, 192, random.Int(1, 300), random.Int(0, 20)});
  s.kv_len = random.Chance(0.4) ? s.q_len : random.Pick<int64_t>({1, 31, 64, 127, 129, random.Int(1, 400), 0});
  s.head_dim = random.Pick<int64_t>({1, 3, 8, 16, 17, 32, 40, 64, 64, 80, 96, 100, 128, 192, 256});
  s.value_dim = random.Chance(0.6) ? s.head_dim : random.Pick<int64_t>({1, 5, 16, 33, 64, 72, 128, 256});
  s.block_q = random.Pick<int64_t>({32, 64, 64, 64, 96, 128, 128, 256});
  s.block_kv = random.Chance(0.6) ? s.block_q : random.Pick<int64_t>({32, 64, 96, 128, 160, 256});
  s.q_blocks = (s.q_len + s.block_q - 1) / s.block_q;
  s.kv_blocks = (s.kv_len + s.block_kv - 1) / s.block_kv;
  c.dtype = random.Pick<DType>({DType::kF32, DType::kF32, DType::kBF16, DType::kF16, DType::kF64});
  const int64_t q_rows = s.batch * s.q_len * s.heads, kv_rows = s.batch * s.kv_len * s.kv_heads;
  c.query = random.Normals(c.dtype, q_rows * s.head_dim);
  c.key = random.Normals(c.dtype, kv_rows * s.head_dim);
  c.value = random.Normals(c.dtype, kv_rows * s.value_dim);
  c.dout = random.Normals(c.dtype, q_rows * s.value_dim);
  c.scale = random.Pick<double>({1, 1, 1, 40, -1}) / std::sqrt(s.head_dim);
  if (c.dtype != DType::kF64) c.scale = static_cast<float>(c.scale);
  c.soft_cap = random.Pick<float>({0, 0, 0, 2, 30});
  if (random.Chance(0.25)) {
    Spoil(random, c.query, random.Int(0, 2));
    Spoil(random, c.key, random.Int(0, 2));
    Spoil(random, c.value, random.Int(0, 2));
    Spoil(random, c.dout, random.Int(0, 2));
  }

  c.n_tiles = random.Int(0, 4);
  c.tiles_batch = random.Chance(0.5) ? 1 : s.batch;
  c.tiles_heads = random.Chance(0.5) ? 1 : s.heads;
  std::vector<uint32_t> words(c.tiles_batch * c.tiles_heads * c.n_tiles * s.block_q * s.block_kv / 32);
  const int kind = random.Int(0, 3);
  for (uint32_t& word : words) {
    word = static_cast<uint32_t>(random.Int(0, UINT32_MAX));
    if (kind == 1) word &= word >> 7 & static_cast<uint32_t>(random.Int(0, UINT32_MAX));
    if (kind == 2 && random.Chance(0.7)) word = 0;
  }
  c.words = Exact(words);
  SetLists(random, c, random.Chance(0.25), random.Pick<double>({0.1, 0.5, 0.9, 1}));
  SetGates(random, c);

  Random others(seed + (uint64_t{1} << 32));  // so that the other cases stay what they are
  if (others.Chance(0.1)) Scramble(others, c.rows);
  if (others.Chance(0.1)) Scramble(others, c.cols);
  SetExtras(seed, c);

  c.lengths_batch = random.Chance(0.5) ? 1 : s.batch;
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < c.lengths_batch; ++b) {
    const bool whole = random.Chance(0.5);
    lengths.push_back(whole ? s.q_len : random.Int(-1, s.q_len + 1));
    lengths.push_back(whole ? s.kv_len : random.Int(-1, s.kv_len + 1));
  }
  c.lengths = Exact(lengths);
  c.sinks_batch = random.Chance(0.5) ? 1 : s.batch;
  c.sinks_heads = random.Chance(0.5) ? 1 : s.heads;
  if (random.Chance(0.4)) {
    c.sinks = random.Normals(Statistics(c.dtype), c.sinks_batch * c.sinks_heads);
    if (random.Chance(0.3)) c.sinks.Set(0, c.sinks[0] < 0 ? -kInf : kInf);
  }
  c.out = Array(c.dtype, c.dout.size);
  c.got_lse = Array(Statistics(c.dtype), q_rows);
  c.got_lse_rest = Array(Statistics(c.dtype), q_rows);
  c.dquery = Array(c.dtype, c.query.size);
  c.dkey = Array(c.dtype, c.key.size);
  c.dvalue = Array(c.dtype, c.value.size);
  return c;
}

// --- The same in float64, pair by pair
// --------------------------------------------------------------------------------

// Expected values with the size of the terms they are sums of, which the permitted error is proportional to.
struct Expected {
  std::vector<double> value, terms;
  std::vector<char> tainted;  // per row: something not finite reaches it; what exactly it becomes is not compared
  int64_t width;

  Expected(int64_t rows, int64_t width) : value(rows * width), terms(rows * width), tainted(rows), width(width) {}
  void Add(int64_t row, int64_t column, double term) {
    value[row * width + column] += term;
    terms[row * width + column] += std::fabs(term);
  }
  void SetRow(int64_t row, double x) {
    for (int64_t d = 0; d < width; ++d) value[row * width + d] = x;
  }
};

// A key that a query attends to, with the gate and the tile of the bias of their block.
struct Visit {
  int64_t key;
  double gate;
  int32_t bias_tile;
};

// A factor of dropout, by the words of ../../csrc/attention/dropout.h.
double Kept(const Case& c, int64_t b, int64_t h, int64_t query, int64_t key) {
  if (c.dropout == 0) return 1;
  const auto mix = [](uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  };
  const auto place = [](int64_t x) { return static_cast<uint32_t>(x / 16 * 8 + x % 8); };
  const uint64_t of_query = mix(c.dropout_keys[b * c.shape.heads + h] + 0x9e3779b9u * (place(query) + 1));
  const uint64_t first = of_query * mix(place(key) + 0x85ebca6bu), second = (first & 0xFFFFFFFFu) * (first >> 32);
  const uint32_t word = static_cast<uint32_t>(second) ^ static_cast<uint32_t>(second >> 32);
  const int byte = static_cast<int>(query / 8 % 2 + 2 * (key / 8 % 2));
  return static_cast<int>(word >> (8 * byte) & 255) < c.dropout ? 0 : 256.0 / (256 - c.dropout);
}

struct Reference {
  const Case& c;
  const Shape& s;
  const double none;  // the log-sum-exp of a query that attends to nothing
  Expected out, lse, dquery, dkey, dvalue, dgates, ddense, ddistances, dtiles;

  explicit Reference(const Case& c)
      : c(c),
        s(c.shape),
        none(c.dtype == DType::kF64 ? kNoLogSumExp<double> : kNoLogSumExp<float>),
        out(s.batch * s.q_len * s.heads, s.value_dim),
        lse(s.batch * s.heads * s.q_len, 1),
        dquery(s.batch * s.q_len * s.heads, s.head_dim),
        dkey(s.batch * s.kv_len * s.kv_heads, s.head_dim),
        dvalue(s.batch * s.kv_len * s.kv_heads, s.value_dim),
        dgates(c.dgates.size, 1),
        ddense(c.ddense.size, 1),
        ddistances(c.bias.distances.size, 1),
        dtiles(c.dtiles.size, 1) {}

  int64_t QueryRow(int64_t b, int64_t t, int64_t h) const { return (b * s.q_len + t) * s.heads + h; }
  int64_t KeyRow(int64_t b, int64_t k, int64_t h) const {
    return (b * s.kv_len + k) * s.kv_heads + h / (s.heads / s.kv_heads);
  }
  bool BadRow(const Array& array, int64_t row, int64_t width) const {
    for (int64_t d = 0; d < width; ++d) {
      if (!std::isfinite(array[row * width + d])) return true;
    }
    return false;
  }
  // A pair's element of each term; -1 where it has none.
  int64_t DenseElement(int64_t b, int64_t h, int64_t t, int64_t key) const {
    if (c.bias.dense.size == 0) return -1;
    const int64_t* const dims = c.bias.dense_dims;
    return (Leading(dims[0], dims[1], b, h) * dims[2] + (dims[2] == 1 ? 0 : t)) * dims[3] + (dims[3] == 1 ? 0 : key);
  }
  int64_t DistanceElement(int64_t b, int64_t h, int64_t t, int64_t key) const {
    if (c.bias.distances.size == 0) return -1;
    const int64_t* const dims = c.bias.distances_dims;
    return Leading(dims[0], dims[1], b, h) * (s.q_len + s.kv_len - 1) + key - t + s.q_len - 1;
  }
  int64_t TileElement(int64_t b, int64_t h, int64_t t, int64_t key, int32_t tile) const {
    if (c.bias.tiles.size == 0 || tile < 0) return -1;
    const int64_t* const dims = c.bias.tiles_dims;
    const int64_t index = Leading(dims[0], dims[1], b, h) * dims[2] + std::min<int64_t>(tile, dims[2] - 1);
    return (index * dims[3] + (dims[3] == 1 ? 0 : t % s.block_q)) * dims[4] + (dims[4] == 1 ? 0 : key % s.block_kv);
  }
  // The bias of a pair; with -inf it does not attend. `terms` becomes the sum of the absolute terms.
  double BiasOf(int64_t b, int64_t h, int64_t t, int64_t key, int32_t tile, double& terms) const {
    double sum = terms = 0;
    for (const auto& [array, at] : {std::pair{&c.bias.dense, DenseElement(b, h, t, key)},
                                    {&c.bias.distances, DistanceElement(b, h, t, key)},
                                    {&c.bias.tiles, TileElement(b, h, t, key, tile)}}) {
      if (at < 0) continue;
      sum += (*array)[at];
      terms += std::fabs((*array)[at]);
    }
    return sum;
  }
  bool IsMasked(int64_t b, int64_t h, int64_t t, int64_t key, int32_t tile) const {
    double terms;
    return BiasOf(b, h, t, key, tile, terms) == -kInf;
  }
  // Without the bias. `terms` becomes the sum of the absolute terms.
  double Logit(int64_t q, int64_t k, double& terms) const {
    double sum = terms = 0;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const double term = c.scale * c.query[q * s.head_dim + d] * c.key[k * s.head_dim + d];
      sum += term;
      terms += std::fabs(term);
    }
    return c.soft_cap != 0 ? c.soft_cap * std::tanh(sum / c.soft_cap) : sum;
  }
  bool Allowed(int64_t b, int64_t h, int32_t tile, int64_t query, int64_t key) const {
    if (tile < 0) return true;
    const int64_t index = Leading(c.tiles_batch, c.tiles_heads, b, h) * c.n_tiles + tile;
    return c.words[(index * s.block_q + query) * (s.block_kv / 32) + key / 32] >> (key % 32) & 1;
  }
  // Keys that query t attends to, from the query-major list.
  std::vector<Visit> Keys(int64_t b, int64_t h, int64_t t) const {
    std::vector<Visit> keys;
    const int64_t leading = Leading(c.rows.batch, c.rows.heads, b, h);
    const int32_t* offsets = c.rows.offsets.get() + leading * (s.q_blocks + 1) + t / s.block_q;
    for (int64_t i = offsets[0]; i < offsets[1]; ++i) {
      const int64_t e = leading * c.rows.capacity + i;
      const double gate = c.gated ? c.gates[(b * s.heads + h) * c.rows.capacity + i] : 1;
      for (int64_t k = 0; k < s.block_kv; ++k) {
        const int64_t key = c.rows.ids[e] * s.block_kv + k;
        const int32_t tile = c.bias.row_tiles != nullptr ? c.bias.row_tiles[e] : -1;
        if (key < c.KeyLength(b) && Allowed(b, h, c.rows.tiles[e], t % s.block_q, k) && !IsMasked(b, h, t, key, tile)) {
          keys.push_back({key, gate, tile});
        }
      }
    }
    return keys;
  }

  void Forward() {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t t = 0; t < s.q_len; ++t) ForwardRow(b, h, t);
  }
  void ForwardRow(int64_t b, int64_t h, int64_t t) {
    const int64_t q = QueryRow(b, t, h);
    double& row_lse = lse.value[(b * s.heads + h) * s.q_len + t];
    double& lse_terms = lse.terms[(b * s.heads + h) * s.q_len + t];
    row_lse = none;
    if (t >= c.QueryLength(b)) return;
    if (Broken(c.rows, c.n_tiles, Leading(c.rows.batch, c.rows.heads, b, h), t / s.block_q)) {
      row_lse = kNaN;
      return out.SetRow(q, kNaN);
    }
    const std::vector<Visit> keys = Keys(b, h, t);
    std::vector<double> logits;
    const double sink = c.sinks.size > 0 ? c.sinks[Leading(c.sinks_batch, c.sinks_heads, b, h)] : -kInf;
    double maximum = sink, largest = 0;
    bool bad_lse = !keys.empty() && BadRow(c.query, q, s.head_dim), bad = bad_lse;
    for (const auto [k, gate, tile] : keys) {
      double terms, bias_terms;
      const double bias = BiasOf(b, h, t, k, tile, bias_terms);
      logits.push_back(Logit(q, KeyRow(b, k, h), terms) + bias);
      maximum = std::fmax(maximum, logits.back());
      largest = std::fmax(largest, terms + bias_terms);
      bad_lse |= BadRow(c.key, KeyRow(b, k, h), s.head_dim) || !std::isfinite(bias);
      bad |= bad_lse || BadRow(c.value, KeyRow(b, k, h), s.value_dim) || !std::isfinite(gate);
    }
    out.tainted[q] = bad;
    lse.tainted[(b * s.heads + h) * s.q_len + t] = bad_lse;
    if (maximum == -kInf) return;
    const auto share = [&](double logit) { return sink == kInf ? 0 : std::exp(logit - maximum); };
    double sum = sink == kInf ? 1 : share(sink);
    for (double logit : logits) sum += share(logit);
    row_lse = maximum + std::log(sum);
    lse_terms = sink == kInf ? 0 : 1 + largest + std::fabs(row_lse);
    for (size_t n = 0; n < keys.size(); ++n) {
      const double p = keys[n].gate * Kept(c, b, h, t, keys[n].key) * share(logits[n]) / sum;
      for (int64_t d = 0; d < s.value_dim; ++d) out.Add(q, d, p * c.value[KeyRow(b, keys[n].key, h) * s.value_dim + d]);
    }
    for (int64_t d = 0; d < s.value_dim; ++d) out.terms[q * s.value_dim + d] *= 1 + largest;
  }

  // Statistics for the backward, rounded as the caller would hand them over.
  void SetStatistics(Case& to) const {
    to.lse = Array(Statistics(c.dtype), lse.value.size());
    to.lse_rest = Array(Statistics(c.dtype), lse.value.size());
    to.delta = Array(Statistics(c.dtype), lse.value.size());
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t t = 0; t < s.q_len; ++t) {
          const int64_t i = (b * s.heads + h) * s.q_len + t, q = QueryRow(b, t, h);
          double sum = 0;
          for (int64_t d = 0; d < s.value_dim; ++d) sum += c.dout[q * s.value_dim + d] * out.value[q * s.value_dim + d];
          to.lse.Set(i, lse.value[i]);
          to.lse_rest.Set(i, std::isfinite(lse.value[i]) ? lse.value[i] - to.lse[i] : 0);
          to.delta.Set(i, sum);
        }
  }

  void Backward() {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t t = 0; t < c.QueryLength(b); ++t) {
          if (Broken(c.rows, c.n_tiles, Leading(c.rows.batch, c.rows.heads, b, h), t / s.block_q)) {
            dquery.SetRow(QueryRow(b, t, h), kNaN);
            SpoilBias(b, h, t);
            continue;
          }
          for (const Visit& visit : Keys(b, h, t)) PairOfQuery(b, h, t, visit);
        }
        const int64_t leading = Leading(c.cols.batch, c.cols.heads, b, h);
        const int64_t first_gate = (b * s.heads + h) * c.cols.capacity;
        std::vector<int> owners(c.cols.capacity);
        for (int64_t j = 0; j < s.kv_blocks; ++j) {
          const int64_t end = std::min((j + 1) * s.block_kv, c.KeyLength(b));
          if (Broken(c.cols, c.n_tiles, leading, j)) {
            for (int64_t k = j * s.block_kv; k < end; ++k) broken_keys.push_back(KeyRow(b, k, h));
            for (int64_t i = Begin(leading, j); i < End(leading, j); ++i) {
              owners[i]++;
              if (c.gated && j * s.block_kv < end) dgates.value[first_gate + i] = kNaN;
            }
            continue;
          }
          const int32_t* offsets = c.cols.offsets.get() + leading * (s.kv_blocks + 1) + j;
          for (int64_t i = offsets[0]; i < offsets[1]; ++i) {
            const int64_t e = leading * c.cols.capacity + i;
            owners[i]++;
            for (int64_t k = j * s.block_kv; k < end; ++k)
              for (int64_t r = 0; r < s.block_q; ++r) {
                const int64_t t = c.cols.ids[e] * s.block_q + r;
                const int32_t tile = c.bias.col_tiles != nullptr ? c.bias.col_tiles[e] : -1;
                if (t < c.QueryLength(b) && Allowed(b, h, c.cols.tiles[e], r, k % s.block_kv) &&
                    !IsMasked(b, h, t, k, tile)) {
                  PairOfKey(b, h, t, k, c.gated ? first_gate + i : -1, tile);
                }
              }
          }
        }
        for (int64_t i = 0; c.gated && i < c.cols.capacity; ++i) {
          if (owners[i] == 1) continue;
          dgates.value[first_gate + i] = owners[i] == 0 ? 0 : kNaN;
          dgates.tainted[first_gate + i] = s.kv_blocks == 0;  // with no column nobody writes
        }
      }
    for (int64_t row : broken_keys) {
      dkey.SetRow(row, kNaN);
      dvalue.SetRow(row, kNaN);
      dkey.tainted[row] = dvalue.tainted[row] = false;
    }
    for (const auto& [gradient, at] : spoiled) {
      gradient->value[at] = kNaN;
      gradient->tainted[at] = false;
    }
  }
  // A row that cannot be followed: NaN for the dense term's elements of its block of queries, and for all elements of
  // the other terms' example and head.
  void SpoilBias(int64_t b, int64_t h, int64_t t) {
    const auto all = [&](Expected& gradient, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) spoiled.push_back({&gradient, first + i});
    };
    const int64_t* const dims = c.bias.dense_dims;
    const int64_t first = t / s.block_q * s.block_q;
    for (int64_t r = first; r < std::min(first + s.block_q, s.q_len); ++r) {
      if (const int64_t at = DenseElement(b, h, r, 0); at >= 0) all(ddense, at, dims[3]);
    }
    const int64_t distances = s.q_len + s.kv_len - 1;
    if (c.bias.distances.size > 0) {
      all(ddistances, Leading(c.bias.distances_dims[0], c.bias.distances_dims[1], b, h) * distances, distances);
    }
    const int64_t* const tiles = c.bias.tiles_dims;
    const int64_t elements = tiles[2] * tiles[3] * tiles[4];
    if (c.bias.tiles.size > 0) all(dtiles, Leading(tiles[0], tiles[1], b, h) * elements, elements);
  }
  std::vector<std::pair<Expected*, int64_t>> spoiled;
  std::vector<int64_t> broken_keys;

  // Entries of a column, none where its offsets cannot be true.
  int64_t Begin(int64_t leading, int64_t j) const { return c.cols.offsets[leading * (s.kv_blocks + 1) + j]; }
  int64_t End(int64_t leading, int64_t j) const {
    const int64_t begin = Begin(leading, j), end = Begin(leading, j + 1);
    return begin < 0 || end > c.cols.capacity ? begin : end;
  }

  struct PairTerms {
    double p, dlogit, dlogit_terms, ds, ds_terms, dp, dp_terms, growth;
    bool bad;  // something not finite reaches the gradients, beside the gate
  };

  // `gate` is with dropout's factor.
  PairTerms Terms(int64_t b, int64_t h, int64_t t, int64_t key, double gate, int32_t tile) const {
    const int64_t q = QueryRow(b, t, h), k = KeyRow(b, key, h), i = (b * s.heads + h) * s.q_len + t;
    const double row_lse = c.lse[i] + c.lse_rest[i], delta = c.delta[i];
    double logit_terms, bias_terms;
    const double capped = Logit(q, k, logit_terms), bias = BiasOf(b, h, t, key, tile, bias_terms);
    const double logit = capped + bias;
    logit_terms += bias_terms;
    PairTerms x{};
    // At most 1, as in the kernels: of lists whose two orders differ a logit may be above its row's log-sum-exp.
    x.p = row_lse == none ? 0 : std::exp(logit > row_lse ? 0 : logit - row_lse);
    for (int64_t d = 0; d < s.value_dim; ++d) {
      const double term = c.dout[q * s.value_dim + d] * c.value[k * s.value_dim + d];
      x.dp += term;
      x.dp_terms += std::fabs(term);
    }
    const double chain = c.soft_cap != 0 ? 1 - std::pow(capped / c.soft_cap, 2) : 1;
    x.dlogit = x.p * (gate * x.dp - delta);
    x.ds = x.dlogit * chain * c.scale;
    // The error of dS: that of P, relative, from the size of logit and lse; that of dP from its terms.
    x.growth = 1 + logit_terms + std::fabs(row_lse == none || row_lse == kInf ? 0 : row_lse);
    x.dlogit_terms = x.p * (std::fabs(gate) * x.dp_terms + std::fabs(delta)) * x.growth;
    x.ds_terms = x.dlogit_terms * std::fabs(c.scale);
    x.bad = BadRow(c.query, q, s.head_dim) || BadRow(c.dout, q, s.value_dim) || BadRow(c.key, k, s.head_dim) ||
            BadRow(c.value, k, s.value_dim) || !std::isfinite(delta) || std::isnan(row_lse) || !std::isfinite(bias);
    return x;
  }
  static void AddTo(Expected& to, int64_t row, const Array& from, int64_t other, double factor, double size) {
    for (int64_t d = 0; d < to.width; ++d) {
      to.value[row * to.width + d] += factor * from[other * to.width + d];
      to.terms[row * to.width + d] += size * std::fabs(from[other * to.width + d]);
    }
  }
  void PairOfQuery(int64_t b, int64_t h, int64_t t, const Visit& visit) {
    const int64_t q = QueryRow(b, t, h);
    const PairTerms x = Terms(b, h, t, visit.key, visit.gate * Kept(c, b, h, t, visit.key), visit.bias_tile);
    AddTo(dquery, q, c.key, KeyRow(b, visit.key, h), x.ds, x.ds_terms);
    dquery.tainted[q] |= x.bad || !std::isfinite(visit.gate);
    for (const auto& [gradient, at] : {std::pair{&ddense, DenseElement(b, h, t, visit.key)},
                                       {&ddistances, DistanceElement(b, h, t, visit.key)},
                                       {&dtiles, TileElement(b, h, t, visit.key, visit.bias_tile)}}) {
      if (at < 0) continue;
      gradient->value[at] += x.dlogit;
      gradient->terms[at] += x.dlogit_terms;
      gradient->tainted[at] |= x.bad || !std::isfinite(visit.gate);
    }
  }
  // `entry` says which gate, -1 for none.
  void PairOfKey(int64_t b, int64_t h, int64_t t, int64_t key, int64_t entry, int32_t tile) {
    const int64_t q = QueryRow(b, t, h), k = KeyRow(b, key, h);
    const double kept = Kept(c, b, h, t, key), gate = (entry < 0 ? 1 : c.col_gates[entry]) * kept;
    const PairTerms x = Terms(b, h, t, key, gate, tile);
    AddTo(dkey, k, c.query, q, x.ds, x.ds_terms);
    AddTo(dvalue, k, c.dout, q, gate * x.p, std::fabs(gate) * x.p * x.growth);
    dkey.tainted[k] |= x.bad || !std::isfinite(gate);
    dvalue.tainted[k] |= x.bad || !std::isfinite(gate);
    if (entry < 0) return;
    dgates.value[entry] += kept * x.p * x.dp;
    dgates.terms[entry] += kept * x.p * x.dp_terms * x.growth;
    dgates.tainted[entry] |= x.bad;
  }
};

// --- Comparison
// -------------------------------------------------------------------------------------------------------

bool Compare(const char* name, const Expected& want, const Array& got, DType computed) {
  for (int64_t i = 0; i < got.size; ++i) {
    const double x = got[i], y = want.value[i];
    if (want.tainted[i / want.width]) {
      if (std::isnan(y) && std::isfinite(x)) {
        std::printf("%s[%ld]: %g where NaN is due\n", name, i, x);
        return false;
      }
      continue;
    }
    const double allowed = jax_bsk::check::Allowed(got.dtype, computed, y, want.terms[i]);
    const bool same = std::isnan(y) ? std::isnan(x) : (x == y || std::fabs(x - y) <= allowed);
    if (!same) {
      std::printf("%s[%ld]: %.9g instead of %.9g (allowed error %.3g)\n", name, i, x, y, allowed);
      return false;
    }
  }
  return true;
}

void RunForward(Case& c, int workers) {
  const ForwardParams params = c.Forward();
  Run(params, cpu::ForwardTasks(params), cpu::RunForwardTasks, workers);
}

void RunBackward(Case& c, int workers) {
  const BackwardParams params = c.Backward();
  Run(params, cpu::BackwardTasks(params), cpu::RunBackwardTasks, workers);
}

void RunBiasGradient(Case& c, BiasTerm term, int workers) {
  const BiasGradientParams params = c.BiasGradient(term);
  Run(params, cpu::BiasGradientTasks(params), cpu::RunBiasGradientTasks, workers);
}

// The gradient of each term that is given, against `reference`, whose backward is done.
bool CheckBiasGradients(Case& c, const Reference& reference) {
  struct Gradient {
    const char* name;
    BiasTerm term;
    const Expected& expected;
    Array& got;
  };
  bool good = true;
  for (const Gradient& gradient : {Gradient{"ddense", BiasTerm::kDense, reference.ddense, c.ddense},
                                   {"ddistances", BiasTerm::kDistances, reference.ddistances, c.ddistances},
                                   {"dtiles", BiasTerm::kTiles, reference.dtiles, c.dtiles}}) {
    if (gradient.got.size == 0) continue;
    RunBiasGradient(c, gradient.term, 1);
    if (gradient.term == BiasTerm::kDistances) {
      Array sums(gradient.got.dtype, c.bias.distances.size);
      const int64_t count = c.shape.q_len + c.shape.kv_len - 1;
      for (int64_t i = 0; i < sums.size; ++i) {
        const int64_t first = i / count * 2 * count + i % count;
        sums.Set(i, gradient.got[first] + gradient.got[first + count]);
      }
      good = good && Compare(gradient.name, gradient.expected, sums, c.dtype);
    } else {
      good = good && Compare(gradient.name, gradient.expected, gradient.got, c.dtype);
    }
    good = good && Repeats(gradient.name, gradient.got, [&](int n) { RunBiasGradient(c, gradient.term, n); });
  }
  return good;
}

bool Check(uint64_t seed) {
  Case c = MakeCase(seed);
  Reference reference(c);
  reference.Forward();
  RunForward(c, 1);
  bool good = Compare("out", reference.out, c.out, c.dtype) && Compare("lse", reference.lse, c.got_lse, c.dtype);
  reference.SetStatistics(c);
  reference.Backward();
  RunBackward(c, 1);
  good = good && Compare("dquery", reference.dquery, c.dquery, c.dtype);
  good = good && Compare("dkey", reference.dkey, c.dkey, c.dtype);
  good = good && Compare("dvalue", reference.dvalue, c.dvalue, c.dtype);
  good = good && Compare("dgates", reference.dgates, c.dgates, c.dtype);
  good = good && Repeats("out", c.out, [&](int workers) { RunForward(c, workers); }) &&
         Repeats("dquery", c.dquery, [&](int workers) { RunBackward(c, workers); }) &&
         Repeats("dkey", c.dkey, [&](int workers) { RunBackward(c, workers); }) &&
         (!c.gated || Repeats("dgates", c.dgates, [&](int workers) { RunBackward(c, workers); })) &&
         CheckBiasGradients(c, reference);
  if (!good) {
    const Shape& s = c.shape;
    std::printf(
        "seed %lu: B %ld T %ld S %ld N %ld K %ld H %ld Hv %ld blocks %ld x %ld dtype %d cap %g scale %g %s%s%s%s "
        "dropout %d\n",
        seed, s.batch, s.q_len, s.kv_len, s.heads, s.kv_heads, s.head_dim, s.value_dim, s.block_q, s.block_kv,
        static_cast<int>(c.dtype), c.soft_cap, c.scale, c.gated ? "gated" : "", c.ddense.size > 0 ? " dense" : "",
        c.ddistances.size > 0 ? " distances" : "", c.dtiles.size > 0 ? " tiles" : "", c.dropout);
  }
  return good;
}

// --- Timing
// -----------------------------------------------------------------------------------------------------------

// A causal window: each row of blocks visits the diagonal and `window` blocks before it, the first and the last
// partial.
void Time(const char* title, DType dtype, int64_t heads, int64_t kv_heads, int64_t length, int64_t dim, int64_t block,
          int64_t window, float soft_cap, bool gated = false, bool biased = false) {
  Random random(1);
  Case c;
  const int64_t n = (length + block - 1) / block;
  c.shape = {1, length, length, heads, kv_heads, dim, dim, block, block, n, n};
  c.dtype = dtype;
  c.query = random.Normals(dtype, length * heads * dim);
  c.key = random.Normals(dtype, length * kv_heads * dim);
  c.value = random.Normals(dtype, length * kv_heads * dim);
  c.dout = random.Normals(dtype, length * heads * dim);
  c.scale = static_cast<float>(1 / std::sqrt(dim));
  c.soft_cap = soft_cap;
  c.tiles_batch = c.tiles_heads = c.lengths_batch = 1;
  c.n_tiles = 2;
  std::vector<uint32_t> words(2 * block * block / 32);
  for (int64_t r = 0; r < block; ++r) {
    for (int64_t k = 0; k < block; ++k) words[((k > r) * block + r) * (block / 32) + k / 32] |= 1u << (k % 32);
  }
  c.words = Exact(words);
  c.lengths = Exact<int32_t>({static_cast<int32_t>(length), static_cast<int32_t>(length)});
  Rows rows(n), cols(n);
  int64_t visited = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = std::max<int64_t>(0, i - window); j <= i; ++j, ++visited) {
      const int32_t tile = j == i ? 0 : j == i - window ? 1 : -1;
      rows[i].push_back({static_cast<int32_t>(j), tile});
      cols[j].push_back({static_cast<int32_t>(i), tile});
    }
  }
  c.rows = MakeLists({rows}, 1, 1, n, 0);
  c.cols = MakeLists({cols}, 1, 1, n, 0);
  c.out = Array(dtype, c.dout.size);
  c.got_lse = Array(Statistics(dtype), heads * length);
  c.got_lse_rest = Array(Statistics(dtype), heads * length);
  c.lse = random.Normals(Statistics(dtype), heads * length);
  c.lse_rest = random.Normals(Statistics(dtype), heads * length);
  c.delta = random.Normals(Statistics(dtype), heads * length);
  c.dquery = Array(dtype, c.query.size);
  c.dkey = Array(dtype, c.key.size);
  c.dvalue = Array(dtype, c.value.size);
  if (biased) {
    c.bias.distances_dims[0] = 1, c.bias.distances_dims[1] = heads;
    c.bias.distances = random.Normals(Statistics(dtype), heads * (2 * length - 1));
  }
  c.gated = gated;
  if (gated) {
    c.gates = random.Normals(Statistics(dtype), heads * c.rows.capacity);
    c.col_gates = random.Normals(Statistics(dtype), heads * c.cols.capacity);
    c.dgates = Array(Statistics(dtype), heads * c.cols.capacity);
  }

  RunForward(c, 1);
  std::memcpy(c.lse.data.get(), c.got_lse.data.get(), heads * length * Size(Statistics(dtype)));
  std::memcpy(c.lse_rest.data.get(), c.got_lse_rest.data.get(), heads * length * Size(Statistics(dtype)));
  const double flops = 4.0 * heads * dim * visited * block * block;
  std::printf("%-34s %3.0f %% of blocks:", title, 100.0 * visited / (n * n));
  for (int workers = 1; workers <= 2; ++workers) {
    for (int backward = 0; backward < 2; ++backward) {
      const double best = BestSeconds([&] { backward ? RunBackward(c, workers) : RunForward(c, workers); });
      std::printf("  %s x%d %6.1f GFLOP/s", backward ? "bwd" : "fwd", workers,
                  (backward ? 2.5 : 1) * flops / best * 1e-9);
    }
  }
  std::printf("\n");
}

}  // namespace

// That KeptBytes says of each byte what IsDropped says, for every threshold and byte, whatever lies beside it.
bool CheckKeptBytes() {
  bool right = true;
  for (int threshold = 1; threshold < 256; ++threshold)
    for (uint32_t byte = 0; byte < 256; ++byte)
      for (const uint32_t others : {0u, 255u, 128u, 255 - byte})
        for (int at = 0; at < 4; ++at) {
          const uint32_t around = others * 0x01010101u & ~(255u << 8 * at), word = around | byte << 8 * at;
          const auto bytes = KeptBytes::Of(threshold);
          const bool kept = (bytes.Flags(word) ^ bytes.flip) >> (8 * at + 7) & 1;
          right &= kept == !IsDropped(word, at, threshold);
        }
  if (!right) std::printf("KeptBytes: FAILED\n");
  return right;
}

int main(int argc, char** argv) {
  int64_t cases = 300;
  uint64_t seed = 0;
  bool time = false;
  for (int a = 1; a < argc; ++a) {
    if (std::strcmp(argv[a], "--time") == 0) time = true;
    if (std::strcmp(argv[a], "--cases") == 0 && a + 1 < argc) cases = std::atoll(argv[++a]);
    if (std::strcmp(argv[a], "--seed") == 0 && a + 1 < argc) seed = std::strtoull(argv[++a], nullptr, 10);
  }
  std::printf("instruction set: %s\n", cpu::InstructionSet());
  if (time) {
    Time("float32 H8 S4096 D64 block 64", DType::kF32, 8, 8, 4096, 64, 64, 15, 0);
    Time("float32 H8 S4096 D64 block 128", DType::kF32, 8, 8, 4096, 64, 128, 7, 0);
    Time("float32 H8 S4096 D128 block 64", DType::kF32, 8, 8, 4096, 128, 64, 15, 0);
    Time("float32 H8/2 S4096 D64 block 64", DType::kF32, 8, 2, 4096, 64, 64, 15, 0);
    Time("float32 H8 S4096 D64 soft cap", DType::kF32, 8, 8, 4096, 64, 64, 15, 30);
    Time("float32 H8 S4096 D64 gates", DType::kF32, 8, 8, 4096, 64, 64, 15, 0, true);
    Time("float32 H8 S4096 D64 distances", DType::kF32, 8, 8, 4096, 64, 64, 15, 0, false, true);
    Time("float32 H8 S4096 D64 causal", DType::kF32, 8, 8, 4096, 64, 64, 64, 0);
    Time("bfloat16 H8 S4096 D64 block 64", DType::kBF16, 8, 8, 4096, 64, 64, 15, 0);
    Time("float16 H8 S4096 D64 block 64", DType::kF16, 8, 8, 4096, 64, 64, 15, 0);
    Time("float64 H8 S4096 D64 block 64", DType::kF64, 8, 8, 4096, 64, 64, 15, 0);
    TimeDecode();
    TimeMatmul();
    return 0;
  }
  int64_t failed = !CheckKeptBytes();
  for (int64_t n = 0; n < cases; ++n) {
    failed += !Check(seed + n) + !CheckChoose(seed + n) + !CheckDecode(seed + n) + !CheckDelta(seed + n) +
              !CheckLists(seed + n) + !CheckMatmul(seed + n);
  }
  std::printf("%ld cases, %ld failed\n", cases, failed);
  return failed != 0;
}
