// Checks the CUDA kernels without XLA or Python: `cuda_check list` names the cases, `cuda_check NAME` runs one (run
// each in its own process: a fault then fails one case), `cuda_check all` runs every one, `cuda_check tree` says which
// sources it was built from. Each case of attention, which are in this file, runs on every forward and every backward
// kernel that can take it; the cases of other operations begin with their names. Results are compared with a plain
// float64 computation on the host; outputs start as NaN between guard bytes; every launch is repeated, on 1, 2, 3 and 7
// multiprocessors and on all (grid_limit.h), and must give the same bits, also from a captured CUDA graph.
// `regimes-FIRST-LAST` are random cases of attention by their seeds: tiles of every kind in random order. `time-*`
// cases print times. Exit status: 0 = passed, 1 = wrong, 3 = refused, 4 = a case does not end within its limit.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention/launch.h"
#include "cuda_check.h"
#include "source_tree.h"

namespace {

using namespace jax_bsk::attention;
using namespace jax_bsk::check;

enum class Pattern { kRandom, kCausal, kFull, kEmpty, kRegimes };
enum class Fault {
  kNone,
  kKey,
  kValue,
  kQuery,
  kDout,
  kInfValue,
  kBadId,
  kBadTile,
  kNegativeTile,
  kOffsets,
  kOverflow,
  kBadCol,
  kBadFirstCol,  // in the first table, not the last
  kDecreasing,   // offsets of rows, so that two have entries in common
  kDecreasingCols
};

struct Case {
  const char* name;
  DType dtype = DType::kBF16;
  int batch = 2, q_len = 300, kv_len = 333, heads = 4, kv_heads = 2, head_dim = 64, value_dim = 64;
  int block_q = 64, block_kv = 64;
  Pattern pattern = Pattern::kRandom;
  bool lengths = false, sinks = false, per_head = false, per_batch = false, gates = false;
  float scale = 0.f, soft_cap = 0.f;  // scale 0: 1 / sqrt(head_dim)
  Fault fault = Fault::kNone;
  float amplitude = 1.f;   // of the queries
  float jump = 0.f;        // added to the logits of two keys in the middle and near the end, see RunCase
  int jump_keys = 1;       // or of two runs of so many
  bool jump_back = false;  // near the beginning instead of the end: with a bias by distance the last keys come first
  uint32_t seed = 1234;
  int copies = 1;  // of every example: more tiles, the same reference
  // Terms of the bias: -1 for none, else which of their dimensions are not 1, as sums of
  static constexpr int kBatch = 1, kHeads = 2, kQueries = 4, kKeys = 8;
  int dense = -1, distances = -1, bias_tiles = -1;
  int distance_kind = -1;                           // see Extras; -1: all
  bool dense_wide = false, minus_infinity = false;  // the latter: in some of the dense bias, and in all of some rows
  int bias_tile_count = 0;                          // 0: a tile for each entry
  int dropout = 0;                                  // in 256ths

  bool HasBias() const { return dense >= 0 || distances >= 0 || bias_tiles >= 0; }
};

double Epsilon(DType dtype) {
  return dtype == DType::kF32 ? std::ldexp(1., -21) : dtype == DType::kF16 ? std::ldexp(1., -11) : std::ldexp(1., -8);
}

// Dense booleans and the lists made of them, [batch|1, heads|1, ...].
struct Mask {
  int batch, heads, q_blocks, kv_blocks, capacity = 0, tiles_count = 0;
  std::vector<uint8_t> dense;  // [batch, heads, q_len, kv_len]
  std::vector<int32_t> offsets, ids, tiles, col_offsets, col_ids, col_tiles;
  std::vector<int32_t> places, col_places;  // [batch, heads, q_blocks, kv_blocks]: of the block's entry in either list
  std::vector<uint8_t> poisoned;  // [batch, heads, q_blocks]: whether the row has an entry that cannot be true
  std::vector<uint32_t> words;    // [1, 1, count, block_q, block_kv / 32]
  double visited = 0;             // blocks of all (batch, head) pairs given
};

// What a row of blocks asks of the kernels, for Pattern::kRegimes. Kinds come in runs: rings fill with one of them.
enum class Work { kNothing, kPoisoned, kOneBlock, kBits, kSome, kMany, kCount };
Work NextWork(Work before, std::mt19937& rng) {
  std::uniform_real_distribution<double> uniform(0, 1);
  if (before != Work::kCount && uniform(rng) < 0.55) return before;
  return static_cast<Work>(rng() % static_cast<int>(Work::kCount));
}

// Makes an entry of a row one that cannot be true.
void Poison(Mask& mask, int table, int row, std::mt19937& rng) {
  const int32_t* offsets = &mask.offsets[table * (mask.q_blocks + 1) + row];
  if (offsets[0] == offsets[1]) return;
  mask.poisoned[table * mask.q_blocks + row] = 1;
  const size_t entry = size_t(table) * mask.capacity + offsets[0] + rng() % (offsets[1] - offsets[0]);
  switch (rng() % 4) {
    case 0:
      mask.ids[entry] = mask.kv_blocks;
      break;
    case 1:
      mask.ids[entry] = -1;
      break;
    case 2:
      mask.tiles[entry] = mask.tiles_count;
      break;
    default:
      mask.tiles[entry] = -2;
  }
}

Mask MakeMask(const Case& c, std::mt19937& rng, double density = 0.4) {
  Mask mask;
  mask.batch = c.per_batch ? c.batch : 1;
  mask.heads = c.per_head ? c.heads : 1;
  mask.q_blocks = (c.q_len + c.block_q - 1) / c.block_q;
  mask.kv_blocks = (c.kv_len + c.block_kv - 1) / c.block_kv;
  const int nq = mask.q_blocks, nk = mask.kv_blocks;
  mask.dense.assign(size_t(mask.batch) * mask.heads * c.q_len * c.kv_len, 0);
  mask.capacity = nq * nk + 3;
  std::uniform_real_distribution<double> uniform(0, 1);
  Work work = Work::kCount;
  std::vector<std::pair<int, int>> to_poison;  // table, row
  for (int table = 0; table < mask.batch * mask.heads; ++table) {
    std::vector<int> kind(nq * nk, -2);  // -2 absent, -1 full, else the tile
    for (int i = 0; i < nq; ++i) {
      if (c.pattern == Pattern::kRegimes) work = NextWork(work, rng);
      if (work == Work::kPoisoned) to_poison.emplace_back(table, i);
      const int only = c.pattern == Pattern::kRegimes ? static_cast<int>(rng() % nk) : 0;
      const bool empty_row = c.pattern == Pattern::kEmpty || (c.pattern == Pattern::kRandom && nq > 2 && i == 1);
      for (int j = 0; j < nk; ++j) {
        const double u = uniform(rng);
        std::vector<uint32_t> tile(c.block_q * c.block_kv / 32, 0);
        bool partial = false, present = false;
        if (c.pattern == Pattern::kCausal) {
          present = j * c.block_kv <= i * c.block_q + c.block_q - 1;
          partial = present && j * c.block_kv + c.block_kv - 1 > i * c.block_q;
          for (int r = 0; partial && r < c.block_q; ++r)
            for (int k = 0; k < c.block_kv; ++k)
              if (j * c.block_kv + k <= i * c.block_q + r) tile[r * (c.block_kv / 32) + k / 32] |= 1u << (k % 32);
        } else if (c.pattern == Pattern::kFull) {
          present = true;
        } else if (c.pattern == Pattern::kRegimes) {
          const bool many = work == Work::kMany, several = many || work == Work::kSome || work == Work::kPoisoned;
          present = several ? u < (many ? 0.95 : 0.4) : work != Work::kNothing && j == only;
          partial = present && (work == Work::kBits || (several && uniform(rng) < 0.3));
          const double fill = uniform(rng) < 0.2 ? 0. : uniform(rng);
          for (int bit = 0; partial && bit < c.block_q * c.block_kv; ++bit)
            if (uniform(rng) < fill) tile[bit / 32] |= 1u << (bit % 32);
        } else if (!empty_row) {
          present = u < density;
          partial = u < density / 2;
          const double fill = u < density / 16 ? 0. : u < density / 4 ? 0.03 : 0.6;  // some tiles have no bit, some few
          for (int bit = 0; partial && bit < c.block_q * c.block_kv; ++bit)
            if (uniform(rng) < fill) tile[bit / 32] |= 1u << (bit % 32);
        }
        if (!present) continue;
        if (partial) {
          const size_t size = tile.size();
          int number = -1;
          for (int k = std::max(0, mask.tiles_count - 4); k < mask.tiles_count; ++k)
            if (std::equal(tile.begin(), tile.end(), mask.words.begin() + k * size)) number = k;
          if (number < 0) {
            number = mask.tiles_count++;
            mask.words.insert(mask.words.end(), tile.begin(), tile.end());
          }
          kind[i * nk + j] = number;
        } else {
          kind[i * nk + j] = -1;
        }
        for (int r = 0; r < c.block_q && i * c.block_q + r < c.q_len; ++r)
          for (int k = 0; k < c.block_kv && j * c.block_kv + k < c.kv_len; ++k)
            mask.dense[(size_t(table) * c.q_len + i * c.block_q + r) * c.kv_len + j * c.block_kv + k] =
                !partial || (tile[r * (c.block_kv / 32) + k / 32] >> (k % 32) & 1);
      }
    }
    const auto list = [&](int rows, int columns, const std::function<int(int, int)>& at, std::vector<int32_t>& offsets,
                          std::vector<int32_t>& ids, std::vector<int32_t>& tiles,
                          const std::function<int32_t&(int, int)>& place) {
      int used = 0;
      offsets.push_back(0);
      for (int i = 0; i < rows; ++i) {
        for (const bool full : {false, true})
          for (int j = 0; j < columns; ++j)
            if (at(i, j) >= -1 && (at(i, j) == -1) == full) {
              place(i, j) = used;
              ids.push_back(j);
              tiles.push_back(at(i, j));
              ++used;
            }
        offsets.push_back(used);
      }
      mask.visited += used;
      for (; used < mask.capacity; ++used) {
        ids.push_back(-1);
        tiles.push_back(-1);
      }
    };
    const size_t first = mask.places.size();
    mask.places.resize(first + nq * nk, -1), mask.col_places.resize(first + nq * nk, -1);
    list(
        nq, nk, [&](int i, int j) { return kind[i * nk + j]; }, mask.offsets, mask.ids, mask.tiles,
        [&](int i, int j) -> int32_t& { return mask.places[first + i * nk + j]; });
    list(
        nk, nq, [&](int j, int i) { return kind[i * nk + j]; }, mask.col_offsets, mask.col_ids, mask.col_tiles,
        [&](int j, int i) -> int32_t& { return mask.col_places[first + i * nk + j]; });
  }
  mask.visited /= 2;
  mask.poisoned.assign(size_t(mask.batch) * mask.heads * nq, 0);
  for (const auto& [table, row] : to_poison) Poison(mask, table, row, rng);
  return mask;
}

struct Comparison {
  bool passed = true;
  // `bad[i / row]` says that row i / row must contain a NaN (or an infinity that passed through), or, being kAnything,
  // is not compared; every other element must be near the reference. `floor`: results that are smaller cancel, and are
  // held to it.
  static constexpr uint8_t kAnything = 2;
  void Check(const char* what, const std::vector<float>& got, const std::vector<double>& want,
             const std::vector<uint8_t>& bad, int row, double epsilon, double factor, double floor = 1e-3) {
    double largest = 0, sum = 0, error_largest = 0, error_sum = 0;
    size_t wrong = 0, missing = 0, count = 0, first = got.size();
    for (size_t i = 0; i < got.size(); i += row) {
      bool nan = false;
      for (int e = 0; e < row; ++e) {
        const double x = got[i + e], y = want[i + e];
        nan |= !std::isfinite(x);
        if (bad[i / row]) continue;
        if (std::isinf(y) ? x != y : !std::isfinite(x)) {
          ++wrong;
          first = std::min(first, i + e);
        } else if (!std::isinf(y)) {
          largest = std::max(largest, std::abs(y)), sum += std::abs(y), ++count;
          if (std::abs(x - y) > error_largest) error_largest = std::abs(x - y), first = wrong ? first : i + e;
          error_sum += std::abs(x - y);
        }
      }
      if (bad[i / row] == 1 && !nan) ++missing;
    }
    const double max_ratio = error_largest / (epsilon * (largest + floor)),
                 mean_ratio = count ? error_sum / (epsilon * (sum + floor * count)) : 0;
    const bool ok = wrong == 0 && missing == 0 && max_ratio <= 3 * factor && mean_ratio <= factor;
    std::printf(
        "  %-5s max error %.3g (%.2f eps of max), mean %.2f eps of mean, wrong NaN/inf %zu, missing NaN %zu%s\n", what,
        error_largest, max_ratio, mean_ratio, wrong, missing, ok ? "" : "   <-- FAILED");
    if (!ok && first < got.size()) {
      std::printf("        worst or first wrong at row %zu element %zu: got %g want %g\n", first / row, first % row,
                  got[first], want[first]);
    }
    passed &= ok;
  }
};

Shape ShapeOf(const Case& c) {
  return {c.batch,
          c.q_len,
          c.kv_len,
          c.heads,
          c.kv_heads,
          c.head_dim,
          c.value_dim,
          c.block_q,
          c.block_kv,
          (c.q_len + c.block_q - 1) / c.block_q,
          (c.kv_len + c.block_kv - 1) / c.block_kv};
}

// The log-sum-exp as the reference has it: -inf for nothing attended to, and NaN where a kernel left that itself.
std::vector<float> StoredLse(const std::vector<uint8_t>& bytes) {
  std::vector<float> lse = Decode(bytes, DType::kF32);
  for (float& x : lse) x = x == kNoLogSumExp<float> ? -INFINITY : x == -INFINITY ? NAN : x;
  return lse;
}

// A number for each visited block of each (batch, head), in the order of either list; none: empty.
struct Gates {
  std::vector<float> rows, cols;  // [batch, heads, capacity]
  Gates() = default;
  Gates(const Case& c, const Mask& m, std::mt19937& rng) {
    std::uniform_real_distribution<float> uniform(-0.5f, 1.5f);
    const size_t blocks = size_t(m.q_blocks) * m.kv_blocks;
    rows.assign(size_t(c.batch) * c.heads * m.capacity, NAN);  // of no entry: must not be used
    cols = rows;
    for (int row = 0; row < c.batch * c.heads; ++row)
      for (size_t block = 0; block < blocks; ++block) {
        const size_t table = size_t(m.batch == 1 ? 0 : row / c.heads) * m.heads + (m.heads == 1 ? 0 : row % c.heads);
        if (m.places[table * blocks + block] < 0) continue;
        const float gate = block % 7 == 3 ? 0.f : uniform(rng);
        rows[size_t(row) * m.capacity + m.places[table * blocks + block]] = gate;
        cols[size_t(row) * m.capacity + m.col_places[table * blocks + block]] = gate;
      }
  }
};

// The terms of the bias and the keys of dropout; what a case does not have is empty.
struct Extras {
  const Case* c = nullptr;
  const Mask* mask = nullptr;
  std::vector<float> dense, distances, tiles;
  std::vector<uint8_t> dense_bytes;
  std::vector<int32_t> row_tiles, col_tiles;  // as the lists' ids
  std::vector<uint32_t> keys;                 // [batch, heads]
  int64_t tiles_count = 0;

  Extras() = default;
  Extras(const Case& given, const Mask& m, std::mt19937& rng) : c(&given), mask(&m) {
    const auto any = [&](size_t count) {
      std::vector<float> values = Normal(count, rng);
      if (values.size() > 1) values[1] = 0.f;
      return values;
    };
    if (c->dense >= 0) {
      dense = any(size_t(Extent(c->dense, Case::kBatch)) * Extent(c->dense, Case::kHeads) *
                  Extent(c->dense, Case::kQueries) * Extent(c->dense, Case::kKeys));
      if (c->minus_infinity) {
        for (float& x : dense)
          if (rng() % 16 == 0) x = -INFINITY;
        const size_t row = Extent(c->dense, Case::kKeys);  // one row in eleven attends to nothing
        for (size_t i = 0; row > 1 && i < dense.size(); ++i)
          if (i / row % 11 == 4) dense[i] = -INFINITY;
      }
      dense_bytes = Encode(dense, c->dense_wide ? DType::kF32 : c->dtype);
    }
    if (c->distances >= 0) {
      const size_t tables = size_t(Extent(c->distances, Case::kBatch)) * Extent(c->distances, Case::kHeads);
      const int count = c->q_len + c->kv_len - 1;
      distances = any(tables * count);
      // Tables of any numbers (kind 0); of a slope, gentle or steep, to both sides or on through 0 (1, 2); and like
      // T5's, whose far distances share a bucket (3; 7: of an enormous number, but these alone). One after the other,
      // unless the case wants one kind.
      for (size_t table = 0, first = rng(); table < tables; ++table) {
        const size_t kind = c->distance_kind < 0 ? first + table : c->distance_kind;
        float* numbers = &distances[table * count];
        // In float32 a steep one would be most of the error: logits of hundreds are rounded to 2^-16.
        const float slope = kind % 8 < 4 && c->dtype != DType::kF32 ? 0.7f : 0.013f;
        for (int i = 0; i < count; ++i) {
          const int distance = i - (c->q_len - 1);
          if (kind % 4 == 1) numbers[i] = -slope * std::abs(distance);
          if (kind % 4 == 2) numbers[i] = slope * distance;
          if (kind % 4 == 3 && std::abs(distance) > 70) numbers[i] = distance < 0 ? 0.8f : -2.5f;
          if (c->distance_kind == 7 && distance < -70) numbers[i] = -3.3e38f;  // as some write what is not to be seen
        }
      }
    }
    if (c->bias_tiles >= 0) {
      tiles_count = c->bias_tile_count > 0 ? c->bias_tile_count : m.capacity;
      tiles = any(size_t(Extent(c->bias_tiles, Case::kBatch)) * Extent(c->bias_tiles, Case::kHeads) * tiles_count *
                  TileQueries() * TileKeys());
      row_tiles.assign(size_t(m.batch) * m.heads * m.capacity, 0);
      col_tiles = row_tiles;
      const size_t blocks = size_t(m.q_blocks) * m.kv_blocks;
      for (size_t i = 0; i < m.places.size(); ++i) {
        if (m.places[i] < 0) continue;
        const size_t table = i / blocks * m.capacity;
        // -1 and -2: none; count and count + 1: the last.
        const int number = c->bias_tile_count > 0 ? int(rng() % (tiles_count + 4)) - 2 : m.places[i];
        row_tiles[table + m.places[i]] = col_tiles[table + m.col_places[i]] = number;
      }
    }
    if (c->dropout > 0)
      for (int i = 0; i < c->batch * c->heads; ++i) keys.push_back(rng());
  }

  int Extent(int kept, int which) const {
    if ((kept & which) == 0) return 1;
    return which == Case::kBatch     ? c->batch
           : which == Case::kHeads   ? c->heads
           : which == Case::kQueries ? c->q_len
                                     : c->kv_len;
  }
  int TileQueries() const { return c->bias_tiles & Case::kQueries ? c->block_q : 1; }
  int TileKeys() const { return c->bias_tiles & Case::kKeys ? c->block_kv : 1; }
  size_t Table(int kept, int b, int n) const {
    return size_t(kept & Case::kBatch ? b : 0) * Extent(kept, Case::kHeads) + (kept & Case::kHeads ? n : 0);
  }
  // The element of each term that a pair has; -1: none.
  int64_t DenseAt(int b, int n, int t, int s) const {
    const int64_t queries = Extent(c->dense, Case::kQueries), keys_count = Extent(c->dense, Case::kKeys);
    return (int64_t(Table(c->dense, b, n)) * queries + (queries == 1 ? 0 : t)) * keys_count + (keys_count == 1 ? 0 : s);
  }
  int64_t DistanceAt(int b, int n, int t, int s) const {
    return int64_t(Table(c->distances, b, n)) * (c->q_len + c->kv_len - 1) + s - t + c->q_len - 1;
  }
  int64_t TileAt(int b, int n, int t, int s) const {
    const size_t table = size_t(mask->batch == 1 ? 0 : b) * mask->heads + (mask->heads == 1 ? 0 : n);
    const size_t block = size_t(t / c->block_q) * mask->kv_blocks + s / c->block_kv;
    const int place = mask->places[table * mask->q_blocks * mask->kv_blocks + block];
    if (place < 0) return -1;
    const int number = row_tiles[table * mask->capacity + place];
    return number < 0 ? -1 : TileElement(b, n, t, s, std::min<int64_t>(number, tiles_count - 1));
  }
  int64_t TileElement(int b, int n, int t, int s, int64_t number) const {
    const int64_t tile = int64_t(Table(c->bias_tiles, b, n)) * tiles_count + number;
    return (tile * TileQueries() + (TileQueries() == 1 ? 0 : t % c->block_q)) * TileKeys() +
           (TileKeys() == 1 ? 0 : s % c->block_kv);
  }
  int64_t At(BiasTerm term, int b, int n, int t, int s) const {
    return term == BiasTerm::kDense       ? DenseAt(b, n, t, s)
           : term == BiasTerm::kDistances ? DistanceAt(b, n, t, s)
                                          : TileAt(b, n, t, s);
  }
  double BiasOf(int b, int n, int t, int s) const {
    double sum = 0;
    if (!dense.empty()) sum += dense[DenseAt(b, n, t, s)];
    if (!distances.empty()) sum += distances[DistanceAt(b, n, t, s)];
    if (!tiles.empty() && TileAt(b, n, t, s) >= 0) sum += tiles[TileAt(b, n, t, s)];
    return sum;
  }
  // The factor of a pair after the softmax.
  double Weight(int b, int n, int t, int s) const {
    if (keys.empty()) return 1;
    const uint32_t word = DropoutWord(DropoutQueryWord(keys[size_t(b) * c->heads + n], t), DropoutKeyWord(s));
    return IsDropped(word, DropoutByte(t, s), c->dropout) ? 0. : 256. / (256 - c->dropout);
  }
};

// Tables of a term that is kept for each example, each head, both or neither; -1: it is not given.
int64_t TablesOf(int kept, const Case& c) {
  return kept < 0 ? 0 : int64_t{kept & Case::kBatch ? c.batch : 1} * (kept & Case::kHeads ? c.heads : 1);
}

// Everything a case has on the device.
struct Problem {
  Problem(const Case& c, const Mask& m, const std::vector<uint8_t>& q, const std::vector<uint8_t>& k,
          const std::vector<uint8_t>& v, const std::vector<uint8_t>& d, const std::vector<int32_t>& lengths,
          const std::vector<float>& sinks, float scale, const Gates& g = {}, const Extras& x = {})
      : query(q),
        key(k),
        value(v),
        dout(d),
        offsets(m.offsets),
        ids(m.ids),
        tiles(m.tiles),
        col_offsets(m.col_offsets),
        col_ids(m.col_ids),
        col_tiles(m.col_tiles),
        words(m.words),
        pairs(lengths),
        sink(sinks),
        gates(g.rows),
        col_gates(g.cols),
        dense(x.dense_bytes),
        distances(x.distances),
        bias_tiles(x.tiles),
        row_bias_tiles(x.row_tiles),
        col_bias_tiles(x.col_tiles),
        dropout_keys(x.keys),
        workspace(4 * cuda::ForwardWorkspace(ShapeOf(c), TablesOf(c.distances, c)),
                  0x7F),  // garbage, as XLA hands it out
        out(size_t(c.batch) * c.q_len * c.heads * c.value_dim * SizeOf(c.dtype), 0xFF),
        lse(size_t(c.batch) * c.q_len * c.heads * 4, 0xFF),
        lse_rest(size_t(c.batch) * c.q_len * c.heads * 4, 0xFF),
        delta(size_t(c.batch) * c.q_len * c.heads * 4),
        gradient_bytes(BackwardBytes(c, m, !g.rows.empty())),
        gradient_workspace(gradient_bytes),
        dquery(q.size(), 0xFF),
        dkey(k.size(), 0xFF),
        dvalue(v.size(), 0xFF),
        dgates(g.cols.size() * 4, 0xFF) {
    const auto numbers = [&](const Device& d) { return g.rows.empty() ? nullptr : d.data(); };
    const auto i32 = [](const Device& d) { return static_cast<const int32_t*>(d.data()); };
    const Shape shape = ShapeOf(c);
    const BlockList rows{i32(offsets), i32(ids), i32(tiles), m.batch, m.heads, m.q_blocks, m.kv_blocks, m.capacity};
    const BlockList cols{i32(col_offsets), i32(col_ids), i32(col_tiles), m.batch,
                         m.heads,          m.kv_blocks,  m.q_blocks,     m.capacity};
    const BitTiles bits{static_cast<const uint32_t*>(words.data()), 1, 1, m.tiles_count};
    const Lengths limit{i32(pairs), int64_t(lengths.size() / 2)};
    Bias bias{};
    if (c.dense >= 0) {
      bias.dense = dense.data(), bias.dense_wide = c.dense_wide || c.dtype == DType::kF32;
      bias.dense_batch = x.Extent(c.dense, Case::kBatch), bias.dense_heads = x.Extent(c.dense, Case::kHeads);
      bias.dense_q = x.Extent(c.dense, Case::kQueries), bias.dense_kv = x.Extent(c.dense, Case::kKeys);
    }
    if (c.distances >= 0) {
      bias.distances = distances.data();
      bias.distances_batch = x.Extent(c.distances, Case::kBatch);
      bias.distances_heads = x.Extent(c.distances, Case::kHeads);
    }
    if (c.bias_tiles >= 0) {
      bias.tiles = bias_tiles.data(), bias.tiles_count = x.tiles_count;
      bias.tiles_batch = x.Extent(c.bias_tiles, Case::kBatch), bias.tiles_heads = x.Extent(c.bias_tiles, Case::kHeads);
      bias.tiles_q = x.TileQueries(), bias.tiles_kv = x.TileKeys();
      bias.row_tiles = static_cast<const int32_t*>(row_bias_tiles.data());
      bias.col_tiles = static_cast<const int32_t*>(col_bias_tiles.data());
    }
    const Dropout dropout{c.dropout > 0 ? static_cast<const uint32_t*>(dropout_keys.data()) : nullptr, c.dropout};
    forward = {shape,
               c.dtype,
               query.data(),
               key.data(),
               value.data(),
               rows,
               bits,
               limit,
               c.sinks ? sink.data() : nullptr,
               1,
               int64_t(sinks.size()),
               numbers(gates),
               bias,
               dropout,
               scale,
               c.soft_cap,
               out.data(),
               lse.data(),
               lse_rest.data(),
               scale,
               c.soft_cap};
    backward = {shape,
                c.dtype,
                dout.data(),
                query.data(),
                key.data(),
                value.data(),
                lse.data(),
                lse_rest.data(),
                delta.data(),
                rows,
                cols,
                bits,
                limit,
                numbers(gates),
                numbers(col_gates),
                numbers(dgates),
                bias,
                dropout,
                scale,
                c.soft_cap,
                dquery.data(),
                dkey.data(),
                dvalue.data(),
                scale,
                c.soft_cap};
    bias.col_tiles = nullptr;
    bias_gradient = {
        shape,           c.dtype,          dout.data(), query.data(), key.data(), value.data(),   lse.data(),
        lse_rest.data(), delta.data(),     rows,        bits,         limit,      numbers(gates), bias,
        dropout,         BiasTerm::kDense, scale,       c.soft_cap,   nullptr,    scale,          c.soft_cap};
  }
  static int64_t BackwardBytes(const Case& c, const Mask& m, bool gated) {
    BackwardParams params{};
    int somewhere;
    if (gated) params.dgates = &somewhere;
    params.shape = ShapeOf(c);
    params.rows.batch = params.cols.batch = m.batch;
    params.rows.heads = params.cols.heads = m.heads;
    params.rows.capacity = params.cols.capacity = m.capacity;
    if (c.distances >= 0) {
      params.bias.distances = &somewhere;
      params.bias.distances_batch = TablesOf(c.distances, c), params.bias.distances_heads = 1;
    }
    const int64_t roomy = int64_t{64} << 20;
    return cuda::BackwardWorkspace(params) + roomy;
  }
  // Of the forward, or of the forward and the backward after it.
  std::vector<Device*> Results(bool backward) {
    if (!backward) return {&out, &lse, &lse_rest};
    return {&out, &lse, &lse_rest, &dquery, &dkey, &dvalue, &dgates};
  }

  Device query, key, value, dout, offsets, ids, tiles, col_offsets, col_ids, col_tiles, words, pairs, sink, gates,
      col_gates;
  Exact dense, distances, bias_tiles, row_bias_tiles, col_bias_tiles, dropout_keys;
  Device workspace;
  Device out, lse, lse_rest, delta;
  int64_t gradient_bytes;
  Device gradient_workspace, dquery, dkey, dvalue, dgates;
  ForwardParams forward;
  BackwardParams backward;
  BiasGradientParams bias_gradient;  // without its term and its result
};

// Launches after asking for refusals.
void Forward(const Problem& p, cudaStream_t stream, cuda::ForwardKernel kernel = cuda::ForwardKernel::kAutomatic) {
  const std::string refusal = cuda::ForwardRefusal(p.forward, 0);
  if (!refusal.empty()) std::printf("REFUSED: %s\n", refusal.c_str()), std::exit(3);
  CUDA_OK(cuda::LaunchForward(p.forward, static_cast<int32_t*>(p.workspace.data()), 0, stream, kernel));
}
void Backward(const Problem& p, cudaStream_t stream, cuda::BackwardKernel kernel = cuda::BackwardKernel::kAutomatic,
              bool least_workspace = false) {
  const std::string refusal = cuda::BackwardRefusal(p.backward, 0);
  if (!refusal.empty()) std::printf("REFUSED: %s\n", refusal.c_str()), std::exit(3);
  const int64_t bytes = least_workspace ? cuda::BackwardWorkspace(p.backward) : p.gradient_bytes;
  CUDA_OK(cuda::LaunchBackward(p.backward, p.gradient_workspace.data(), bytes, 0, stream, kernel));
}

void BiasGradient(const Problem& p, BiasTerm term, const Device& dbias, cudaStream_t stream,
                  cuda::BiasGradientKernel kernel = cuda::BiasGradientKernel::kAutomatic) {
  BiasGradientParams params = p.bias_gradient;
  params.term = term, params.dbias = dbias.data();
  const std::string refusal = cuda::BiasGradientRefusal(params, 0);
  if (!refusal.empty()) std::printf("REFUSED: %s\n", refusal.c_str()), std::exit(3);
  CUDA_OK(cuda::LaunchBiasGradient(params, 0, stream, kernel));
}

// Every kernel that can run a case here.
template <typename Kernel>
struct Named {
  const char* name;
  Kernel kernel;
  bool least_workspace = false;
};
bool HasHopperKernels(const Case& c) {
  int major = 0;
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9 && c.dtype != DType::kF32;
}
std::vector<Named<cuda::ForwardKernel>> ForwardKernels(const Case& c) {
  std::vector<Named<cuda::ForwardKernel>> kernels = {{"portable", cuda::ForwardKernel::kPortable}};
  if (HasHopperKernels(c)) {
    kernels.push_back({"rows64", cuda::ForwardKernel::kRows64});
    if (std::max(c.head_dim, c.value_dim) <= 64)
      kernels.push_back({"rows64feeder", cuda::ForwardKernel::kRows64Feeder});
    if (c.block_q == 128) kernels.push_back({"rows128", cuda::ForwardKernel::kRows128});
  }
  return kernels;
}
std::vector<Named<cuda::BackwardKernel>> BackwardKernels(const Case& c) {
  std::vector<Named<cuda::BackwardKernel>> kernels = {{"portable backward", cuda::BackwardKernel::kPortable}};
  if (HasHopperKernels(c)) {
    // The workspace decides how the work is divided.
    kernels.push_back({"keys64 backward", cuda::BackwardKernel::kKeys64});
    kernels.push_back({"keys64 backward, least workspace", cuda::BackwardKernel::kKeys64, true});
    if (c.block_kv == 128 && std::max(c.head_dim, c.value_dim) <= 128) {
      kernels.push_back({"keys128 backward", cuda::BackwardKernel::kKeys128});
      kernels.push_back({"keys128 backward, least workspace", cuda::BackwardKernel::kKeys128, true});
    }
  }
  return kernels;
}

std::vector<Named<cuda::BiasGradientKernel>> BiasGradientKernels(const Case& c) {
  std::vector<Named<cuda::BiasGradientKernel>> kernels = {
      {"portable bias gradient", cuda::BiasGradientKernel::kPortable}};
  if (HasHopperKernels(c)) kernels.push_back({"bias gradient", cuda::BiasGradientKernel::kAutomatic});
  return kernels;
}

// 0 where there is no entry: nobody reads what is there.
std::vector<float> Visited(std::vector<float> gradient, const std::vector<float>& gates) {
  for (size_t i = 0; i < gates.size(); ++i)
    if (std::isnan(gates[i])) gradient[i] = 0;
  return gradient;
}

template <typename T>
void Multiply(std::vector<T>& values, int copies) {
  const size_t count = values.size();
  values.resize(count * copies);
  for (size_t i = count; i < values.size(); ++i) values[i] = values[i - count];
}

// The same lists, bit tiles left alone, for `copies` times the examples.
void Multiply(Mask& mask, int copies) {
  if (mask.batch == 1) return;
  for (auto* list : {&mask.offsets, &mask.ids, &mask.tiles, &mask.col_offsets, &mask.col_ids, &mask.col_tiles}) {
    Multiply(*list, copies);
  }
  mask.batch *= copies;
}

// What the gradient of a term of the bias has to be.
struct BiasGradientCheck {
  BiasTerm term;
  std::vector<double> want, row, noise;  // noise: the sum of squares of what rounding is relative to, row by row
  std::vector<uint8_t> bad;
  std::vector<int64_t> touched;  // elements of this row of queries

  BiasGradientCheck(BiasTerm term, size_t count) : term(term), want(count), row(count), noise(count), bad(count) {}
  void Add(int64_t element, double gradient, double magnitude, uint8_t is_bad) {
    want[element] += gradient;
    if (row[element] == 0) touched.push_back(element);
    row[element] += magnitude;
    if (bad[element] != 1 && is_bad != 0) bad[element] = is_bad;
  }
  void EndRow() {
    for (const int64_t element : touched) noise[element] += row[element] * row[element], row[element] = 0;
    touched.clear();
  }
  void Multiply(int copies, bool apart) {
    if (apart) {
      ::Multiply(want, copies), ::Multiply(noise, copies), ::Multiply(bad, copies);
    } else {
      for (double& x : want) x *= copies;
      for (double& x : noise) x *= double(copies) * copies;
    }
  }
  double Floor() const {
    double largest = 0;
    for (const double x : noise) largest = std::max(largest, x);
    return std::sqrt(largest) + 1e-6;
  }
};

// Runs the third call and compares.
void CheckBiasGradient(const Case& c, const Problem& problem, const BiasGradientCheck& check,
                       cuda::BiasGradientKernel kernel, double factor, cudaStream_t stream, Comparison& compare) {
  const bool distances = check.term == BiasTerm::kDistances;
  const DType type = check.term == BiasTerm::kDense && !c.dense_wide ? c.dtype : DType::kF32;
  Device dbias(check.want.size() * (distances ? 2 : 1) * SizeOf(type), 0xFF);
  const auto launch = [&] { BiasGradient(problem, check.term, dbias, stream, kernel); };
  launch();
  CUDA_OK(cudaStreamSynchronize(stream));
  std::vector<float> got = Decode(dbias.Bytes(), type);
  if (distances) {  // of every table two halves
    const size_t length = c.q_len + c.kv_len - 1;
    std::vector<float> sums(check.want.size());
    for (size_t i = 0; i < sums.size(); ++i) {
      const size_t at = i / length * 2 * length + i % length;
      sums[i] = got[at] + got[at + length];
    }
    got = sums;
  }
  const char* const names[] = {"dbias, dense", "dbias, distances", "dbias, tiles"};
  compare.Check(names[static_cast<int>(check.term)], got, check.want, check.bad, 1, Epsilon(c.dtype), factor,
                check.Floor());
  if (!dbias.GuardsIntact()) compare.passed = false, std::printf("  guard bytes overwritten   <-- FAILED\n");
  compare.passed &= Repeats({&dbias}, stream, launch);
}

bool RunCase(Case c) {
  std::mt19937 rng(c.seed);
  Mask mask = MakeMask(c, rng);
  int B = c.batch;
  const int T = c.q_len, S = c.kv_len, N = c.heads, K = c.kv_heads, D = c.head_dim, V = c.value_dim;
  auto query = Normal(size_t(B) * T * N * D, rng, c.amplitude), key = Normal(size_t(B) * S * K * D, rng);
  auto value = Normal(size_t(B) * S * K * V, rng), dout = Normal(size_t(B) * T * N * V, rng);
  const float scale = c.scale != 0.f ? c.scale : 1.f / std::sqrt(float(D));
  if (c.jump != 0.f) {
    // The first dimension of every query is 1, of every key 0 but for two runs, which so get a larger logit.
    for (size_t i = 0; i < query.size(); i += D) query[i] = 1.f;
    for (size_t i = 0; i < key.size(); i += D) key[i] = 0.f;
    for (int b = 0; b < B; ++b)
      for (int k = 0; k < K; ++k) {
        for (int i = 0; i < c.jump_keys; ++i) {
          key[((size_t(b) * S + S / 2 + i) * K + k) * D] = c.jump / scale;
          key[((size_t(b) * S + (c.jump_back ? 66 + i : S - 3 - i)) * K + k) * D] = 2 * c.jump / scale;
        }
      }
  }
  std::vector<int32_t> lengths = {T + 5, S + 7};
  if (c.lengths) {
    lengths.clear();
    for (int b = 0; b < B; ++b) {
      if (c.pattern == Pattern::kRegimes) {  // none, all, whole blocks or any number
        const auto length = [&](int all, int block) -> int {
          const int kind = rng() % 8, any = static_cast<int>(rng() % (all + 1));
          return kind == 0 ? 0 : kind < 3 ? all : kind < 5 ? any / block * block : any;
        };
        lengths.insert(lengths.end(), {length(T, c.block_q), length(S, c.block_kv)});
      } else {
        lengths.insert(lengths.end(), {b == 0 ? T * 2 / 3 : T - 1, b == 0 ? S : S / 2 + 3});
      }
    }
  }
  std::vector<float> sinks(c.sinks ? N : 1, -INFINITY);
  if (c.sinks)
    for (int n = 0; n < N; ++n) sinks[n] = n == 0 ? -INFINITY : n == 1 ? 60.f : n == 3 ? INFINITY : float(n) - 2.f;
  const auto limit = [&](int b, int which) {
    return std::min(std::max(lengths[(lengths.size() > 2 ? 2 * b : 0) + which], 0), which ? S : T);
  };
  Gates gates = c.gates ? Gates(c, mask, rng) : Gates();
  const Case one = c;  // before it is copied
  const Mask honest = mask;
  Extras extras = c.HasBias() || c.dropout > 0 ? Extras(one, honest, rng) : Extras();
  const auto attends = [&](int b, int n, int t, int s) {
    const size_t table = size_t(mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : n);
    return t < limit(b, 0) && s < limit(b, 1) && mask.dense[(table * T + t) * S + s] &&
           !(c.minus_infinity && extras.BiasOf(b, n, t, s) == -INFINITY);
  };
  // A bias of -inf hides its pair as a mask does, but for one thing: the probability is computed, and where the row is
  // NaN, so is what the key gets.
  const auto hidden_by_bias = [&](int b, int n, int t, int s) {
    const size_t table = size_t(mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : n);
    return c.minus_infinity && s < limit(b, 1) && mask.dense[(table * T + t) * S + s] && !attends(b, n, t, s);
  };
  // Of the block of a pair, in the order of either list.
  const auto gate_place = [&](const std::vector<int32_t>& places, int b, int n, int t, int s) {
    const size_t table = size_t(mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : n);
    const size_t block = size_t(t / c.block_q) * mask.kv_blocks + s / c.block_kv;
    return (size_t(b) * N + n) * mask.capacity + places[table * mask.q_blocks * mask.kv_blocks + block];
  };

  // The bytes before anything is spoiled are the reference's input.
  auto query_bytes = Encode(query, c.dtype), key_bytes = Encode(key, c.dtype), value_bytes = Encode(value, c.dtype),
       dout_bytes = Encode(dout, c.dtype);
  const int bad_b = B - 1, bad_n = N - 1, bad_t = std::min(10, T - 1), bad_s = std::min(5, S - 1);
  const auto spoil = [&](std::vector<float> values, size_t index, float with) {
    values[index] = with;
    return Encode(values, c.dtype);
  };
  const size_t key_row = (size_t(bad_b) * S + bad_s) * K + K - 1, query_row = (size_t(bad_b) * T + bad_t) * N + bad_n;
  if (c.fault == Fault::kKey) key_bytes = spoil(key, key_row * D + D / 2, NAN);
  if (c.fault == Fault::kValue) value_bytes = spoil(value, key_row * V + 1, NAN);
  if (c.fault == Fault::kInfValue) value_bytes = spoil(value, key_row * V + V - 1, INFINITY);
  if (c.fault == Fault::kQuery) query_bytes = spoil(query, query_row * D + 3, NAN);
  if (c.fault == Fault::kDout) dout_bytes = spoil(dout, query_row * V + V - 1, NAN);
  int poisoned_row = -1, poisoned_col = -1;  // of every head that shares the last table
  int longer_row = -1, longer_col = -1;      // that has entries of the next but one, and what only the repeats compare
  std::vector<int32_t> honest_offsets = mask.col_offsets;
  {
    const int rows = mask.q_blocks, table = mask.batch * mask.heads - 1, base = table * (rows + 1);
    const int first = table * mask.capacity;
    const auto poison_entry = [&](std::vector<int32_t>& list, int with) {
      poisoned_row = rows - 1;
      while (mask.offsets[base + poisoned_row] == mask.offsets[base + poisoned_row + 1]) --poisoned_row;
      list[first + mask.offsets[base + poisoned_row + 1] - 1] = with;
    };
    if (c.fault == Fault::kBadId) poison_entry(mask.ids, mask.kv_blocks);
    if (c.fault == Fault::kBadTile) poison_entry(mask.tiles, mask.tiles_count);
    if (c.fault == Fault::kNegativeTile) poison_entry(mask.tiles, -2);
    if (c.fault == Fault::kOffsets) poisoned_row = 0, mask.offsets[base] = -1;
    if (c.fault == Fault::kOverflow) poisoned_row = rows - 1, mask.offsets[base + rows] = mask.capacity + 1;
    // The offset in the middle moves up, the one after it stays: row 0 has all entries up to the last of row 2, row 1
    // ends before it begins, and row 2 is as it was.
    if (c.fault == Fault::kDecreasing) {
      longer_row = 0, poisoned_row = 1;
      mask.offsets[base + 1] = mask.offsets[base + 3];
    }
    if (c.fault == Fault::kDecreasingCols) {
      longer_col = 0, poisoned_col = 1;
      const int cols = table * (mask.kv_blocks + 1);
      mask.col_offsets[cols + 1] = mask.col_offsets[cols + 3];
    }
    if (c.fault == Fault::kBadCol || c.fault == Fault::kBadFirstCol) {
      const int spoiled = c.fault == Fault::kBadCol ? table : 0;
      poisoned_col = 0, mask.col_ids[spoiled * mask.capacity] = -7;
      while (mask.col_offsets[spoiled * (mask.kv_blocks + 1) + poisoned_col + 1] == 0) ++poisoned_col;
    }
  }

  // Reference.
  std::vector<double> out(query.size() / D * V), lse(size_t(B) * N * T, -INFINITY), dquery(query.size()),
      dkey(key.size()), dvalue(value.size()), dgates(gates.cols.size());
  std::vector<uint8_t> bad_gates(dgates.size()), bad_out(size_t(B) * T * N), bad_lse(size_t(B) * N * T),
      bad_dquery(size_t(B) * T * N), bad_key(size_t(B) * S * K);
  auto dlse = Normal(lse.size(), rng);
  std::vector<double> probs(S), slopes(S), logits(S), biases(S);
  double bias_sum = 0, bias_rows = 0;  // of what rows attend to, by its probability
  std::vector<BiasGradientCheck> dbiases;
  if (!extras.dense.empty()) dbiases.emplace_back(BiasTerm::kDense, extras.dense.size());
  if (!extras.distances.empty()) dbiases.emplace_back(BiasTerm::kDistances, extras.distances.size());
  if (!extras.tiles.empty()) dbiases.emplace_back(BiasTerm::kTiles, extras.tiles.size());
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n)
      for (int t = 0; t < limit(b, 0); ++t) {
        const size_t row = (size_t(b) * T + t) * N + n, stat = (size_t(b) * N + n) * T + t;
        const int kv = n / (N / K);
        const bool in_table = (mask.batch == 1 || b == B - 1) && (mask.heads == 1 || n == N - 1);
        const size_t table = size_t(mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : n);
        const bool poisoned = (in_table && poisoned_row >= 0 && t / c.block_q == poisoned_row) ||
                              mask.poisoned[table * mask.q_blocks + t / c.block_q];
        bool bad = poisoned, any = false;
        bool lse_bad = poisoned;
        const double sink = sinks[sinks.size() > 1 ? n : 0];
        double max = sink;
        for (int s = 0; s < S; ++s) {
          if (!attends(b, n, t, s)) continue;
          any = true;
          double x = 0;
          for (int d = 0; d < D; ++d) x += double(query[row * D + d]) * key[((size_t(b) * S + s) * K + kv) * D + d];
          x *= scale;
          const double tanh = c.soft_cap != 0 ? std::tanh(x / c.soft_cap) : 0;
          slopes[s] = 1 - tanh * tanh;
          biases[s] = extras.BiasOf(b, n, t, s);
          logits[s] = (c.soft_cap != 0 ? c.soft_cap * tanh : x) + biases[s];
          max = std::max(max, logits[s]);
          if (b == bad_b && kv == K - 1 && s == bad_s) {
            bad |= c.fault == Fault::kKey || c.fault == Fault::kValue || c.fault == Fault::kInfValue;
            lse_bad |= c.fault == Fault::kKey;
          }
        }
        if (any && c.fault == Fault::kQuery && row == query_row) bad = lse_bad = true;
        const bool bad_gradient = bad || (any && c.fault == Fault::kDout && row == query_row);
        bad_out[row] = bad, bad_lse[stat] = lse_bad, bad_dquery[row] = bad_gradient;
        const bool longer = in_table && longer_row >= 0 && t / c.block_q == longer_row;
        if (longer) bad_out[row] = bad_lse[stat] = bad_dquery[row] = Comparison::kAnything;
        // The entries of others that it visits as well have tiles of the bias that its own may not have.
        for (BiasGradientCheck& dbias : dbiases) {
          for (int64_t i = 0; longer && dbias.term == BiasTerm::kTiles && i < extras.tiles_count * S; ++i) {
            const int64_t element = extras.TileElement(b, n, t, static_cast<int>(i % S), i / S);
            dbias.Add(element, 0, 0, Comparison::kAnything);
          }
        }
        for (int s = 0; bad_gradient && s < S; ++s) {
          if (!hidden_by_bias(b, n, t, s)) continue;
          const auto spoil_any = [](uint8_t& bad) { bad = bad == 1 ? 1 : Comparison::kAnything; };
          spoil_any(bad_key[(size_t(b) * S + s) * K + kv]);
          if (c.gates) spoil_any(bad_gates[gate_place(mask.col_places, b, n, t, s)]);
          for (BiasGradientCheck& dbias : dbiases) {
            const int64_t element = extras.At(dbias.term, b, n, t, s);
            if (element >= 0) dbias.Add(element, 0, 0, Comparison::kAnything);
          }
        }
        const auto share = [&](double logit) { return sink == INFINITY ? 0 : std::exp(logit - max); };
        double total = sink == INFINITY ? 1 : share(sink), delta = -dlse[stat];
        if (!any) {
          lse[stat] = sink;
          continue;
        }
        for (int s = 0; s < S; ++s)
          if (attends(b, n, t, s)) total += probs[s] = share(logits[s]);
        lse[stat] = max + std::log(total);
        ++bias_rows;
        for (int s = 0; s < S; ++s) {
          if (!attends(b, n, t, s)) continue;
          probs[s] /= total;
          bias_sum += probs[s] * std::abs(biases[s]);
          const double gate =
              (c.gates ? gates.rows[gate_place(mask.places, b, n, t, s)] : 1) * extras.Weight(b, n, t, s);
          for (int d = 0; d < V; ++d)
            out[row * V + d] += gate * probs[s] * value[((size_t(b) * S + s) * K + kv) * V + d];
        }
        double delta_noise = 0;
        for (int d = 0; d < V; ++d) {
          delta += out[row * V + d] * dout[row * V + d];
          delta_noise += std::pow(out[row * V + d] * dout[row * V + d], 2);
        }
        delta_noise = std::sqrt(delta_noise) + std::abs(delta);
        for (int s = 0; s < S; ++s) {
          if (!attends(b, n, t, s)) continue;
          const size_t at = (size_t(b) * S + s) * K + kv;
          bad_key[at] = bad_gradient || bad_key[at] == 1 ? 1 : longer ? Comparison::kAnything : bad_key[at];
          const double gate = c.gates ? gates.rows[gate_place(mask.places, b, n, t, s)] : 1;
          const double weight = extras.Weight(b, n, t, s);
          double dprob = 0;
          for (int d = 0; d < V; ++d) {
            dprob += double(dout[row * V + d]) * value[at * V + d];
            dvalue[at * V + d] += gate * weight * probs[s] * dout[row * V + d];
          }
          dprob *= weight;
          if (c.gates) {
            const size_t place = gate_place(mask.col_places, b, n, t, s);
            dgates[place] += probs[s] * dprob;
            uint8_t& bad_gate = bad_gates[place];
            bad_gate = bad_gradient || bad_gate == 1 ? 1 : longer ? Comparison::kAnything : bad_gate;
            dprob *= gate;
          }
          for (BiasGradientCheck& dbias : dbiases) {
            const int64_t element = extras.At(dbias.term, b, n, t, s);
            if (element >= 0) {
              dbias.Add(element, probs[s] * (dprob - delta), probs[s] * (std::abs(dprob) + delta_noise),
                        poisoned || longer ? Comparison::kAnything : bad_gradient);
            }
          }
          const double dscore = probs[s] * (dprob - delta) * (c.soft_cap != 0 ? slopes[s] : 1) * scale;
          for (int d = 0; d < D; ++d) {
            dquery[row * D + d] += dscore * key[at * D + d];
            dkey[at * D + d] += dscore * query[row * D + d];
          }
        }
        for (BiasGradientCheck& dbias : dbiases) dbias.EndRow();
      }
  if (poisoned_col >= 0) {
    const bool first = c.fault == Fault::kBadFirstCol;
    for (int b = mask.batch == 1 || first ? 0 : B - 1; b < (mask.batch == 1 || !first ? B : 1); ++b)
      for (int n = mask.heads == 1 || first ? 0 : N - 1; n < (mask.heads == 1 || !first ? N : 1); ++n)
        for (int s = poisoned_col * c.block_kv; s < std::min((poisoned_col + 1) * c.block_kv, limit(b, 1)); ++s)
          bad_key[(size_t(b) * S + s) * K + n / (N / K)] = 1;
    // With a list of the group that cannot be followed, the gradients of all its gates there are NaN.
    for (int b = 0; c.gates && b < B; ++b)
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < mask.q_blocks; ++i) {
          const int s = poisoned_col * c.block_kv;
          const size_t place = gate_place(mask.col_places, b, n, i * c.block_q, s);
          if (place + 1 != (size_t(b) * N + n) * mask.capacity && bad_key[(size_t(b) * S + s) * K + n / (N / K)]) {
            bad_gates[place] = 1;
          }
        }
  }

  if (longer_col >= 0) {  // of a table that all share
    for (size_t at = 0; at < bad_key.size(); ++at) {
      if (at / K % S / c.block_kv == size_t(longer_col)) bad_key[at] = Comparison::kAnything;
    }
    // Of gates, the entries of column 0 are its own, those of column 1 are its own too but mean other keys, and those
    // of column 2 are of both.
    for (size_t at = 0; at < bad_gates.size(); ++at) {
      const int entry = static_cast<int>(at % mask.capacity);
      if (entry >= honest_offsets[1] && entry < honest_offsets[2]) bad_gates[at] = Comparison::kAnything;
      if (entry >= honest_offsets[2] && entry < honest_offsets[3]) bad_gates[at] = 1;
    }
  }

  if (c.copies > 1) {
    for (auto* bytes : {&query_bytes, &key_bytes, &value_bytes, &dout_bytes}) Multiply(*bytes, c.copies);
    for (auto* want : {&out, &lse, &dquery, &dkey, &dvalue, &dgates}) Multiply(*want, c.copies);
    for (auto* bad : {&bad_gates, &bad_out, &bad_lse, &bad_dquery, &bad_key}) Multiply(*bad, c.copies);
    Multiply(gates.rows, c.copies), Multiply(gates.cols, c.copies), Multiply(dlse, c.copies);
    Multiply(extras.keys, c.copies);
    for (BiasGradientCheck& dbias : dbiases) {
      const int kept = dbias.term == BiasTerm::kDense       ? c.dense
                       : dbias.term == BiasTerm::kDistances ? c.distances
                                                            : c.bias_tiles;
      dbias.Multiply(c.copies, kept & Case::kBatch);
    }
    if (c.dense & Case::kBatch) Multiply(extras.dense_bytes, c.dense >= 0 ? c.copies : 1);
    if (c.distances & Case::kBatch) Multiply(extras.distances, c.distances >= 0 ? c.copies : 1);
    if (c.bias_tiles & Case::kBatch) Multiply(extras.tiles, c.bias_tiles >= 0 ? c.copies : 1);
    if (mask.batch > 1) Multiply(extras.row_tiles, c.copies), Multiply(extras.col_tiles, c.copies);
    if (lengths.size() > 2) Multiply(lengths, c.copies);
    Multiply(mask, c.copies);
    B = c.batch *= c.copies;
    extras.c = &c;
  }

  // On the device: every forward kernel.
  Problem problem(c, mask, query_bytes, key_bytes, value_bytes, dout_bytes, lengths, sinks, scale, gates, extras);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  Comparison compare;
  // Logits of 100 are rounded to 2^-18 in float32, and so are then their exponentials.
  const double epsilon = Epsilon(c.dtype), spread = std::max({1.f, c.amplitude, c.jump});
  const auto guards = [&] {
    for (const Device* d : {&problem.out, &problem.lse, &problem.lse_rest, &problem.dquery, &problem.dkey,
                            &problem.dvalue, &problem.dgates, &problem.workspace, &problem.gradient_workspace})
      if (!d->GuardsIntact()) compare.passed = false, std::printf("  guard bytes overwritten   <-- FAILED\n");
  };
  // Hopper's kernels have a bias in the sums of the tensor cores from the start. These truncate: each 16 dimensions
  // more take up to 2^-23 of it, which is more than rounding takes from a logit. Others add it to the finished sum.
  const double lse_epsilon = std::ldexp(1., -21);
  const double lost = std::ldexp(1., -23) * ((D + 15) / 16) * bias_sum / std::max(bias_rows, 1.);
  for (const auto& [name, kernel, unused] : ForwardKernels(c)) {
    std::printf(" %s\n", name);
    const auto launch = [&, kernel = kernel] { Forward(problem, stream, kernel); };
    for (Device* array : problem.Results(false)) array->Fill(0xFF);
    launch();
    CUDA_OK(cudaStreamSynchronize(stream));
    compare.Check("out", Decode(problem.out.Bytes(), c.dtype), out, bad_out, V, epsilon,
                  c.dtype == DType::kF32 ? spread : 1);
    const double lse_floor = 1e-3 + (kernel == cuda::ForwardKernel::kPortable ? 0 : lost / lse_epsilon);
    compare.Check("lse", StoredLse(problem.lse.Bytes()), lse, bad_lse, 1, lse_epsilon, spread, lse_floor);
    guards();
    compare.passed &= Repeats(problem.Results(false), stream, launch);
  }

  // The backward, with delta as a caller computes it, from the rounded output.
  for (Device* array : problem.Results(true)) array->Fill(0xFF);
  Forward(problem, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto got_out = Decode(problem.out.Bytes(), c.dtype);
  const auto given_dout = Decode(dout_bytes, c.dtype);
  std::vector<float> delta(lse.size());
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n)
      for (int t = 0; t < T; ++t) {
        const size_t row = (size_t(b) * T + t) * N + n, stat = (size_t(b) * N + n) * T + t;
        double sum = -dlse[stat];
        for (int d = 0; d < V; ++d) sum += double(got_out[row * V + d]) * given_dout[row * V + d];
        delta[stat] = float(sum);
      }
  CUDA_OK(cudaMemcpy(problem.delta.data(), delta.data(), delta.size() * 4, cudaMemcpyHostToDevice));
  for (const auto& [name, kernel, least_workspace] : BackwardKernels(c)) {
    std::printf(" %s\n", name);
    const auto launch = [&, kernel = kernel, least = least_workspace] {
      {
        const jax_bsk::GridLimit whole_chip(0);  // the backward reads the lse of the kernel that this case gets there
        Forward(problem, stream);
      }
      Backward(problem, stream, kernel, least);
    };
    for (Device* array : problem.Results(true)) array->Fill(0xFF);
    problem.gradient_workspace.Fill(0x40);  // 2 to 3: finite, so that reading what nobody wrote is not found as a NaN
    launch();
    CUDA_OK(cudaStreamSynchronize(stream));
    // Where rows attend to few keys, dS is the small difference of numbers of this size, and dK sums it over all rows.
    const bool cancels = c.pattern == Pattern::kRegimes;
    const double floor = cancels ? scale * std::sqrt(double(V)) : 1e-3;
    const double key_floor = cancels ? 0.2 * floor * std::sqrt(double(T) * N / K) : 1e-3;
    // Rows of one probability, 1: dS is nothing but rounding, times keys of millions.
    const bool one_hot = c.jump > 1e5f;
    const double factor = one_hot ? 2 : 2 * spread;
    if (!one_hot) {
      compare.Check("dq", Decode(problem.dquery.Bytes(), c.dtype), dquery, bad_dquery, D, epsilon, factor, floor);
      compare.Check("dk", Decode(problem.dkey.Bytes(), c.dtype), dkey, bad_key, D, epsilon, factor, key_floor);
    }
    compare.Check("dv", Decode(problem.dvalue.Bytes(), c.dtype), dvalue, bad_key, V, epsilon, factor);
    if (c.gates) {
      // Probabilities and their gradients are float32 here whatever the type.
      compare.Check("dg", Visited(Decode(problem.dgates.Bytes(), DType::kF32), gates.cols), dgates, bad_gates, 1,
                    std::ldexp(1., -18), 2 * spread);
    }
    guards();
    compare.passed &= Repeats(problem.Results(true), stream, launch);
  }
  for (const BiasGradientCheck& dbias : dbiases) {
    for (const auto& [name, kernel, unused] : BiasGradientKernels(c)) {
      std::printf(" %s\n", name);
      CheckBiasGradient(c, problem, dbias, kernel, 2 * spread, stream, compare);
    }
  }
  return compare.passed;
}

bool TimeCase(Case c, double density) {
  std::mt19937 rng(7);
  Case one = c;
  one.per_batch = one.per_head = false;
  const Mask mask = MakeMask(one, rng, density);
  const auto random = [&](size_t count) {
    auto some = Normal(1 << 16, rng);
    auto bytes = Encode(some, c.dtype);
    std::vector<uint8_t> all(count * SizeOf(c.dtype));
    for (size_t i = 0; i < all.size(); i += bytes.size())
      std::memcpy(&all[i], bytes.data(), std::min(bytes.size(), all.size() - i));
    return all;
  };
  const size_t tokens = size_t(c.batch) * c.q_len, kv_tokens = size_t(c.batch) * c.kv_len;
  Problem p(c, mask, random(tokens * c.heads * c.head_dim), random(kv_tokens * c.kv_heads * c.head_dim),
            random(kv_tokens * c.kv_heads * c.value_dim), random(tokens * c.heads * c.value_dim), {c.q_len, c.kv_len},
            {-INFINITY}, 1.f / std::sqrt(float(c.head_dim)), c.gates ? Gates(c, mask, rng) : Gates(),
            Extras(c, mask, rng));
  const double pairs = mask.visited * c.block_q * c.block_kv * c.heads * c.batch;
  for (const bool backward : {false, true}) {
    const auto launch = [&] { backward ? Backward(p, nullptr) : Forward(p, nullptr); };
    const Milliseconds time = Time(launch);
    // Matrix products of visited blocks: two forward, five backward (recomputation beyond that is not counted).
    const double flops = pairs * (backward ? 6. * c.head_dim + 4. * c.value_dim : 2. * (c.head_dim + c.value_dim));
    std::printf("  %s %.3f ms median, %.3f ms best, %.0f TFLOP/s of visited blocks\n",
                backward ? "backward" : "forward ", time.median, time.best, flops / time.median * 1e-9);
  }
  const Bias& bias = p.bias_gradient.bias;
  const auto gradient = [&](const char* term_name, BiasTerm term, int64_t bytes) {
    const Device dbias(static_cast<size_t>(bytes));
    const Milliseconds time = Time([&] { BiasGradient(p, term, dbias, nullptr); });
    std::printf("  gradient of the bias, %s: %.3f ms median, %.3f ms best\n", term_name, time.median, time.best);
  };
  if (bias.dense != nullptr) {
    gradient("dense", BiasTerm::kDense, bias.dense_batch * bias.dense_heads * bias.dense_q * bias.dense_kv * 4);
  }
  if (bias.distances != nullptr) {
    gradient("distances", BiasTerm::kDistances,
             bias.distances_batch * bias.distances_heads * 2 * (c.q_len + c.kv_len - 1) * 4);
  }
  if (bias.tiles != nullptr) {
    gradient("tiles", BiasTerm::kTiles,
             bias.tiles_batch * bias.tiles_heads * bias.tiles_count * bias.tiles_q * bias.tiles_kv * 4);
  }
  return true;
}

__host__ __device__ float Hash(uint64_t i) {
  i = (i + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
  i ^= i >> 29;
  i *= 0x94D049BB133111EBull;
  return static_cast<float>(static_cast<int>(i >> 57) - 64) / 64.f;  // exact in bfloat16
}
__global__ void FillHash(__nv_bfloat16* data, uint64_t count) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x)
    data[i] = __float2bfloat16(Hash(i));
}

// More than 2^31 elements of query and output: the last rows of the last head must be right.
bool RunHuge() {
  Case c{"huge"};
  c.batch = 1, c.q_len = 70000, c.kv_len = 128, c.heads = 256, c.kv_heads = 1, c.head_dim = c.value_dim = 128;
  c.block_q = c.block_kv = 128, c.pattern = Pattern::kFull;
  std::mt19937 rng(3);
  const Mask mask = MakeMask(c, rng);
  auto key = Normal(128 * 128, rng), value = Normal(128 * 128, rng);
  const auto key_bytes = Encode(key, c.dtype), value_bytes = Encode(value, c.dtype);
  const uint64_t count = uint64_t(c.q_len) * c.heads * 128;
  const std::vector<uint8_t> tiny(16);
  Device query(count * 2), out(count * 2, 0xFF), lse(uint64_t(c.q_len) * c.heads * 4, 0xFF),
      lse_rest(uint64_t(c.q_len) * c.heads * 4, 0xFF);
  FillHash<<<1024, 256>>>(static_cast<__nv_bfloat16*>(query.data()), count);
  Problem p(Case{"none", DType::kBF16, 1, 1, 128, 1, 1, 128, 128, 128, 128}, mask, tiny, key_bytes, value_bytes, tiny,
            {c.q_len, 128}, {-INFINITY}, 0.1f);
  p.forward.shape = ShapeOf(c);
  p.forward.query = query.data(), p.forward.out = out.data(), p.forward.lse = lse.data();
  p.forward.lse_rest = lse_rest.data();
  const Device workspace(4 * cuda::ForwardWorkspace(p.forward.shape, 0), 0x7F);
  CUDA_OK(cuda::LaunchForward(p.forward, static_cast<int32_t*>(workspace.data()), 0, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  Comparison compare;
  for (const int t : {0, 65536, c.q_len - 1}) {
    const uint64_t row = (uint64_t(t) * c.heads + c.heads - 1) * 128;
    std::vector<uint8_t> bytes(256);
    CUDA_OK(cudaMemcpy(bytes.data(), static_cast<char*>(out.data()) + row * 2, 256, cudaMemcpyDeviceToHost));
    std::vector<double> want(128), probs(128);
    double total = 0;
    for (int s = 0; s < 128; ++s) {
      double x = 0;
      for (int d = 0; d < 128; ++d) x += Hash(row + d) * double(key[s * 128 + d]);
      total += probs[s] = std::exp(0.1f * x);
    }
    for (int s = 0; s < 128; ++s)
      for (int d = 0; d < 128; ++d) want[d] += probs[s] / total * value[s * 128 + d];
    compare.Check("out", Decode(bytes, c.dtype), want, {0}, 128, Epsilon(c.dtype), 1);
  }
  return compare.passed;
}

// Lengths of zero: zeros where there are results, no error.
bool RunZero() {
  bool passed = true;
  for (const auto [q_len, kv_len] : {std::pair{0, 100}, {100, 0}, {0, 0}}) {
    Case c{"zero"};
    c.q_len = q_len, c.kv_len = kv_len, c.batch = 1, c.heads = 2, c.kv_heads = 1;
    std::mt19937 rng(3);
    const Mask mask = MakeMask(c, rng);
    const std::vector<uint8_t> q(size_t(q_len) * 2 * 64 * 2), k(size_t(kv_len) * 64 * 2);
    Problem p(c, mask, q, k, k, q, {q_len, kv_len}, {-INFINITY}, 0.1f);
    Forward(p, nullptr);
    Backward(p, nullptr);
    // Of a bias by distance, and of one for all pairs of a head.
    const Device dbias(2 * size_t(std::max(q_len + kv_len - 1, 1)) * 4, 0xFF), scalars(2 * 2, 0xFF);
    BiasGradientParams& gradient = p.bias_gradient;
    gradient.bias = {};
    gradient.bias.dense = gradient.bias.distances = &gradient;  // not read
    gradient.bias.dense_batch = gradient.bias.dense_q = gradient.bias.dense_kv = gradient.bias.distances_batch =
        gradient.bias.distances_heads = 1;
    gradient.bias.dense_heads = 2;
    if (q_len + kv_len > 0) BiasGradient(p, BiasTerm::kDistances, dbias, nullptr);
    BiasGradient(p, BiasTerm::kDense, scalars, nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    for (const uint8_t byte : scalars.Bytes()) passed &= byte == 0;
    for (const uint8_t byte : dbias.Bytes()) passed &= byte == 0 || q_len + kv_len == 0;
    for (const Device* d : {&p.out, &p.dquery, &p.dkey, &p.dvalue})
      for (const uint8_t byte : d->Bytes()) passed &= byte == 0;
    for (const float x : Decode(p.lse.Bytes(), DType::kF32)) passed &= x == kNoLogSumExp<float>;
  }
  return passed;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, const std::function<void(Case&)>& change) {
    Case c{name};
    change(c);
    cases.push_back(c);
  };
  using P = Pattern;
  using F = Fault;
  add("basic", [](Case&) {});
  add("full", [](Case& c) { c.pattern = P::kFull; });
  add("causal-d128", [](Case& c) { c.pattern = P::kCausal, c.head_dim = c.value_dim = 128, c.q_len = c.kv_len = 520; });
  add("causal-d128-b128", [](Case& c) {
    c.pattern = P::kCausal, c.head_dim = c.value_dim = 128, c.q_len = c.kv_len = 520, c.block_q = c.block_kv = 128;
  });
  add("d64-b128", [](Case& c) { c.block_q = c.block_kv = 128, c.q_len = 520, c.kv_len = 600; });
  add("d128-b128-f16", [](Case& c) {
    c.dtype = DType::kF16, c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128, c.q_len = 520, c.kv_len = 600;
  });
  add("d256", [](Case& c) { c.head_dim = c.value_dim = 256; });
  add("d256-b128-f16",
      [](Case& c) { c.dtype = DType::kF16, c.head_dim = c.value_dim = 256, c.block_q = c.block_kv = 128; });
  add("d72-v40", [](Case& c) { c.head_dim = 72, c.value_dim = 40, c.block_q = 128; });
  add("d8-v8", [](Case& c) { c.head_dim = 8, c.value_dim = 8, c.block_kv = 128; });
  add("d64-v192", [](Case& c) { c.value_dim = 192; });
  add("f32", [](Case& c) { c.dtype = DType::kF32; });
  add("f32-d128-b128",
      [](Case& c) { c.dtype = DType::kF32, c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128; });
  add("f32-d256", [](Case& c) { c.dtype = DType::kF32, c.head_dim = c.value_dim = 256, c.heads = c.kv_heads = 2; });
  add("f32-cap", [](Case& c) { c.dtype = DType::kF32, c.soft_cap = 20.f, c.sinks = true, c.lengths = true; });
  add("masks-per-head", [](Case& c) { c.per_head = c.per_batch = true; });
  add("mqa", [](Case& c) { c.kv_heads = 1, c.heads = 6, c.per_head = true, c.block_q = c.block_kv = 128; });
  add("mha-f16", [](Case& c) { c.kv_heads = 4, c.dtype = DType::kF16; });
  add("lengths", [](Case& c) { c.lengths = true; });
  add("lengths-b128",
      [](Case& c) { c.lengths = true, c.block_q = c.block_kv = 128, c.pattern = P::kFull, c.q_len = 513; });
  add("lengths-d256", [](Case& c) { c.lengths = true, c.head_dim = 256, c.value_dim = 200, c.block_kv = 128; });
  add("cap", [](Case& c) { c.soft_cap = 5.f; });
  add("cap-d128-b128",
      [](Case& c) { c.soft_cap = 30.f, c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128; });
  add("sinks", [](Case& c) { c.sinks = true, c.lengths = true; });
  add("negative-scale", [](Case& c) { c.scale = -0.2f; });
  add("large-logits", [](Case& c) { c.amplitude = 40.f, c.dtype = DType::kF32; });
  add("empty", [](Case& c) { c.pattern = P::kEmpty; });
  add("one-query", [](Case& c) { c.q_len = 1, c.pattern = P::kFull; });
  add("one-one", [](Case& c) { c.q_len = 1, c.kv_len = 1, c.pattern = P::kFull; });
  add("long-rows", [](Case& c) { c.batch = 1, c.heads = 2, c.q_len = 130, c.kv_len = 4480, c.pattern = P::kFull; });
  add("tail-64", [](Case& c) { c.q_len = c.kv_len = 320, c.block_q = c.block_kv = 128; });
  // Three tiles in a row without work, behind live ones and before more: of every head of the first example.
  add("padded", [](Case& c) { c.lengths = true, c.block_q = c.block_kv = 128, c.q_len = 1200; });
  add("padded-d128-f16", [](Case& c) {
    c.lengths = true, c.block_q = c.block_kv = 128, c.q_len = 1200, c.head_dim = c.value_dim = 128,
    c.dtype = DType::kF16;
  });
  add("padded-d256",
      [](Case& c) { c.lengths = true, c.block_q = c.block_kv = 128, c.q_len = 1200, c.head_dim = c.value_dim = 256; });
  // Enough tiles for persistent CTAs to take several.
  const auto many = [](Case& c) { c.batch = 3, c.heads = 16, c.kv_heads = 8, c.q_len = 300, c.kv_len = 350; };
  add("many-b128", [&](Case& c) { many(c), c.block_q = c.block_kv = 128; });
  add("many-b128-d128", [&](Case& c) {
    many(c), c.block_q = c.block_kv = 128, c.head_dim = c.value_dim = 128, c.lengths = c.sinks = true;
  });
  add("many-kv64", [&](Case& c) { many(c), c.block_q = 128, c.per_head = c.per_batch = true; });
  add("many-kv64-d128", [&](Case& c) { many(c), c.block_q = 128, c.head_dim = c.value_dim = 128, c.lengths = true; });
  add("many-d256", [&](Case& c) { many(c), c.block_q = c.block_kv = 128, c.head_dim = c.value_dim = 256; });
  add("many-empty", [&](Case& c) { many(c), c.block_q = c.block_kv = 128, c.pattern = P::kEmpty, c.sinks = true; });
  add("d96", [](Case& c) { c.head_dim = c.value_dim = 96; });
  add("d96-b128-f16", [](Case& c) {
    c.head_dim = c.value_dim = 96, c.block_q = c.block_kv = 128, c.dtype = DType::kF16, c.q_len = c.kv_len = 600;
  });
  add("d80-v88-b128", [](Case& c) { c.head_dim = 80, c.value_dim = 88, c.block_q = c.block_kv = 128; });
  add("cap-d96-b128", [](Case& c) { c.soft_cap = 30.f, c.head_dim = c.value_dim = 96, c.block_q = c.block_kv = 128; });
  add("tiny-scale", [](Case& c) { c.scale = 1e-35f, c.block_q = c.block_kv = 128; });
  // Logits that jump by 8, 200 and 2,000 within a row: exponentials relative to an earlier maximum would overflow.
  // After one of ten million a probability is 1, and the last bit of the log-sum-exp would make something else of it.
  for (const auto& [name, jump] :
       {std::pair{"jump-8", 8.f}, {"jump-200", 200.f}, {"jump-2000", 2000.f}, {"jump-10000000", 1e7f}})
    for (const bool large : {false, true}) {
      static std::vector<std::string> names;
      names.reserve(16);
      names.push_back(std::string(name) + (large ? "-d128-b128" : ""));
      add(names.back().c_str(), [&, jump = jump](Case& c) {
        c.jump = jump, c.pattern = P::kFull, c.q_len = 400, c.kv_len = 900;
        if (large) c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128;
        if (large && jump < 100.f) c.dtype = DType::kF16;
      });
    }
  // One small case an instantiation of the Hopper forward (each runs both tile sizes), for compute-sanitizer.
  for (const DType dtype : {DType::kBF16, DType::kF16})
    for (const int dim : {64, 96, 128, 256})
      for (const bool capped : {false, true}) {
        static std::vector<std::string> names;
        names.reserve(32);
        names.push_back(std::string("instance-") + (dtype == DType::kF16 ? "f16" : "bf16") + "-d" +
                        std::to_string(dim) + (capped ? "-cap" : ""));
        add(names.back().c_str(), [&](Case& c) {
          c.dtype = dtype, c.head_dim = c.value_dim = dim, c.block_q = c.block_kv = 128, c.q_len = c.kv_len = 900,
          c.pattern = P::kCausal;
          c.soft_cap = capped ? 20.f : 0.f, c.batch = 1, c.heads = 2, c.kv_heads = 1, c.lengths = c.sinks = true;
        });
      }
  for (const F f : {F::kValue, F::kKey, F::kInfValue})
    add(f == F::kValue ? "many-nan-value"
        : f == F::kKey ? "many-nan-key"
                       : "many-inf-value",
        [&](Case& c) {
          many(c), c.block_q = c.block_kv = 128, c.fault = f, c.kv_heads = 1, c.batch = 2, c.heads = 32, c.q_len = 384;
        });
  for (const int dim : {64, 128, 256}) {
    static std::vector<std::string> names;
    names.reserve(64);
    const auto fault = [&](const char* what, Fault f) {
      names.push_back(std::string(what) + "-d" + std::to_string(dim));
      add(names.back().c_str(), [&](Case& c) { c.fault = f, c.head_dim = c.value_dim = dim, c.per_head = dim == 64; });
    };
    fault("nan-key", F::kKey), fault("nan-value", F::kValue), fault("inf-value", F::kInfValue);
    fault("nan-query", F::kQuery), fault("nan-dout", F::kDout), fault("bad-id", F::kBadId);
    fault("bad-tile", F::kBadTile), fault("negative-tile", F::kNegativeTile), fault("bad-offsets", F::kOffsets);
    fault("overflow", F::kOverflow), fault("bad-col", F::kBadCol);
  }
  // Gates: every kernel and type, and what else may be wrong at the same time.
  const auto gated = [&](const char* name, const std::function<void(Case&)>& change) {
    add(name, [&](Case& c) { c.gates = true, change(c); });
  };
  gated("gates", [](Case&) {});
  gated("gates-b128", [](Case& c) { c.block_q = c.block_kv = 128, c.q_len = 520, c.kv_len = 600; });
  gated("gates-q128", [](Case& c) { c.block_q = 128, c.per_head = true, c.lengths = true; });
  gated("gates-kv128", [](Case& c) { c.block_kv = 128, c.per_batch = true, c.sinks = true; });
  gated("gates-lengths-b128", [](Case& c) {
    c.lengths = true, c.block_q = c.block_kv = 128, c.pattern = P::kFull, c.q_len = 513, c.kv_len = 500;
  });
  gated("gates-causal-d128-b128", [](Case& c) {
    c.pattern = P::kCausal, c.head_dim = c.value_dim = 128, c.q_len = c.kv_len = 520, c.block_q = c.block_kv = 128;
  });
  gated("gates-many-d128", [&](Case& c) {
    many(c), c.block_q = c.block_kv = 128, c.head_dim = c.value_dim = 128, c.lengths = c.sinks = true;
  });
  gated("gates-many-kv64-d128", [&](Case& c) { many(c), c.block_q = 128, c.head_dim = c.value_dim = 128; });
  gated("gates-f32", [](Case& c) { c.dtype = DType::kF32; });
  gated("gates-f32-d128-b128",
        [](Case& c) { c.dtype = DType::kF32, c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128; });
  gated("gates-f32-d256", [](Case& c) { c.dtype = DType::kF32, c.head_dim = c.value_dim = 256; });
  gated("gates-cap-b128", [](Case& c) { c.soft_cap = 10.f, c.block_q = c.block_kv = 128; });
  gated("gates-jump-200", [](Case& c) { c.jump = 200.f, c.pattern = P::kFull, c.q_len = 400, c.kv_len = 900; });
  gated("gates-empty", [](Case& c) { c.pattern = P::kEmpty; });
  for (const DType dtype : {DType::kBF16, DType::kF16})
    for (const int dim : {64, 96, 128, 256}) {
      static std::vector<std::string> names;
      names.reserve(16);
      names.push_back(std::string("gates-instance-") + (dtype == DType::kF16 ? "f16" : "bf16") + "-d" +
                      std::to_string(dim));
      gated(names.back().c_str(), [&](Case& c) {
        c.dtype = dtype, c.head_dim = c.value_dim = dim, c.block_q = c.block_kv = 128, c.q_len = c.kv_len = 700;
        c.batch = 1, c.heads = 2, c.kv_heads = 1, c.lengths = c.sinks = true;
      });
    }
  for (const auto& [name, f] : {std::pair{"gates-nan-key", F::kKey},
                                {"gates-nan-value", F::kValue},
                                {"gates-inf-value", F::kInfValue},
                                {"gates-nan-query", F::kQuery},
                                {"gates-nan-dout", F::kDout},
                                {"gates-bad-id", F::kBadId},
                                {"gates-bad-col", F::kBadCol},
                                {"gates-bad-first-col", F::kBadFirstCol}})
    gated(name, [f = f](Case& c) { c.fault = f, c.per_head = true; });
  // Rows that have entries in common: what each of them makes is the same in every repeat.
  for (const bool gates : {false, true}) {
    for (const bool large : {false, true}) {
      for (const F f : {F::kDecreasing, F::kDecreasingCols}) {
        static std::vector<std::string> names;
        names.reserve(16);
        names.push_back(std::string(gates ? "gates-" : "") + (f == F::kDecreasing ? "decreasing" : "decreasing-cols") +
                        (large ? "-d128-b128" : ""));
        add(names.back().c_str(), [&](Case& c) {
          c.fault = f, c.gates = gates, c.pattern = P::kFull, c.q_len = 700, c.kv_len = 650;
          if (large) c.head_dim = c.value_dim = 128, c.block_q = c.block_kv = 128;
        });
      }
    }
  }
  // Biases and dropout: every term alone and with the others, every shape of it, and what else may be there.
  constexpr int kB = Case::kBatch, kN = Case::kHeads, kT = Case::kQueries, kS = Case::kKeys;
  static std::vector<std::string> bias_names;
  bias_names.reserve(256);
  const auto biased = [&](const std::string& name, const std::function<void(Case&)>& change) {
    bias_names.push_back("bias-" + name);
    add(bias_names.back().c_str(), change);
  };
  const auto large = [](Case& c) { c.block_q = c.block_kv = 128, c.q_len = 520, c.kv_len = 600; };
  const auto all_terms = [](Case& c) {
    c.dense = kB | kN | kT | kS, c.distances = kN, c.bias_tiles = kT | kS, c.bias_tile_count = 5;
  };
  for (int kept = 0; kept < 16; ++kept) {
    biased("dense-" + std::to_string(kept), [&](Case& c) { c.dense = kept, c.dense_wide = kept % 3 == 0; });
    biased("tiles-" + std::to_string(kept), [&](Case& c) {
      c.bias_tiles = kept, c.bias_tile_count = kept % 3 == 2 ? 0 : 5, c.per_head = kept % 2 == 1;
      if (kept & kT) c.block_q = 128;
      if (kept % 5 != 0) c.block_kv = 128;
    });
  }
  for (int kept = 0; kept < 4; ++kept) {
    biased("distances-" + std::to_string(kept), [&](Case& c) {
      c.distances = kept, c.lengths = kept == 1;
      if (kept % 2 == 0) large(c);
    });
  }
  // Numbers by distance that lie on lines, of every kind (see Extras), alone and with what else there may be.
  for (const int kind : {1, 2, 3, 5, 6, 7})
    for (const bool wide : {false, true}) {
      biased("lines-" + std::to_string(kind) + (wide ? "-d128-b128" : ""), [&](Case& c) {
        c.distances = kN, c.distance_kind = kind, c.pattern = kind % 2 == 1 ? P::kCausal : P::kRandom;
        c.q_len = 500, c.kv_len = kind == 6 ? 900 : 500;
        if (wide) c.block_q = c.block_kv = 128, c.head_dim = c.value_dim = 128;
      });
    }
  for (const int jump : {8, 200, 2000})
    for (const int kind : {3, 6}) {
      biased("lines-" + std::to_string(kind) + "-jump-" + std::to_string(jump), [&](Case& c) {
        c.distances = kN, c.distance_kind = kind, c.jump = static_cast<float>(jump), c.pattern = P::kFull;
        c.jump_back = kind == 6;
        c.q_len = 400, c.kv_len = 900;
        if (jump == 200) c.block_q = c.block_kv = 128, c.head_dim = c.value_dim = 128;
      });
    }
  // Many keys share a row's largest logits, so that what their biases are to each other can be seen.
  biased("lines-6-jump-keys", [&](Case& c) {
    c.distances = kN, c.distance_kind = 6, c.jump = 200.f, c.jump_keys = 50, c.pattern = P::kFull, c.jump_back = true;
    c.q_len = 400, c.kv_len = 900;
  });
  biased("lines-terms", [&](Case& c) { all_terms(c), c.distance_kind = 5, c.lengths = true, c.q_len = 700; });
  biased("lines-dropout-d128-b128", [&](Case& c) {
    large(c), c.distances = kB | kN, c.distance_kind = 1, c.dropout = 40, c.head_dim = c.value_dim = 128;
  });
  biased("lines-d256", [&](Case& c) { c.distances = kN, c.distance_kind = 5, c.head_dim = c.value_dim = 256; });
  biased("lines-d96-v40-b128", [&](Case& c) {
    large(c), c.distances = 0, c.distance_kind = 6, c.head_dim = 96, c.value_dim = 40, c.lengths = c.sinks = true;
  });
  biased("dense-minus-infinity", [](Case& c) { c.dense = kN | kT | kS, c.minus_infinity = true; });
  biased("dense-minus-infinity-d128-b128", [&](Case& c) {
    large(c), c.dense = kB | kT | kS, c.minus_infinity = c.dense_wide = true, c.head_dim = c.value_dim = 128;
  });
  biased("minus-infinity-sinks-f32",
         [&](Case& c) { all_terms(c), c.minus_infinity = c.sinks = true, c.dtype = DType::kF32; });
  biased("dropout", [](Case& c) { c.dropout = 26; });
  biased("dropout-b128", [&](Case& c) { large(c), c.dropout = 128, c.lengths = true; });
  biased("dropout-d128-b128", [&](Case& c) { large(c), c.dropout = 64, c.head_dim = c.value_dim = 128; });
  biased("dropout-gates", [](Case& c) { c.dropout = 77, c.gates = c.per_head = true; });
  biased("dropout-most", [](Case& c) { c.dropout = 255, c.pattern = P::kFull; });
  biased("gates", [&](Case& c) { all_terms(c), c.gates = true, c.dropout = 26; });
  biased("cap", [&](Case& c) { all_terms(c), c.soft_cap = 5.f; });
  biased("cap-gates-b128", [&](Case& c) { all_terms(c), large(c), c.soft_cap = 5.f, c.gates = c.sinks = true; });
  biased("negative-scale", [&](Case& c) { all_terms(c), c.scale = -0.2f; });
  biased("lengths", [&](Case& c) { all_terms(c), c.lengths = true, c.pattern = P::kFull; });
  biased("lengths-per-head",
         [&](Case& c) { all_terms(c), large(c), c.lengths = c.per_head = c.per_batch = true, c.q_len = 513; });
  biased("empty", [&](Case& c) { all_terms(c), c.pattern = P::kEmpty; });
  biased("one-query", [&](Case& c) { all_terms(c), c.q_len = 1, c.pattern = P::kFull; });
  biased("one-one", [&](Case& c) { all_terms(c), c.q_len = 1, c.kv_len = 1, c.pattern = P::kFull; });
  biased("mqa", [&](Case& c) { all_terms(c), large(c), c.kv_heads = 1, c.heads = 6, c.per_head = true; });
  biased("many-tiles", [](Case& c) {  // more than one tile of the bias a slot
    c.bias_tiles = kN, c.bias_tile_count = 700, c.heads = 8, c.q_len = c.kv_len = 500;
  });
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32})
    for (const int dim : {64, 128, 256})
      for (const int block : {64, 128}) {
        const char* const type = dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
        biased("instance-" + std::string(type) + "-d" + std::to_string(dim) + "-b" + std::to_string(block),
               [&](Case& c) {
                 all_terms(c), c.dtype = dtype, c.head_dim = c.value_dim = dim, c.block_q = c.block_kv = block;
                 c.dropout = 40, c.q_len = c.kv_len = 400, c.batch = 1, c.heads = 2, c.kv_heads = 1, c.lengths = true;
               });
      }
  biased("d72-v40", [&](Case& c) { all_terms(c), c.head_dim = 72, c.value_dim = 40, c.block_q = 128; });
  // Gradients of biases, whose kernel for Hopper makes 128 x 128 pairs at a time. Bit tiles of every size of blocks:
  for (const auto& [queries, keys] : {std::pair{64, 64}, {64, 128}, {128, 64}, {128, 128}})
    for (const int dim : {64, 128}) {
      const std::string size = std::to_string(queries) + "-" + std::to_string(keys) + "-d" + std::to_string(dim);
      biased("pairs-" + size, [&, queries = queries, keys = keys](Case& c) {
        c.dense = kN | kT | kS, c.distances = kB, c.block_q = queries, c.block_kv = keys;
        c.head_dim = c.value_dim = dim, c.q_len = 400, c.kv_len = 600, c.per_head = c.lengths = true;
      });
      biased("pairs-causal-" + size, [&, queries = queries, keys = keys](Case& c) {
        c.dense = kT | kS, c.distances = kN, c.block_q = queries, c.block_kv = keys, c.pattern = P::kCausal;
        c.head_dim = c.value_dim = dim, c.q_len = c.kv_len = 500, c.kv_heads = 1;
      });
    }
  // More groups than CTAs, of tables that examples and heads share or do not.
  biased("pairs-waves-examples", [&](Case& c) {  // 150 groups
    c.distances = kN, c.batch = 1, c.copies = 3, c.heads = 30, c.kv_heads = 15, c.q_len = 200, c.kv_len = 1100;
  });
  biased("pairs-waves-heads", [&](Case& c) {  // 160 groups
    c.distances = kB, c.copies = 16, c.q_len = 200, c.kv_len = 1100, c.per_batch = true;
  });
  biased("pairs-waves-dense", [&](Case& c) {  // 169 groups, of a tile of two examples' two heads each
    c.dense = kT | kS, c.dense_wide = true, c.heads = 2, c.kv_heads = 1, c.q_len = c.kv_len = 1600,
    c.head_dim = c.value_dim = 128;
  });
  biased("pairs-waves-rows", [&](Case& c) {  // 3200 groups, of three tiles of keys and of one
    c.dense = kB | kN | kT | kS, c.heads = 8, c.copies = 100, c.q_len = 8, c.kv_len = 400, c.per_head = true;
  });
  biased("pairs-members", [&](Case& c) {  // more than a warp's lanes share a tile
    c.dense = kT | kS, c.distances = 0, c.copies = 6, c.q_len = 150, c.kv_len = 300, c.lengths = c.per_head = true;
  });
  biased("pairs-long", [&](Case& c) {  // a diagonal has more tiles than a warp has lanes
    c.distances = 0, c.batch = c.heads = c.kv_heads = 1, c.head_dim = c.value_dim = 32, c.q_len = 4300, c.kv_len = 4250;
    c.block_q = c.block_kv = 128;
  });
  for (const auto& [name, f] : {std::pair{"nan-key", F::kKey},
                                {"nan-value", F::kValue},
                                {"nan-query", F::kQuery},
                                {"nan-dout", F::kDout},
                                {"bad-id", F::kBadId},
                                {"bad-tile", F::kBadTile},
                                {"bad-offsets", F::kOffsets},
                                {"bad-col", F::kBadCol},
                                {"decreasing", F::kDecreasing}})
    biased(name, [&, f = f](Case& c) {
      all_terms(c), c.fault = f, c.per_head = f != F::kDecreasing;
      if (f == F::kDecreasing) c.pattern = P::kFull, c.q_len = 700, c.kv_len = 650;
    });
  // A list that cannot be followed, and the other heads of its group, whose lists can.
  add("bad-first-col", [](Case& c) { c.fault = F::kBadFirstCol, c.per_head = true; });
  add("bad-first-col-b128", [](Case& c) {
    c.fault = F::kBadFirstCol, c.per_head = true, c.block_q = c.block_kv = 128, c.kv_heads = 1,
    c.q_len = c.kv_len = 900;
  });
  return cases;
}

// A random case of Pattern::kRegimes. One in sixteen has at least four tiles a multiprocessor.
Case RegimeCase(uint32_t seed) {
  std::mt19937 rng(seed * 7919u + 17u);
  const auto pick = [&](std::initializer_list<int> from) { return *(from.begin() + rng() % from.size()); };
  const auto chance = [&](int percent) { return static_cast<int>(rng() % 100) < percent; };
  Case c{"regimes"};
  c.seed = seed, c.pattern = Pattern::kRegimes;
  c.dtype = chance(6) ? DType::kF32 : chance(50) ? DType::kF16 : DType::kBF16;
  c.batch = pick({1, 1, 2}), c.kv_heads = pick({1, 1, 2}), c.heads = c.kv_heads * pick({1, 1, 2});
  c.block_q = pick({128, 128, 64}), c.block_kv = pick({128, 64});
  c.head_dim = pick({8, 16, 64, 72, 104, 104, 128, 136}), c.value_dim = chance(70) ? c.head_dim : pick({8, 80, 128});
  c.q_len = c.block_q * pick({1, 3, 5, 8}) - (chance(50) ? 0 : static_cast<int>(rng() % c.block_q));
  c.kv_len = c.block_kv * pick({1, 2, 3, 4}) - (chance(50) ? 0 : static_cast<int>(rng() % c.block_kv));
  c.lengths = chance(45), c.sinks = chance(30), c.per_head = chance(60), c.per_batch = chance(60);
  c.gates = chance(15), c.soft_cap = chance(15) ? 15.f : 0.f;
  if (chance(30)) {
    const auto kept = [&] { return static_cast<int>(rng() % 16); };
    if (chance(50)) c.dense = kept(), c.dense_wide = chance(50), c.minus_infinity = chance(20);
    if (chance(50)) c.distances = kept() % 4;
    if (chance(50)) c.bias_tiles = kept(), c.bias_tile_count = pick({0, 1, 6});
    if (chance(50)) c.dropout = pick({13, 26, 128, 250});
  }
  if (seed % 16 == 15) {
    const int tiles = c.batch * c.heads * ((c.q_len + 127) / 128);
    c.copies = (4 * 132 + tiles - 1) / tiles;
  }
  return c;
}

// Of the seeds first .. last of a name regimes-FIRST-LAST; stops at the first that fails.
bool RunRegimes(const std::string& name, bool& known) {
  unsigned first = 0, last = 0;
  known = std::sscanf(name.c_str(), "regimes-%u-%u", &first, &last) == 2;
  for (unsigned seed = first; known && seed <= last; ++seed) {
    const Case c = RegimeCase(seed);
    std::printf(
        " seed %u: batch %d x %d, heads %d / %d, lengths %d x %d, sizes %d / %d, blocks %d x %d%s%s%s%s%s%s%s\n", seed,
        c.batch, c.copies, c.heads, c.kv_heads, c.q_len, c.kv_len, c.head_dim, c.value_dim, c.block_q, c.block_kv,
        c.lengths ? ", lengths" : "", c.sinks ? ", sinks" : "", c.gates ? ", gates" : "",
        c.per_head ? ", per head" : "", c.per_batch ? ", per example" : "", c.HasBias() ? ", bias" : "",
        c.dropout > 0 ? ", dropout" : "");
    StartClock(name + ", seed " + std::to_string(seed));
    if (!RunCase(c)) return false;
  }
  return true;
}
constexpr int kRegimes = 1200, kRegimesEach = 40;  // in the list of all cases

struct Timing {
  const char* name;
  Case c;
  double density;
};
std::vector<Timing> Timings() {
  std::vector<Timing> timings;
  const auto add = [&](const char* name, int batch, int heads, int kv_heads, int length, int dim, Pattern pattern,
                       double density, DType dtype = DType::kBF16, bool gates = false) {
    Case c{name};
    c.dtype = dtype, c.batch = batch, c.q_len = c.kv_len = length, c.heads = heads, c.kv_heads = kv_heads;
    c.head_dim = c.value_dim = dim, c.block_q = c.block_kv = 128, c.pattern = pattern, c.gates = gates;
    timings.push_back({name, c, density});
  };
  add("time-d128-full", 2, 16, 16, 4096, 128, Pattern::kFull, 1);
  add("time-d128-causal", 2, 16, 16, 4096, 128, Pattern::kCausal, 1);
  add("time-d128-random", 2, 16, 4, 4096, 128, Pattern::kRandom, 0.25);
  add("time-d64-full", 4, 16, 16, 4096, 64, Pattern::kFull, 1);
  add("time-d64-causal", 4, 16, 16, 4096, 64, Pattern::kCausal, 1);
  add("time-d256-full", 1, 16, 16, 4096, 256, Pattern::kFull, 1);
  add("time-f32-d64-full", 1, 8, 8, 2048, 64, Pattern::kFull, 1, DType::kF32);
  add("time-gates-d128-random", 2, 16, 4, 4096, 128, Pattern::kRandom, 0.25, DType::kBF16, true);
  add("time-gates-d128-causal", 2, 16, 16, 4096, 128, Pattern::kCausal, 1, DType::kBF16, true);
  add("time-gates-d64-causal", 4, 16, 16, 4096, 64, Pattern::kCausal, 1, DType::kBF16, true);
  const auto add_extras = [&](const char* name, const std::function<void(Case&)>& change) {
    add(name, 2, 16, 16, 4096, 128, Pattern::kCausal, 1);
    change(timings.back().c);
  };
  add_extras("time-bias-dense", [](Case& c) { c.dense = Case::kHeads | Case::kQueries | Case::kKeys; });
  add_extras("time-bias-keys", [](Case& c) { c.dense = Case::kBatch | Case::kKeys; });
  add_extras("time-bias-distances", [](Case& c) { c.distances = Case::kHeads, c.distance_kind = 0; });
  add_extras("time-bias-lines", [](Case& c) { c.distances = Case::kHeads, c.distance_kind = 5; });
  add_extras("time-bias-buckets", [](Case& c) { c.distances = Case::kHeads, c.distance_kind = 3; });
  add_extras("time-bias-tiles",
             [](Case& c) { c.bias_tiles = Case::kHeads | Case::kQueries | Case::kKeys, c.bias_tile_count = 8; });
  add_extras("time-bias-entries", [](Case& c) { c.bias_tiles = Case::kHeads; });
  add_extras("time-dropout", [](Case& c) { c.dropout = 26; });
  return timings;
}

bool Run(const std::string& name, bool& known) {
  known = true;
  if (name == "huge") return RunHuge();
  if (name == "zero") return RunZero();
  for (const Case& c : Cases())
    if (name == c.name) return RunCase(c);
  for (const Timing& t : Timings())
    if (name == t.name) return TimeCase(t.c, t.density);
  if (name.rfind("regimes", 0) == 0) return RunRegimes(name, known);
  if (name.rfind("choose", 0) == 0) return RunChoose(name, known);
  if (name.rfind("delta", 0) == 0 || name.rfind("time-delta", 0) == 0) return RunDelta(name, known);
  if (name.rfind("decode", 0) == 0 || name.rfind("time-decode", 0) == 0) return RunDecode(name, known);
  if (name.rfind("lists", 0) == 0) return RunLists(name, known);
  return RunMatmul(name, known);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> all = {"zero", "huge"};
  for (const Case& c : Cases()) all.push_back(c.name);
  for (int first = 0; first < kRegimes; first += kRegimesEach) {
    all.push_back("regimes-" + std::to_string(first) + "-" + std::to_string(first + kRegimesEach - 1));
  }
  for (const Timing& t : Timings()) all.push_back(t.name);
  for (const std::string& name : ChooseNames()) all.push_back(name);
  for (const std::string& name : DeltaNames()) all.push_back(name);
  for (const std::string& name : DecodeNames()) all.push_back(name);
  for (const std::string& name : ListsNames()) all.push_back(name);
  for (const std::string& name : MatmulNames()) all.push_back(name);
  if (argc < 2 || argc > 4) {
    std::printf("usage: cuda_check NAME [REPEATS [SECONDS]] | all [REPEATS [SECONDS]] | list | tree\n");
    return 2;
  }
  if (argv[1] == std::string("tree")) {  // git's hash of the csrc/ that the kernels were built from
    std::printf("%s\n", JAX_BSK_SOURCE_TREE);
    return 0;
  }
  if (argc > 2) repeat_count = std::atoi(argv[2]);  // fewer under compute-sanitizer
  if (argc > 3) case_seconds = std::atoi(argv[3]);  // more there
  if (argv[1] == std::string("list")) {
    for (const auto& name : all) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (argv[1] != std::string("all")) all = {argv[1]};
  int failed = 0;
  for (const auto& name : all) {
    bool known;
    std::printf("%s\n", name.c_str());
    std::fflush(stdout);
    StartClock(name);
    const bool passed = Run(name, known);
    if (!known) std::printf("  no such case\n");
    std::printf("  %s\n", passed ? "passed" : "FAILED");
    std::fflush(stdout);
    failed += !passed;
  }
  if (all.size() > 1) std::printf("%zu cases, %d failed\n", all.size(), failed);
  return failed ? 1 : 0;
}
