// The block-sparse products of the CPU against a float64 loop: random shapes, forms, lists and faults, in arrays of
// exactly their size.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu_check.h"
#include "matmul/cpu.h"

namespace jax_bsk::check {
namespace {

using namespace jax_bsk::matmul;  // NOLINT: a test of this namespace

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Place(bool transposed, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return transposed ? column * rows + row : row * columns + column;
}

std::vector<double> Values(const Array& array) {
  std::vector<double> values(array.size);
  for (int64_t i = 0; i < array.size; ++i) values[i] = array[i];
  return values;
}

DType OutType(Random& random, DType dtype) { return random.Chance(0.5) ? dtype : DType::kF32; }

DType AnyType(Random& random) {
  return random.Pick<DType>({DType::kF32, DType::kF32, DType::kBF16, DType::kF16, DType::kF64});
}

int64_t AnyBlock(Random& random) {
  return random.Pick<int64_t>({1, 3, 8, 16, 17, 32, 33, 64, 64, 100, 128, 256, random.Int(1, 256)});
}

// Of up to `most`, or a few blocks, whole and not.
int64_t AnyLength(Random& random, int64_t block, int64_t most) {
  if (random.Chance(0.05)) return 0;
  const int64_t blocks = random.Int(1, std::max<int64_t>(1, most / block));
  return random.Chance(0.4) ? blocks * block : random.Int((blocks - 1) * block + 1, blocks * block);
}

int32_t Wild(Random& random, int64_t end) {
  return random.Pick<int32_t>({-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(end), static_cast<int32_t>(end + 1)});
}

// Sums and those of the absolute terms.
struct Sums {
  std::vector<double> value, terms;
  explicit Sums(int64_t size) : value(size), terms(size) {}
  void Add(int64_t i, double term) {
    value[i] += term;
    terms[i] += std::fabs(term);
  }
};

bool Compare(const char* name, const Sums& want, const Array& got, DType computed) {
  for (int64_t i = 0; i < got.size; ++i) {
    const double x = got[i], y = want.value[i];
    const bool same =
        std::isnan(y) ? std::isnan(x) : x == y || std::fabs(x - y) <= Allowed(got.dtype, computed, y, want.terms[i]);
    if (same) continue;
    std::printf("%s[%ld]: %.9g instead of %.9g\n", name, i, x, y);
    return false;
  }
  return true;
}

// --- Products

struct ProductCase {
  ProductParams params{};
  Array data, dense, out;
  std::vector<std::vector<int32_t>> ids;  // of each out block of each matrix of the batch
  std::unique_ptr<int32_t[]> offsets, listed, places;

  // Lists of `ids`, whose blocks lie anywhere in `data`.
  void SetLists(Random& random, int64_t slack) {
    ProductParams& p = params;
    for (int64_t m = 0; m < p.matrix_batch; ++m) {
      int64_t count = slack;
      for (int64_t r = 0; r < p.out_blocks; ++r) count += ids[m * p.out_blocks + r].size();
      p.capacity = std::max(p.capacity, count);
    }
    std::vector<int32_t> all_offsets, all_ids, all_places;
    for (int64_t m = 0; m < p.matrix_batch; ++m) {
      all_offsets.push_back(0);
      for (int64_t r = 0; r < p.out_blocks; ++r) {
        const auto& row = ids[m * p.out_blocks + r];
        all_ids.insert(all_ids.end(), row.begin(), row.end());
        all_offsets.push_back(static_cast<int32_t>(all_ids.size() - m * p.capacity));
      }
      all_ids.resize((m + 1) * p.capacity, -1);
      std::vector<int32_t> order(p.capacity);
      for (int64_t e = 0; e < p.capacity; ++e) order[e] = static_cast<int32_t>(e);
      for (int64_t e = p.capacity - 1; e > 0; --e) std::swap(order[e], order[random.Int(0, e)]);
      all_places.insert(all_places.end(), order.begin(), order.end());
    }
    offsets = Exact(all_offsets);
    listed = Exact(all_ids);
    places = Exact(all_places);
  }

  void SetPointers() {
    params.data = data.data.get();
    params.dense = dense.data.get();
    params.out = out.data.get();
    params.lists = {offsets.get(), listed.get(), places.get()};
  }

  void Run(int workers) const {
    check::Run(params, matmul::cpu::ProductTasks(params), matmul::cpu::RunProductTasks, workers);
  }
};

ProductCase MakeProduct(Random& random) {
  ProductCase c;
  ProductParams& p = c.params;
  p.dtype = AnyType(random);
  p.out_dtype = OutType(random, p.dtype);
  p.batch = random.Int(1, 3);
  p.matrix_batch = random.Chance(0.5) ? 1 : p.batch;
  p.dense_batch = random.Chance(0.5) ? 1 : p.batch;
  p.out_block = AnyBlock(random);
  p.in_block = random.Chance(0.5) ? p.out_block : AnyBlock(random);
  // Sometimes so long that not all of the dense operand's packed blocks have a place of their own.
  const bool is_long = random.Chance(0.15);
  p.out_length = AnyLength(random, p.out_block, is_long ? 40 : 200);
  p.in_length = is_long ? random.Int(4500, 6000) : AnyLength(random, p.in_block, 200);
  p.out_blocks = Ceil(p.out_length, p.out_block);
  p.in_blocks = Ceil(p.in_length, p.in_block);
  p.width = random.Pick<int64_t>({1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 130, random.Int(0, 40)});
  p.transposed = random.Chance(0.5);
  p.dense_left = random.Chance(0.5);
  const double density = random.Pick<double>({0.1, 0.3, 0.7, 1});
  for (int64_t r = 0; r < p.matrix_batch * p.out_blocks; ++r) {
    std::vector<int32_t> row;
    const bool empty = random.Chance(0.1);
    for (int64_t id = 0; id < p.in_blocks && !empty; ++id) {
      if (random.Chance(std::min(density, 40.0 / p.in_blocks))) row.push_back(static_cast<int32_t>(id));
    }
    if (!row.empty() && random.Chance(0.1)) row.push_back(row[0]);  // twice, and out of order
    c.ids.push_back(row);
  }
  c.SetLists(random, random.Int(0, 2));

  // Blocks are zero where they stick out of the matrix, on either side.
  const int64_t block_size = p.out_block * p.in_block;
  c.data = random.Normals(p.dtype, p.matrix_batch * p.capacity * block_size);
  for (int64_t m = 0; m < p.matrix_batch; ++m) {
    for (int64_t r = 0; r < p.out_blocks; ++r) {
      for (int32_t e = c.offsets[m * (p.out_blocks + 1) + r]; e < c.offsets[m * (p.out_blocks + 1) + r + 1]; ++e) {
        const int64_t at = m * p.capacity + e;
        for (int64_t o = 0; o < p.out_block; ++o) {
          for (int64_t i = 0; i < p.in_block; ++i) {
            if (r * p.out_block + o < p.out_length && c.listed[at] * p.in_block + i < p.in_length) continue;
            const int64_t place = Place(p.transposed, o, p.out_block, i, p.in_block);
            c.data.Set((m * p.capacity + c.places[at]) * block_size + place, 0);
          }
        }
      }
    }
  }
  c.dense = random.Normals(p.dtype, p.dense_batch * p.in_length * p.width);
  if (random.Chance(0.2)) Spoil(random, c.dense, random.Int(1, 3));

  for (int64_t times = random.Chance(0.3) ? random.Int(1, 3) : 0; times > 0; --times) {
    const int64_t entries = p.matrix_batch * p.capacity;
    const int kind = entries == 0 ? 0 : random.Int(0, 2);
    if (kind == 0) {
      c.offsets[random.Int(0, p.matrix_batch * (p.out_blocks + 1) - 1)] = Wild(random, p.capacity + 1);
    } else if (kind == 1) {
      c.listed[random.Int(0, entries - 1)] = Wild(random, p.in_blocks);
    } else {
      c.places[random.Int(0, entries - 1)] = Wild(random, p.capacity);
    }
  }
  c.out = Array(p.out_dtype, p.batch * p.out_length * p.width);
  c.SetPointers();
  return c;
}

Sums WantedProduct(const ProductCase& c) {
  const ProductParams& p = c.params;
  const std::vector<double> data = Values(c.data), dense = Values(c.dense);
  Sums sums(c.out.size);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t m = p.matrix_batch == 1 ? 0 : b, d = p.dense_batch == 1 ? 0 : b;
    for (int64_t r = 0; r < p.out_blocks; ++r) {
      const int64_t begin = c.offsets[m * (p.out_blocks + 1) + r], end = c.offsets[m * (p.out_blocks + 1) + r + 1];
      bool broken = begin < 0 || end < begin || end > p.capacity;
      for (int64_t e = m * p.capacity + begin; !broken && e < m * p.capacity + end; ++e) {
        broken = c.listed[e] < 0 || c.listed[e] >= p.in_blocks || c.places[e] < 0 || c.places[e] >= p.capacity;
      }
      for (int64_t o = 0; o < std::min(p.out_block, p.out_length - r * p.out_block); ++o) {
        const auto at = [&](int64_t n) {
          return b * p.out_length * p.width + Place(p.dense_left, r * p.out_block + o, p.out_length, n, p.width);
        };
        for (int64_t n = 0; broken && n < p.width; ++n) sums.value[at(n)] = kNaN;
        for (int64_t e = m * p.capacity + begin; !broken && e < m * p.capacity + end; ++e) {
          for (int64_t i = 0; i < std::min(p.in_block, p.in_length - c.listed[e] * p.in_block); ++i) {
            const int64_t place = Place(p.transposed, o, p.out_block, i, p.in_block);
            const double left = data[(m * p.capacity + c.places[e]) * p.out_block * p.in_block + place];
            for (int64_t n = 0; n < p.width; ++n) {
              const int64_t from = Place(p.dense_left, c.listed[e] * p.in_block + i, p.in_length, n, p.width);
              sums.Add(at(n), left * dense[d * p.in_length * p.width + from]);
            }
          }
        }
      }
    }
  }
  return sums;
}

// --- Sampled products

struct SampledCase {
  SampledParams params{};
  Array left, right, out;
  std::unique_ptr<int32_t[]> row_ids, column_ids;

  void SetPointers() {
    params.left = left.data.get();
    params.right = right.data.get();
    params.row_ids = row_ids.get();
    params.column_ids = column_ids.get();
    params.out = out.data.get();
  }

  void Run(int workers) const {
    check::Run(params, matmul::cpu::SampledTasks(params), matmul::cpu::RunSampledTasks, workers);
  }
};

SampledCase MakeSampled(Random& random) {
  SampledCase c;
  SampledParams& p = c.params;
  p.dtype = AnyType(random);
  p.out_dtype = OutType(random, p.dtype);
  p.batch = random.Int(1, 3);
  p.left_batch = random.Chance(0.5) ? 1 : p.batch;
  p.right_batch = random.Chance(0.5) ? 1 : p.batch;
  p.list_batch = random.Chance(0.5) ? 1 : p.batch;
  p.block_rows = AnyBlock(random);
  p.block_columns = random.Chance(0.5) ? p.block_rows : AnyBlock(random);
  p.rows = AnyLength(random, p.block_rows, 250);
  p.columns = AnyLength(random, p.block_columns, 250);
  p.depth = random.Pick<int64_t>({0, 1, 15, 16, 17, 63, 64, 65, 128, 150, random.Int(1, 300)});
  p.row_blocks = Ceil(p.rows, p.block_rows);
  p.column_blocks = Ceil(p.columns, p.block_columns);
  p.capacity = random.Int(0, std::min<int64_t>(40, 60000 / (p.block_rows * p.block_columns) + 1));
  p.left_transposed = random.Chance(0.5);
  p.right_transposed = random.Chance(0.5);
  std::vector<int32_t> row_ids, column_ids;
  for (int64_t e = 0; e < p.list_batch * p.capacity; ++e) {
    row_ids.push_back(static_cast<int32_t>(random.Int(0, std::max<int64_t>(0, p.row_blocks - 1))));
    column_ids.push_back(static_cast<int32_t>(random.Int(0, std::max<int64_t>(0, p.column_blocks - 1))));
    if (random.Chance(0.1)) row_ids[e] = Wild(random, p.row_blocks);
    if (random.Chance(0.1)) column_ids[e] = Wild(random, p.column_blocks);
  }
  if (random.Chance(0.5)) {
    for (int64_t m = 0; m < p.list_batch; ++m) {
      std::sort(row_ids.begin() + m * p.capacity, row_ids.begin() + (m + 1) * p.capacity);
    }
  }
  c.row_ids = Exact(row_ids);
  c.column_ids = Exact(column_ids);
  c.left = random.Normals(p.dtype, p.left_batch * p.rows * p.depth);
  c.right = random.Normals(p.dtype, p.right_batch * p.depth * p.columns);
  if (random.Chance(0.2)) Spoil(random, c.left, random.Int(1, 3));
  if (random.Chance(0.2)) Spoil(random, c.right, random.Int(1, 3));
  c.out = Array(p.out_dtype, p.batch * p.capacity * p.block_rows * p.block_columns);
  c.SetPointers();
  return c;
}

Sums WantedSampled(const SampledCase& c) {
  const SampledParams& p = c.params;
  const std::vector<double> left = Values(c.left), right = Values(c.right);
  Sums sums(c.out.size);
  for (int64_t b = 0; b < p.batch; ++b) {
    const double* const a = left.data() + (p.left_batch == 1 ? 0 : b) * p.rows * p.depth;
    const double* const d = right.data() + (p.right_batch == 1 ? 0 : b) * p.depth * p.columns;
    for (int64_t e = 0; e < p.capacity; ++e) {
      const int64_t row = c.row_ids[(p.list_batch == 1 ? 0 : b) * p.capacity + e];
      const int64_t column = c.column_ids[(p.list_batch == 1 ? 0 : b) * p.capacity + e];
      if (row < 0 || row >= p.row_blocks || column < 0 || column >= p.column_blocks) continue;
      for (int64_t r = row * p.block_rows; r < std::min(p.rows, (row + 1) * p.block_rows); ++r) {
        for (int64_t k = column * p.block_columns; k < std::min(p.columns, (column + 1) * p.block_columns); ++k) {
          const int64_t at = ((b * p.capacity + e) * p.block_rows + r % p.block_rows) * p.block_columns;
          for (int64_t l = 0; l < p.depth; ++l) {
            sums.Add(at + k % p.block_columns, a[Place(p.left_transposed, r, p.rows, l, p.depth)] *
                                                   d[Place(p.right_transposed, l, p.depth, k, p.columns)]);
          }
        }
      }
    }
  }
  return sums;
}

// --- Timing

// [n, n] in blocks of `block`, of which about a fifth are there, with [n, n].
void Time(const char* title, DType dtype, int64_t n, int64_t block) {
  Random random(1);
  const int64_t blocks = n / block;
  ProductCase c;
  c.params = {dtype,  dtype, 1, 1,     1,     n,       n,  block,   block,  blocks,
              blocks, n,     0, false, false, nullptr, {}, nullptr, nullptr};
  SampledCase s;
  std::vector<int32_t> row_ids, column_ids;
  for (int64_t r = 0; r < blocks; ++r) {
    c.ids.emplace_back();
    for (int64_t id = 0; id < blocks; ++id) {
      if (!random.Chance(0.22)) continue;
      c.ids.back().push_back(static_cast<int32_t>(id));
      row_ids.push_back(static_cast<int32_t>(r));
      column_ids.push_back(static_cast<int32_t>(id));
    }
  }
  c.SetLists(random, 0);
  const int64_t entries = c.params.capacity;
  c.data = random.Normals(dtype, entries * block * block);
  c.dense = random.Normals(dtype, n * n);
  c.out = Array(dtype, n * n);
  c.SetPointers();
  s.params = {dtype,  dtype,  1,       1,     1,     1,       n,       n,       n,       block,  block,
              blocks, blocks, entries, false, false, nullptr, nullptr, nullptr, nullptr, nullptr};
  s.left = random.Normals(dtype, n * n);
  s.right = random.Normals(dtype, n * n);
  s.row_ids = Exact(row_ids);
  s.column_ids = Exact(column_ids);
  s.out = Array(dtype, entries * block * block);
  s.SetPointers();

  const double flops = 2.0 * entries * block * block * n;
  for (int workers = 1; workers <= 2; ++workers) {
    std::printf("%s %2.0f %% of blocks x%d, GFLOP/s:", title, 100.0 * entries / (blocks * blocks), workers);
    for (int form = 0; form < 4; ++form) {
      c.params.transposed = form & 1;
      c.params.dense_left = form & 2;
      std::printf("  %s%s %.0f", c.params.dense_left ? "b " : "", c.params.transposed ? "A^T" : "A",
                  flops / BestSeconds([&] { c.Run(workers); }) * 1e-9);
    }
    for (int form = 0; form < 4; ++form) {
      s.params.left_transposed = form & 1;
      s.params.right_transposed = form & 2;
      std::printf("  sampled%s%s %.0f", s.params.left_transposed ? " left^T" : "",
                  s.params.right_transposed ? " right^T" : "", flops / BestSeconds([&] { s.Run(workers); }) * 1e-9);
    }
    std::printf("\n");
  }
}

}  // namespace

bool CheckMatmul(uint64_t seed) {
  Random random(seed);
  ProductCase c = MakeProduct(random);
  c.Run(1);
  bool good = Compare("product", WantedProduct(c), c.out, c.params.dtype) &&
              Repeats("product", c.out, [&](int workers) { c.Run(workers); });
  if (!good) {
    const ProductParams& p = c.params;
    std::printf("seed %lu: batch %ld (%ld, %ld) out %ld in %ld blocks %ld x %ld width %ld dtype %d to %d %s%s\n", seed,
                p.batch, p.matrix_batch, p.dense_batch, p.out_length, p.in_length, p.out_block, p.in_block, p.width,
                static_cast<int>(p.dtype), static_cast<int>(p.out_dtype), p.transposed ? "transposed " : "",
                p.dense_left ? "dense left" : "");
  }
  SampledCase s = MakeSampled(random);
  s.Run(1);
  if (!Compare("sampled", WantedSampled(s), s.out, s.params.dtype) ||
      !Repeats("sampled", s.out, [&](int workers) { s.Run(workers); })) {
    const SampledParams& p = s.params;
    std::printf("seed %lu: batch %ld (%ld, %ld, %ld) [%ld, %ld, %ld] blocks %ld x %ld dtype %d to %d %s%s\n", seed,
                p.batch, p.left_batch, p.right_batch, p.list_batch, p.rows, p.depth, p.columns, p.block_rows,
                p.block_columns, static_cast<int>(p.dtype), static_cast<int>(p.out_dtype),
                p.left_transposed ? "left transposed " : "", p.right_transposed ? "right transposed" : "");
    good = false;
  }
  return good;
}

void TimeMatmul() {
  Time("float32 2048^3 blocks 64 ", DType::kF32, 2048, 64);
  Time("float32 2048^3 blocks 16 ", DType::kF32, 2048, 16);
  Time("float32 2048^3 blocks 128", DType::kF32, 2048, 128);
  Time("bfloat16 2048^3 blocks 64", DType::kBF16, 2048, 64);
  Time("float16 2048^3 blocks 64 ", DType::kF16, 2048, 64);
  Time("float64 2048^3 blocks 64 ", DType::kF64, 2048, 64);
}

}  // namespace jax_bsk::check
