// The CUDA kernels of the block-sparse products against a float64 loop. A case is a problem, and runs in every layout
// and with both types of the result. Inputs are of exactly their size; blocks that no list names are NaN.

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_check.h"
#include "matmul/launch.h"

namespace jax_bsk::check {
namespace {

using namespace jax_bsk::matmul;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool Aligned(int64_t size) { return size % cuda::Limits::kMultiple == 0; }
const int32_t* Words(const Exact& array) { return static_cast<const int32_t*>(array.data()); }

// ---- Comparison

// What a result should be, and the absolute values of the terms that it is the sum of.
struct Wanted {
  std::vector<double> value, terms;
  explicit Wanted(int64_t size) : value(size), terms(size) {}
};

// Rounding of the result, and of sums in float32, which the tensor cores truncate.
double Allowed(DType dtype, double value, double terms) {
  const double rounding = dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  return 1.01 * rounding * std::abs(value) + 0x1p-18 * terms + (dtype == DType::kF16 ? 0x1p-24 : 1e-35);
}

// Each element by itself: where NaN is wanted there is one, and nowhere else; what is 0 is so exactly.
bool Compare(const std::string& what, const Wanted& want, const std::vector<float>& got, DType dtype) {
  double worst = 0;  // error by what is allowed
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = want.value[i];
    double ratio = 0;
    if (std::isnan(y)) {
      ratio = std::isnan(x) ? 0 : INFINITY;
    } else if (std::isinf(y) || y == 0) {
      ratio = x == y ? 0 : INFINITY;
    } else {
      ratio = std::isfinite(x) ? std::abs(x - y) / Allowed(dtype, y, want.terms[i]) : INFINITY;
    }
    worst = std::max(worst, ratio);
    if (ratio > 1 && wrong++ == 0) first = i;
  }
  std::printf("  %-28s largest error %.3f of the allowed%s\n", what.c_str(), worst, wrong ? "   <-- FAILED" : "");
  if (wrong) {
    std::printf("        %zu of %zu are wrong, first %zu: got %g want %g\n", wrong, got.size(), first, got[first],
                want.value[first]);
  }
  return wrong == 0;
}

// [batch, rows, columns] -> [batch, columns, rows].
template <typename T>
std::vector<T> Transposed(const std::vector<T>& values, int64_t batch, int64_t rows, int64_t columns) {
  std::vector<T> result(values.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) result[(b * columns + c) * rows + r] = values[(b * rows + r) * columns + c];
  return result;
}

const char* NameOf(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kF16 ? "float16" : "bfloat16";
}

// ---- Launches

std::string Refusal(const ProductParams& params) { return cuda::ProductRefusal(params, 0); }
std::string Refusal(const SampledParams& params) { return cuda::SampledRefusal(params, 0); }
int64_t Workspace(const ProductParams& params) { return cuda::ProductWorkspace(params); }
int64_t Workspace(const SampledParams& params) { return cuda::SampledWorkspace(params); }
// Which of the products' two kernels: the one that a call takes, or one by its name.
enum class Kernel { kChosen, kWide, kNarrow };
void Launch(const ProductParams& params, const Device& workspace, cudaStream_t stream, Kernel kernel) {
  auto* words = static_cast<int32_t*>(workspace.data());
  if (kernel == Kernel::kChosen) CUDA_OK(cuda::LaunchProduct(params, words, 0, stream));
  if (kernel == Kernel::kWide) CUDA_OK(cuda::LaunchWide(params, words, 0, stream));
  if (kernel == Kernel::kNarrow) CUDA_OK(cuda::LaunchNarrow(params, 0, stream));
}
void Launch(const SampledParams& params, const Device& workspace, cudaStream_t stream, Kernel) {
  CUDA_OK(cuda::LaunchSampled(params, static_cast<int32_t*>(workspace.data()), 0, stream));
}

bool IsHopper() {
  int major = 0, minor = 0;
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CUDA_OK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  return major * 10 + minor == cuda::Limits::kComputeCapability;
}

// Whether the kernels do not take a problem, and say why.
template <typename Params>
bool IsRefused(const std::string& what, const Params& params, const std::string& because) {
  const std::string reason = Refusal(params);
  const bool right = reason.find(because) != std::string::npos;
  std::printf("  %-28s refused: \"%s\"%s\n", what.c_str(), reason.c_str(), right ? "" : "   <-- FAILED");
  return right;
}

// Runs a problem of `count` elements of result, which come back as `order` puts them: as wanted, and again the same.
template <typename Params>
bool RunAndCompare(const std::string& what, Params params, int64_t count, const Wanted& want,
                   const std::function<std::vector<float>(std::vector<float>)>& order,
                   Kernel kernel = Kernel::kChosen) {
  Device out(count * SizeOf(params.out_dtype), 0xFF), workspace(Workspace(params) * 4, 0x7F);
  params.out = out.data();
  if (!IsHopper()) return IsRefused(what, params, "compute capability");
  if (const std::string reason = Refusal(params); !reason.empty()) {
    std::printf("  %-28s refused: \"%s\"   <-- FAILED\n", what.c_str(), reason.c_str());
    return false;
  }
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const auto launch = [&] { Launch(params, workspace, stream, kernel); };
  launch();
  CUDA_OK(cudaStreamSynchronize(stream));
  bool passed = Compare(what, want, order(Decode(out.Bytes(), params.out_dtype)), params.out_dtype);
  if (count > 0) passed &= Repeats({&out}, stream, launch);
  if (!out.GuardsIntact() || !workspace.GuardsIntact()) {
    passed = false, std::printf("  guard bytes overwritten   <-- FAILED\n");
  }
  CUDA_OK(cudaStreamDestroy(stream));
  return passed;
}

// ---- Products

enum class Pattern {
  kRandom,  // with an empty row and an empty column of blocks
  kFull,
  kEmpty,
  kUneven,   // one row and one column of blocks are full, of the others one block each is there
  kUnsorted  // random, in any order, some blocks twice
};

// In the lists of two out blocks, one of which is the second of a pair.
enum class Fault { kNone, kLargeId, kNegativeId, kLargePlace, kNegativePlace, kDecreasing, kBeyond, kNegative };

struct ProductCase {
  DType dtype = DType::kBF16;
  int64_t rows = 328, columns = 456, width = 200;
  int64_t block_rows = 64, block_columns = 64;
  int64_t batch = 1;
  bool matrix_batched = false, dense_batched = false;
  Pattern pattern = Pattern::kRandom;
  int64_t spare = 3;  // room for more blocks than there are
  Fault fault = Fault::kNone;
  bool spoiled = false;  // the dense operand holds a NaN and infinities
  Kernel kernel = Kernel::kChosen;
};

struct Block {
  int64_t row, column;
  int32_t place;
};

struct Matrix {
  int64_t batch, capacity = 0;
  std::vector<std::vector<Block>> blocks;  // of each matrix of the batch
  std::vector<float> data;                 // [batch, capacity, block_rows, block_columns]
};

Matrix MakeMatrix(const ProductCase& c, std::mt19937& rng) {
  Matrix matrix;
  matrix.batch = c.matrix_batched ? c.batch : 1;
  matrix.blocks.resize(matrix.batch);
  const int64_t rows = CeilDiv(c.rows, c.block_rows), columns = CeilDiv(c.columns, c.block_columns);
  const auto is_there = [&](int64_t i, int64_t j) {
    if (c.pattern == Pattern::kFull) return true;
    if (c.pattern == Pattern::kEmpty) return false;
    if (c.pattern == Pattern::kUneven) return i == 0 || j == 0;
    if ((i == 1 && rows > 2) || (j == 1 && columns > 2)) return false;
    return rng() % 2 == 0;
  };
  for (auto& blocks : matrix.blocks) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        if (is_there(i, j)) blocks.push_back({i, j, 0});
    matrix.capacity = std::max<int64_t>(matrix.capacity, blocks.size() + c.spare);
  }
  const int64_t size = c.block_rows * c.block_columns;
  matrix.data.assign(matrix.batch * matrix.capacity * size, NAN);
  for (int64_t m = 0; m < matrix.batch; ++m) {
    auto& blocks = matrix.blocks[m];
    std::vector<int32_t> places(matrix.capacity);
    for (int64_t i = 0; i < matrix.capacity; ++i) places[i] = static_cast<int32_t>(i);
    std::shuffle(places.begin(), places.end(), rng);
    for (size_t i = 0; i < blocks.size(); ++i) {
      Block& block = blocks[i];
      block.place = places[i];
      auto values = Normal(size, rng);
      for (int64_t r = 0; r < c.block_rows; ++r)
        for (int64_t k = 0; k < c.block_columns; ++k)
          if (block.row * c.block_rows + r >= c.rows || block.column * c.block_columns + k >= c.columns)
            values[r * c.block_columns + k] = 0;
      std::copy(values.begin(), values.end(), matrix.data.begin() + (m * matrix.capacity + block.place) * size);
    }
    if (c.pattern == Pattern::kUnsorted && !blocks.empty()) {
      for (int64_t i = 0; i < c.spare; ++i) blocks.push_back(blocks[rng() % blocks.size()]);
      std::shuffle(blocks.begin(), blocks.end(), rng);
    }
  }
  return matrix;
}

struct Lists {
  std::vector<int32_t> offsets, ids, places;
};

Lists MakeLists(const ProductCase& c, const Matrix& matrix, bool transposed, int64_t out_blocks, int64_t in_blocks) {
  Lists lists;
  for (int64_t m = 0; m < matrix.batch; ++m) {
    const size_t begin = m * matrix.capacity;
    lists.offsets.push_back(0);
    for (int64_t r = 0; r < out_blocks; ++r) {
      for (const Block& block : matrix.blocks[m])
        if ((transposed ? block.column : block.row) == r) {
          lists.ids.push_back(static_cast<int32_t>(transposed ? block.row : block.column));
          lists.places.push_back(block.place);
        }
      lists.offsets.push_back(static_cast<int32_t>(lists.ids.size() - begin));
    }
    lists.ids.resize(begin + matrix.capacity, -1);
    lists.places.resize(begin + matrix.capacity, -1);
    if (c.fault == Fault::kNone || m + 1 < matrix.batch) continue;
    for (const int64_t r : {int64_t{1}, int64_t{4}}) {
      if (r >= out_blocks) continue;
      int32_t* offset = &lists.offsets[m * (out_blocks + 1) + r];
      const size_t entry = begin + (offset[0] + offset[1]) / 2;
      if (c.fault == Fault::kLargeId) lists.ids[entry] = static_cast<int32_t>(in_blocks);
      if (c.fault == Fault::kNegativeId) lists.ids[entry] = -1;
      if (c.fault == Fault::kLargePlace) lists.places[entry] = static_cast<int32_t>(matrix.capacity);
      if (c.fault == Fault::kNegativePlace) lists.places[entry] = INT_MIN;
      if (c.fault == Fault::kDecreasing) offset[1] = offset[0] - 1;
      if (c.fault == Fault::kBeyond) offset[1] = static_cast<int32_t>(matrix.capacity + 1);
      if (c.fault == Fault::kNegative) offset[0] = -1;
    }
  }
  return lists;
}

// Of params with every size and the lists given on the host: [batch, out_length, width].
Wanted Reference(const ProductParams& p, const Lists& lists, const std::vector<float>& data,
                 const std::vector<float>& dense) {
  Wanted want(p.batch * p.out_length * p.width);
  const int64_t block_columns = p.transposed ? p.out_block : p.in_block;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t m = p.matrix_batch == 1 ? 0 : b, d = p.dense_batch == 1 ? 0 : b;
    for (int64_t r = 0; r < p.out_blocks; ++r) {
      const int64_t begin = lists.offsets[m * (p.out_blocks + 1) + r],
                    end = lists.offsets[m * (p.out_blocks + 1) + r + 1];
      const int64_t first = r * p.out_block, rows = std::min(p.out_block, p.out_length - first);
      bool poisoned = begin < 0 || end < begin || end > p.capacity;
      for (int64_t e = begin; e < end && !poisoned; ++e) {
        const int64_t id = lists.ids[m * p.capacity + e], place = lists.places[m * p.capacity + e];
        poisoned = id < 0 || id >= p.in_blocks || place < 0 || place >= p.capacity;
        if (poisoned) break;
        const float* block = data.data() + (m * p.capacity + place) * p.out_block * p.in_block;
        for (int64_t o = 0; o < rows; ++o)
          for (int64_t i = 0; i < std::min(p.in_block, p.in_length - id * p.in_block); ++i) {
            const double left = block[(p.transposed ? i : o) * block_columns + (p.transposed ? o : i)];
            const float* right = dense.data() + (d * p.in_length + id * p.in_block + i) * p.width;
            double* value = want.value.data() + (b * p.out_length + first + o) * p.width;
            double* terms = want.terms.data() + (b * p.out_length + first + o) * p.width;
            for (int64_t n = 0; n < p.width; ++n) {
              value[n] += left * right[n];
              terms[n] += std::abs(left * right[n]);
            }
          }
      }
      if (poisoned) {
        const auto at = want.value.begin() + (b * p.out_length + first) * p.width;
        std::fill(at, at + rows * p.width, std::numeric_limits<double>::quiet_NaN());
      }
    }
  }
  return want;
}

bool RunProduct(const ProductCase& c) {
  std::mt19937 rng(1234);
  Matrix matrix = MakeMatrix(c, rng);
  const Exact data(Encode(matrix.data, c.dtype));
  bool passed = true;
  for (const bool transposed : {false, true}) {
    ProductParams p{};
    p.dtype = c.dtype;
    p.batch = c.batch, p.matrix_batch = matrix.batch, p.dense_batch = c.dense_batched ? c.batch : 1;
    p.out_length = transposed ? c.columns : c.rows, p.in_length = transposed ? c.rows : c.columns;
    p.out_block = transposed ? c.block_columns : c.block_rows;
    p.in_block = transposed ? c.block_rows : c.block_columns;
    p.out_blocks = CeilDiv(p.out_length, p.out_block), p.in_blocks = CeilDiv(p.in_length, p.in_block);
    p.width = c.width, p.capacity = matrix.capacity, p.transposed = transposed;

    const Lists lists = MakeLists(c, matrix, transposed, p.out_blocks, p.in_blocks);
    auto dense = Normal(p.dense_batch * p.in_length * p.width, rng);
    if (c.spoiled) {
      dense[3 * p.width + 5] = NAN;
      dense[(p.in_length / 2) * p.width + p.width - 1] = INFINITY;
      dense[dense.size() - 1 - p.width / 2] = -INFINITY;
    }
    auto swapped = Transposed(dense, p.dense_batch, p.in_length, p.width);
    const Exact lies(Encode(dense, c.dtype)), stands(Encode(swapped, c.dtype));
    const Exact offsets(lists.offsets), ids(lists.ids), places(lists.places);
    p.data = data.data(), p.lists = {Words(offsets), Words(ids), Words(places)};
    const Wanted want = Reference(p, lists, matrix.data, dense);

    for (const bool dense_left : {false, true})
      for (const DType out_dtype : {DType::kF32, c.dtype}) {
        p.dense_left = dense_left, p.out_dtype = out_dtype, p.dense = dense_left ? stands.data() : lies.data();
        const std::string form = dense_left ? transposed ? "b A" : "b A^T" : transposed ? "A^T b" : "A b";
        const std::string what = form + " to " + NameOf(out_dtype);
        if (dense_left ? !Aligned(p.in_length) || !Aligned(p.out_length) : !Aligned(p.width)) {
          passed &= IsRefused(what, p, "multiple of 8");
          continue;
        }
        const auto order = [&](std::vector<float> got) {
          return dense_left ? Transposed(got, p.batch, p.width, p.out_length) : got;
        };
        passed &= RunAndCompare(what, p, p.batch * p.out_length * p.width, want, order, c.kernel);
      }
  }
  return passed;
}

// Products of few columns whose bits must not depend on what else is computed: three columns alone, 64, as many as the
// kernel takes, and as many of each of three examples, of which the last are these.
bool RunInvariance(int64_t block) {
  if (!IsHopper()) return true;
  std::mt19937 rng(99);
  ProductCase c;
  c.block_rows = c.block_columns = block, c.rows = 1288, c.columns = 1400, c.width = cuda::Limits::kNarrowWidth;
  Matrix matrix = MakeMatrix(c, rng);
  ProductParams p{};
  p.dtype = p.out_dtype = c.dtype;
  p.batch = p.matrix_batch = p.dense_batch = 1;
  p.out_length = c.rows, p.in_length = c.columns, p.out_block = p.in_block = block;
  p.out_blocks = CeilDiv(p.out_length, block), p.in_blocks = CeilDiv(p.in_length, block);
  p.capacity = matrix.capacity, p.dense_left = true;
  const Lists lists = MakeLists(c, matrix, false, p.out_blocks, p.in_blocks);
  auto dense = Normal(3 * c.width * c.columns, rng);
  const auto bytes = Encode(dense, c.dtype);
  const size_t example = bytes.size() / 3, row = c.rows * 2;
  const Exact data(Encode(matrix.data, c.dtype)), all(bytes);
  const Exact last(std::vector<uint8_t>(bytes.end() - example, bytes.end()));
  const Exact offsets(lists.offsets), ids(lists.ids), places(lists.places);
  p.data = data.data(), p.lists = {Words(offsets), Words(ids), Words(places)};
  const Device workspace(Workspace(p) * 4);
  const auto run = [&](int64_t batch, int64_t width) {
    p.batch = p.dense_batch = batch, p.width = width, p.dense = batch == 1 ? last.data() : all.data();
    const Device out(batch * width * row, 0xFF);
    p.out = out.data();
    Launch(p, workspace, nullptr, Kernel::kChosen);
    CUDA_OK(cudaDeviceSynchronize());
    return out.Bytes();
  };
  const auto three = run(1, 3), some = run(1, 64), full = run(1, c.width), batch = run(3, c.width);
  const bool columns =
      std::equal(three.begin(), three.end(), full.begin()) && std::equal(some.begin(), some.end(), full.begin());
  const bool examples = std::equal(full.begin(), full.end(), batch.end() - full.size());
  std::printf("  three and 64 columns: %s; an example of three: %s\n", columns ? "the same" : "other bits   <-- FAILED",
              examples ? "the same" : "other bits   <-- FAILED");
  return columns && examples;
}

// Which kernel a product takes: by its width alone.
bool RunChoice() {
  bool passed = true;
  for (const int64_t width : {1, 2, 8, 64, 65, 127, 128, 129, 4096})
    for (const int64_t block : {64, 128})
      for (const int64_t blocks : {1, 64, 4096}) {
        ProductParams p{};
        p.batch = 1, p.width = width, p.out_block = block, p.out_blocks = blocks;
        passed &= cuda::IsNarrow(p) == (width <= cuda::Limits::kNarrowWidth);
      }
  ProductParams huge{};
  huge.batch = huge.width = 8, huge.out_block = 128, huge.out_blocks = int64_t{1} << 27;
  passed &= !cuda::IsNarrow(huge);  // more CTAs than a grid has
  std::printf("  up to %d columns%s\n", cuda::Limits::kNarrowWidth, passed ? "" : "   <-- FAILED");
  return passed;
}

// ---- Sampled products

enum class Entries {
  kSorted,   // by rows, which have some, one or none, and the last two no row at all
  kAll,      // every block, one row after the other
  kSingles,  // each of another row than the one before
  kNone,     // of no row
  kWild      // sorted, some of rows and columns that do not exist
};

struct SampledCase {
  DType dtype = DType::kBF16;
  int64_t rows = 328, columns = 456, depth = 200;
  int64_t block_rows = 64, block_columns = 64;
  int64_t batch = 1;
  bool left_batched = false, right_batched = false, lists_batched = false;
  Entries entries = Entries::kSorted;
  int64_t capacity = 22;  // of kAll: what is needed
  bool spoiled = false;   // the operands hold a NaN and infinities
};

struct Pairs {
  std::vector<int32_t> rows, columns;  // [lists, capacity]
};

Pairs MakePairs(const SampledCase& c, int64_t lists, int64_t row_blocks, int64_t column_blocks, std::mt19937& rng) {
  Pairs pairs;
  for (int64_t list = 0; list < lists; ++list) {
    std::vector<int32_t> rows, columns;
    for (int64_t e = 0; e < c.capacity; ++e) {
      rows.push_back(static_cast<int32_t>(rng() % std::max<int64_t>(row_blocks, 1)));
      columns.push_back(static_cast<int32_t>(rng() % std::max<int64_t>(column_blocks, 1)));
      if (c.entries == Entries::kAll) rows[e] = e / column_blocks, columns[e] = e % column_blocks;
      if (c.entries == Entries::kSingles) rows[e] = e % row_blocks;
      if (c.entries == Entries::kNone) rows[e] = columns[e] = -1;
    }
    if (c.entries == Entries::kSorted || c.entries == Entries::kWild) {
      std::sort(rows.begin(), rows.end());
      for (int64_t e = std::max<int64_t>(c.capacity - 2, 0); e < c.capacity; ++e) rows[e] = columns[e] = -1;
    }
    if (c.entries == Entries::kWild) {
      columns[1] = static_cast<int32_t>(column_blocks), columns[4] = -1, columns[6] = INT_MAX, columns[7] = INT_MIN;
      rows[9] = static_cast<int32_t>(row_blocks), rows[10] = INT_MAX, rows[11] = rows[12] = INT_MIN, rows[14] = -5;
    }
    pairs.rows.insert(pairs.rows.end(), rows.begin(), rows.end());
    pairs.columns.insert(pairs.columns.end(), columns.begin(), columns.end());
  }
  return pairs;
}

// Of operands as they are written: [left_batch, rows, depth] and [right_batch, depth, columns].
Wanted Reference(const SampledParams& p, const Pairs& pairs, const std::vector<float>& left,
                 const std::vector<float>& right) {
  Wanted want(p.batch * p.capacity * p.block_rows * p.block_columns);
  for (int64_t b = 0; b < p.batch; ++b) {
    const float* a = left.data() + (p.left_batch == 1 ? 0 : b) * p.rows * p.depth;
    const float* d = right.data() + (p.right_batch == 1 ? 0 : b) * p.depth * p.columns;
    for (int64_t e = 0; e < p.capacity; ++e) {
      const int64_t at = (p.list_batch == 1 ? 0 : b) * p.capacity + e, row = pairs.rows[at], column = pairs.columns[at];
      if (row < 0 || row >= p.row_blocks || column < 0 || column >= p.column_blocks) continue;
      const int64_t first_row = row * p.block_rows, first_column = column * p.block_columns;
      const int64_t columns = std::min(p.block_columns, p.columns - first_column);
      for (int64_t r = 0; r < std::min(p.block_rows, p.rows - first_row); ++r) {
        const int64_t place = ((b * p.capacity + e) * p.block_rows + r) * p.block_columns;
        for (int64_t l = 0; l < p.depth; ++l) {
          const double x = a[(first_row + r) * p.depth + l];
          const float* y = d + l * p.columns + first_column;
          for (int64_t k = 0; k < columns; ++k) {
            want.value[place + k] += x * y[k];
            want.terms[place + k] += std::abs(x * y[k]);
          }
        }
      }
    }
  }
  return want;
}

bool RunSampled(SampledCase c) {
  std::mt19937 rng(4321);
  SampledParams p{};
  p.dtype = c.dtype;
  p.batch = c.batch, p.left_batch = c.left_batched ? c.batch : 1, p.right_batch = c.right_batched ? c.batch : 1;
  p.list_batch = c.lists_batched ? c.batch : 1;
  p.rows = c.rows, p.columns = c.columns, p.depth = c.depth;
  p.block_rows = c.block_rows, p.block_columns = c.block_columns;
  p.row_blocks = CeilDiv(c.rows, c.block_rows), p.column_blocks = CeilDiv(c.columns, c.block_columns);
  if (c.entries == Entries::kAll) c.capacity = p.row_blocks * p.column_blocks;
  p.capacity = c.capacity;

  const Pairs pairs = MakePairs(c, p.list_batch, p.row_blocks, p.column_blocks, rng);
  auto left = Normal(p.left_batch * p.rows * p.depth, rng), right = Normal(p.right_batch * p.depth * p.columns, rng);
  if (c.spoiled) {
    left[5 * p.depth + 7] = INFINITY, left[(p.rows - 1) * p.depth] = NAN;
    right[3 * p.columns + 9] = -INFINITY, right[(p.depth - 1) * p.columns + p.columns - 2] = NAN;
  }
  auto left_swapped = Transposed(left, p.left_batch, p.rows, p.depth);
  auto right_swapped = Transposed(right, p.right_batch, p.depth, p.columns);
  const Exact lefts[] = {Exact(Encode(left, c.dtype)), Exact(Encode(left_swapped, c.dtype))};
  const Exact rights[] = {Exact(Encode(right, c.dtype)), Exact(Encode(right_swapped, c.dtype))};
  const Exact row_ids(pairs.rows), column_ids(pairs.columns);
  p.row_ids = Words(row_ids), p.column_ids = Words(column_ids);
  const Wanted want = Reference(p, pairs, left, right);

  bool passed = true;
  for (const bool left_transposed : {false, true})
    for (const bool right_transposed : {false, true})
      for (const DType out_dtype : {DType::kF32, c.dtype}) {
        p.left_transposed = left_transposed, p.right_transposed = right_transposed, p.out_dtype = out_dtype;
        p.left = lefts[left_transposed].data(), p.right = rights[right_transposed].data();
        const std::string what = std::string(left_transposed ? "left^T " : "left ") +
                                 (right_transposed ? "right^T to " : "right to ") + NameOf(out_dtype);
        if (!Aligned(left_transposed ? p.rows : p.depth) || !Aligned(right_transposed ? p.depth : p.columns)) {
          passed &= IsRefused(what, p, "multiple of 8");
          continue;
        }
        passed &= RunAndCompare(what, p, p.batch * p.capacity * p.block_rows * p.block_columns, want,
                                [](std::vector<float> got) { return got; });
      }
  return passed;
}

// ---- Refusals

bool RunRefusals() {
  const Device array(1 << 16);
  const int32_t* words = static_cast<const int32_t*>(array.data());
  ProductParams product{};
  product.dtype = product.out_dtype = DType::kBF16;
  product.batch = product.matrix_batch = product.dense_batch = 1;
  product.out_length = product.in_length = product.width = product.out_block = product.in_block = 64;
  product.out_blocks = product.in_blocks = product.capacity = 1;
  product.data = product.dense = array.data(), product.out = array.data(), product.lists = {words, words, words};
  SampledParams sampled{};
  sampled.dtype = sampled.out_dtype = DType::kBF16;
  sampled.batch = sampled.left_batch = sampled.right_batch = sampled.list_batch = 1;
  sampled.rows = sampled.columns = sampled.depth = sampled.block_rows = sampled.block_columns = 64;
  sampled.row_blocks = sampled.column_blocks = sampled.capacity = 1;
  sampled.left = sampled.right = array.data(), sampled.out = array.data();
  sampled.row_ids = sampled.column_ids = words;

  const bool takes = IsHopper();
  bool passed = Refusal(product).empty() == takes && Refusal(sampled).empty() == takes;
  const auto refuses = [&](const char* what, const char* because, auto params, const auto& change) {
    change(params);
    passed &= IsRefused(what, params, because);
  };
  const void* odd = static_cast<const char*>(array.data()) + 8;
  refuses("float32", "float16 and bfloat16", product, [](auto& p) { p.dtype = p.out_dtype = DType::kF32; });
  refuses("float64", "float16 and bfloat16", sampled, [](auto& p) { p.dtype = p.out_dtype = DType::kF64; });
  refuses("blocks of 32 rows", "not 32", product, [](auto& p) { p.out_block = 32; });
  refuses("blocks of 256 columns", "not 256", sampled, [](auto& p) { p.block_columns = 256; });
  refuses("blocks that lie askew", "aligned to 16 bytes", product, [&](auto& p) { p.data = odd; });
  refuses("a right operand askew", "aligned to 16 bytes", sampled, [&](auto& p) { p.right = odd; });
  refuses("too many columns", "fewer than 2^31", product, [](auto& p) { p.width = int64_t{1} << 31; });
  refuses("too many blocks", "fewer than 2^31", sampled, [](auto& p) { p.capacity = int64_t{1} << 28; });
  return passed;
}

// ---- Times

// bfloat16 [4096, 4096] with some 22 % of the blocks, and [4096, 4096]; the first launches are Nsight Compute's.
bool TimeProducts(int64_t block) {
  constexpr int64_t kLength = 4096;
  const int64_t blocks = kLength / block;
  std::mt19937 rng(7);
  const auto random = [&](int64_t count) {
    auto some = Normal(1 << 16, rng);
    const auto bytes = Encode(some, DType::kBF16);
    std::vector<uint8_t> all(count * 2);
    for (size_t i = 0; i < all.size(); ++i) all[i] = bytes[i % bytes.size()];
    return all;
  };
  // Lists of rows and of columns; a block's place is where it is among the rows'.
  std::vector<int32_t> offsets[2] = {{0}, {0}}, ids[2], places[2];
  std::vector<std::vector<std::pair<int32_t, int32_t>>> columns(blocks);
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t j = 0; j < blocks; ++j) {
      if (rng() % 100 >= 22) continue;
      const auto place = static_cast<int32_t>(rows.size());
      columns[j].push_back({static_cast<int32_t>(i), place});
      rows.push_back(static_cast<int32_t>(i));
      ids[0].push_back(static_cast<int32_t>(j));
      places[0].push_back(place);
    }
    offsets[0].push_back(static_cast<int32_t>(rows.size()));
  }
  for (const auto& column : columns) {
    for (const auto& [row, place] : column) ids[1].push_back(row), places[1].push_back(place);
    offsets[1].push_back(static_cast<int32_t>(ids[1].size()));
  }
  const auto capacity = static_cast<int64_t>(rows.size());
  const double flops = 2. * capacity * block * block * kLength;
  std::printf("  %.1f %% of the blocks\n", 100. * capacity / (blocks * blocks));
  const auto time = [&](const char* what, const auto& params) {
    const Device workspace(Workspace(params) * 4);
    if (!Refusal(params).empty()) std::printf("REFUSED: %s\n", Refusal(params).c_str()), std::exit(3);
    const Milliseconds ms = Time([&] { Launch(params, workspace, nullptr, Kernel::kChosen); });
    std::printf("  %-16s %.3f ms median, %.3f ms best, %.0f TFLOP/s of the blocks\n", what, ms.median, ms.best,
                flops / ms.median * 1e-9);
  };
  const Exact data(random(capacity * block * block)), dense(random(kLength * kLength));
  const Exact row_ids(rows), column_ids(ids[0]);
  const Device out(std::max(kLength * kLength, capacity * block * block) * 2);
  const Exact list[2][3] = {{Exact(offsets[0]), Exact(ids[0]), Exact(places[0])},
                            {Exact(offsets[1]), Exact(ids[1]), Exact(places[1])}};

  ProductParams product{};
  product.dtype = product.out_dtype = DType::kBF16;
  product.batch = product.matrix_batch = product.dense_batch = 1;
  product.out_length = product.in_length = product.width = kLength;
  product.out_block = product.in_block = block, product.out_blocks = product.in_blocks = blocks;
  product.capacity = capacity;
  product.data = data.data(), product.dense = dense.data(), product.out = out.data();
  for (const bool dense_left : {false, true})
    for (const bool transposed : {false, true}) {
      product.transposed = transposed, product.dense_left = dense_left;
      product.lists = {Words(list[transposed][0]), Words(list[transposed][1]), Words(list[transposed][2])};
      time(dense_left ? transposed ? "b A" : "b A^T" : transposed ? "A^T b" : "A b", product);
    }

  SampledParams sampled{};
  sampled.dtype = sampled.out_dtype = DType::kBF16;
  sampled.batch = sampled.left_batch = sampled.right_batch = sampled.list_batch = 1;
  sampled.rows = sampled.columns = sampled.depth = kLength;
  sampled.block_rows = sampled.block_columns = block, sampled.row_blocks = sampled.column_blocks = blocks;
  sampled.capacity = capacity;
  sampled.left = sampled.right = dense.data(), sampled.out = out.data();
  sampled.row_ids = Words(row_ids), sampled.column_ids = Words(column_ids);
  for (const bool left : {false, true})
    for (const bool right : {false, true}) {
      sampled.left_transposed = left, sampled.right_transposed = right;
      time(left ? right ? "left^T right^T" : "left^T right" : right ? "left right^T" : "left right", sampled);
    }
  return true;
}

// Both kernels of the product, bfloat16 [8192, 8192] with 22 % of the blocks, by the width: microseconds of a call
// among twenty in a CUDA graph, and the stored blocks' bytes by it. All calls take one matrix, or four in turn, each
// with its own lists, which L2 cannot keep.
bool TimeNarrow(int64_t block) {
  constexpr int64_t kLength = 8192, kMost = 256;
  constexpr int kCalls = 20, kMatrices = 4;
  const int64_t blocks = kLength / block;
  std::mt19937 rng(7);
  std::vector<int32_t> offsets[2] = {{0}, {0}}, ids[2], places[2];
  std::vector<std::vector<std::pair<int32_t, int32_t>>> columns(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t j = 0; j < blocks; ++j) {
      if (rng() % 100 >= 22) continue;
      const auto place = static_cast<int32_t>(ids[0].size());
      columns[j].push_back({static_cast<int32_t>(i), place});
      ids[0].push_back(static_cast<int32_t>(j));
      places[0].push_back(place);
    }
    offsets[0].push_back(static_cast<int32_t>(ids[0].size()));
  }
  for (const auto& column : columns) {
    for (const auto& [row, place] : column) ids[1].push_back(row), places[1].push_back(place);
    offsets[1].push_back(static_cast<int32_t>(ids[1].size()));
  }
  const auto capacity = static_cast<int64_t>(ids[0].size());
  const int64_t size = capacity * block * block * 2;  // bytes of a matrix
  const Device data(kMatrices * size), dense(kLength * kMost * 2), out(kLength * kMost * 2);
  std::deque<Exact> lists[2][3];  // of the matrices, all alike
  for (int i = 0; i < kMatrices; ++i)
    for (int t = 0; t < 2; ++t) {
      lists[t][0].emplace_back(offsets[t]), lists[t][1].emplace_back(ids[t]), lists[t][2].emplace_back(places[t]);
    }
  ProductParams p{};
  p.dtype = p.out_dtype = DType::kBF16;
  p.batch = p.matrix_batch = p.dense_batch = 1;
  p.out_length = p.in_length = kLength, p.out_block = p.in_block = block, p.out_blocks = p.in_blocks = blocks;
  p.capacity = capacity, p.data = data.data(), p.dense = dense.data(), p.out = out.data();
  const Device workspace(Workspace(p) * 4);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  std::printf("  %.1f %% of the blocks, %.1f MB; columns: narrow us (TB/s), of four in turn us (TB/s), wide us\n",
              100. * capacity / (blocks * blocks), size * 1e-6);
  for (const bool dense_left : {false, true})
    for (const bool transposed : {false, true}) {
      p.transposed = transposed, p.dense_left = dense_left;
      std::printf("  %-6s", dense_left ? transposed ? "b A" : "b A^T" : transposed ? "A^T b" : "A b");
      for (const int64_t width : {1, 8, 16, 32, 64, 96, 128, 256}) {
        if (!dense_left && width % 8 != 0) continue;
        p.width = width;
        const auto time = [&](Kernel kernel, int matrices) {
          const auto call = [&](int i) {
            const auto& list = lists[transposed];
            const int at = i % matrices;
            p.data = static_cast<const char*>(data.data()) + at * size;
            p.lists = {Words(list[0][at]), Words(list[1][at]), Words(list[2][at])};
            Launch(p, workspace, stream, kernel);
          };
          call(0);  // loads the kernel, which a capture must not
          CUDA_OK(cudaStreamSynchronize(stream));
          cudaGraph_t graph;
          cudaGraphExec_t executable;
          CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
          for (int i = 0; i < kCalls; ++i) call(i);
          CUDA_OK(cudaStreamEndCapture(stream, &graph));
          CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
          const double us = Time([&] { CUDA_OK(cudaGraphLaunch(executable, nullptr)); }).median * 1e3 / kCalls;
          CUDA_OK(cudaGraphExecDestroy(executable));
          CUDA_OK(cudaGraphDestroy(graph));
          return us;
        };
        const double one = time(Kernel::kNarrow, 1), turns = time(Kernel::kNarrow, kMatrices);
        std::printf("  %d: %.1f (%.2f) %.1f (%.2f) %.1f", static_cast<int>(width), one, size * 1e-6 / one, turns,
                    size * 1e-6 / turns, time(Kernel::kWide, 1));
      }
      std::printf("\n");
    }
  CUDA_OK(cudaStreamDestroy(stream));
  return true;
}

// ---- Cases

struct Named {
  std::string name;
  std::function<bool()> run;
};

std::vector<Named> Cases() {
  std::vector<Named> cases;
  const auto add = [&](const std::string& name, const std::function<bool()>& run) { cases.push_back({name, run}); };
  const auto product = [&](const std::string& name, const std::function<void(ProductCase&)>& change) {
    ProductCase c;
    change(c);
    add(name, [c] { return RunProduct(c); });
  };
  const auto sampled = [&](const std::string& name, const std::function<void(SampledCase&)>& change) {
    SampledCase c;
    change(c);
    add(name, [c] { return RunSampled(c); });
  };
  using P = Pattern;
  using E = Entries;

  // Every instantiation, with ends of blocks and of pieces in all dimensions, for compute-sanitizer as well.
  for (const DType dtype : {DType::kBF16, DType::kF16})
    for (const auto& [block_rows, block_columns] : {std::pair{128, 128}, {64, 64}, {128, 64}, {64, 128}}) {
      const std::string of = std::string(dtype == DType::kBF16 ? "bf16-" : "f16-") + std::to_string(block_rows) +
                             (block_rows == block_columns ? "" : "x" + std::to_string(block_columns));
      product("matmul-product-" + of, [&, bm = block_rows, bk = block_columns](ProductCase& c) {
        c.dtype = dtype, c.block_rows = bm, c.block_columns = bk;
      });
      sampled("matmul-sampled-" + of, [&, bm = block_rows, bk = block_columns](SampledCase& c) {
        c.dtype = dtype, c.block_rows = bm, c.block_columns = bk;
      });
    }

  // Sizes. The dense operand on the right is fetched in one box where the width is a multiple of 64.
  product("matmul-product-whole", [](ProductCase& c) { c.rows = c.columns = 384, c.width = 192; });
  product("matmul-product-whole-128",
          [](ProductCase& c) { c.rows = c.columns = 384, c.width = 512, c.block_rows = c.block_columns = 128; });
  product("matmul-product-wide", [](ProductCase& c) { c.rows = 136, c.columns = 200, c.width = 1096; });
  product("matmul-product-wide-whole",
          [](ProductCase& c) { c.rows = 136, c.columns = 200, c.width = 832, c.block_rows = c.block_columns = 128; });
  // Panels: of two parts of 512 columns and of one; four of one part, the first of which is gone through backwards.
  product("matmul-product-panels", [](ProductCase& c) { c.rows = 136, c.columns = 8192, c.width = 1160, c.batch = 2; });
  product("matmul-product-panels-128", [](ProductCase& c) {
    c.rows = 136, c.columns = 16384, c.width = 1544, c.block_rows = c.block_columns = 128;
  });
  product("matmul-product-least",
          [](ProductCase& c) { c.rows = c.columns = c.width = 8, c.pattern = P::kFull, c.kernel = Kernel::kWide; });
  product("matmul-product-least-128", [](ProductCase& c) {
    c.rows = c.columns = c.width = 8, c.pattern = P::kFull, c.kernel = Kernel::kWide;
    c.block_rows = c.block_columns = 128;
  });
  product("matmul-product-odd-lengths", [](ProductCase& c) { c.rows = 331, c.columns = 203, c.width = 136; });
  product("matmul-product-odd-width", [](ProductCase& c) { c.width = 133; });
  product("matmul-product-one-column",
          [](ProductCase& c) { c.width = 1, c.block_rows = c.block_columns = 128, c.kernel = Kernel::kWide; });
  product("matmul-product-no-columns", [](ProductCase& c) { c.columns = 0; });
  product("matmul-product-no-width", [](ProductCase& c) { c.width = 0; });

  // Patterns.
  product("matmul-product-full", [](ProductCase& c) { c.pattern = P::kFull, c.spare = 0; });
  product("matmul-product-full-128",
          [](ProductCase& c) { c.pattern = P::kFull, c.spare = 0, c.block_rows = c.block_columns = 128; });
  product("matmul-product-empty", [](ProductCase& c) { c.pattern = P::kEmpty; });
  product("matmul-product-empty-128", [](ProductCase& c) {
    c.pattern = P::kEmpty, c.block_rows = c.block_columns = 128, c.batch = 2, c.matrix_batched = true;
  });
  product("matmul-product-no-capacity", [](ProductCase& c) { c.pattern = P::kEmpty, c.spare = 0; });
  product("matmul-product-no-capacity-128",
          [](ProductCase& c) { c.pattern = P::kEmpty, c.spare = 0, c.block_rows = c.block_columns = 128; });
  product("matmul-product-uneven",
          [](ProductCase& c) { c.pattern = P::kUneven, c.rows = 1160, c.columns = 1400, c.width = 264; });
  product("matmul-product-uneven-128", [](ProductCase& c) {
    c.pattern = P::kUneven, c.rows = 1160, c.columns = 1400, c.width = 264, c.block_rows = c.block_columns = 128;
  });
  product("matmul-product-unsorted", [](ProductCase& c) { c.pattern = P::kUnsorted, c.spare = 5; });
  product("matmul-product-unsorted-128",
          [](ProductCase& c) { c.pattern = P::kUnsorted, c.spare = 5, c.block_rows = c.block_columns = 128; });

  // Batches, and so many tiles that each cluster takes several, of many lengths.
  product("matmul-product-batches", [](ProductCase& c) { c.batch = 3, c.matrix_batched = c.dense_batched = true; });
  product("matmul-product-shared-matrix", [](ProductCase& c) { c.batch = 3, c.dense_batched = true; });
  product("matmul-product-shared-dense",
          [](ProductCase& c) { c.batch = 3, c.matrix_batched = true, c.block_rows = c.block_columns = 128; });
  product("matmul-product-shared-both", [](ProductCase& c) { c.batch = 2; });
  product("matmul-product-many",
          [](ProductCase& c) { c.batch = 12, c.matrix_batched = true, c.rows = 1288, c.columns = 712, c.width = 200; });
  product("matmul-product-many-128", [](ProductCase& c) {
    c.batch = 24, c.dense_batched = true, c.rows = 1288, c.columns = 712, c.width = 200;
    c.block_rows = c.block_columns = 128;
  });

  // What is not finite, and lists that cannot be followed.
  product("matmul-product-nan", [](ProductCase& c) { c.spoiled = true; });
  product("matmul-product-nan-128", [](ProductCase& c) { c.spoiled = true, c.block_rows = c.block_columns = 128; });
  const std::pair<const char*, Fault> faults[] = {
      {"large-id", Fault::kLargeId},         {"negative-id", Fault::kNegativeId},
      {"large-place", Fault::kLargePlace},   {"negative-place", Fault::kNegativePlace},
      {"decreasing", Fault::kDecreasing},    {"overflow", Fault::kBeyond},
      {"negative-offset", Fault::kNegative},
  };
  for (const auto& [name, fault] : faults)
    for (const int block : {64, 128})
      product("matmul-product-" + std::string(name) + "-" + std::to_string(block), [&, fault = fault](ProductCase& c) {
        c.fault = fault, c.pattern = P::kFull, c.block_rows = c.block_columns = block;
        c.batch = 2, c.matrix_batched = block == 64;
      });

  // Few columns: tiles of 8, 32 and 64 of them, in part and whole.
  for (const DType dtype : {DType::kBF16, DType::kF16})
    for (const auto& [block_rows, block_columns] : {std::pair{128, 128}, {64, 64}, {128, 64}, {64, 128}})
      for (const int width : {8, 32, 64})
        product("matmul-narrow-" + std::string(dtype == DType::kBF16 ? "bf16-" : "f16-") + std::to_string(block_rows) +
                    (block_rows == block_columns ? "" : "x" + std::to_string(block_columns)) + "-" +
                    std::to_string(width),
                [&, bm = block_rows, bk = block_columns, n = width](ProductCase& c) {
                  c.dtype = dtype, c.block_rows = bm, c.block_columns = bk, c.width = n;
                });
  product("matmul-narrow-one", [](ProductCase& c) { c.width = 1; });
  product("matmul-narrow-one-128", [](ProductCase& c) { c.width = 1, c.block_rows = c.block_columns = 128; });
  product("matmul-narrow-two", [](ProductCase& c) { c.width = 2, c.block_rows = c.block_columns = 128; });
  product("matmul-narrow-seven", [](ProductCase& c) { c.width = 7; });
  product("matmul-narrow-nine", [](ProductCase& c) { c.width = 9, c.block_rows = c.block_columns = 128; });
  product("matmul-narrow-sixteen", [](ProductCase& c) { c.width = 16; });
  product("matmul-narrow-thirty-three", [](ProductCase& c) { c.width = 33; });
  product("matmul-narrow-forty", [](ProductCase& c) { c.width = 40, c.block_rows = c.block_columns = 128; });
  // Groups of 64 columns, in part and whole.
  product("matmul-narrow-groups", [](ProductCase& c) { c.width = 72, c.batch = 2, c.dense_batched = true; });
  product("matmul-narrow-groups-128", [](ProductCase& c) { c.width = 128, c.block_rows = c.block_columns = 128; });
  product("matmul-narrow-least", [](ProductCase& c) { c.rows = c.columns = c.width = 8, c.pattern = P::kFull; });
  product("matmul-narrow-least-128", [](ProductCase& c) {
    c.rows = c.columns = c.width = 8, c.pattern = P::kFull, c.block_rows = c.block_columns = 128;
  });
  product("matmul-narrow-odd-lengths", [](ProductCase& c) { c.rows = 331, c.columns = 203, c.width = 24; });
  product("matmul-narrow-no-columns", [](ProductCase& c) { c.columns = 0, c.width = 8; });
  product("matmul-narrow-no-width", [](ProductCase& c) { c.width = 0, c.kernel = Kernel::kNarrow; });
  // Lists that wrap every ring many times and are read in several chunks, and rows of all lengths.
  product("matmul-narrow-long",
          [](ProductCase& c) { c.rows = 136, c.columns = 8200, c.width = 8, c.pattern = P::kFull; });
  product("matmul-narrow-long-128", [](ProductCase& c) {
    c.rows = 136, c.columns = 20104, c.width = 64, c.pattern = P::kFull, c.block_rows = c.block_columns = 128;
  });
  product("matmul-narrow-long-128x64", [](ProductCase& c) {
    c.rows = 136, c.columns = 8712, c.width = 32, c.pattern = P::kFull, c.block_rows = 128;
  });
  product("matmul-narrow-full", [](ProductCase& c) { c.pattern = P::kFull, c.spare = 0, c.width = 64; });
  product("matmul-narrow-empty", [](ProductCase& c) { c.pattern = P::kEmpty, c.width = 8; });
  product("matmul-narrow-empty-128", [](ProductCase& c) {
    c.pattern = P::kEmpty, c.block_rows = c.block_columns = 128, c.width = 40, c.batch = 2, c.matrix_batched = true;
  });
  product("matmul-narrow-no-capacity", [](ProductCase& c) { c.pattern = P::kEmpty, c.spare = 0, c.width = 8; });
  product("matmul-narrow-uneven",
          [](ProductCase& c) { c.pattern = P::kUneven, c.rows = 1160, c.columns = 1400, c.width = 16; });
  product("matmul-narrow-uneven-128", [](ProductCase& c) {
    c.pattern = P::kUneven, c.rows = 1160, c.columns = 1400, c.width = 64, c.block_rows = c.block_columns = 128;
  });
  product("matmul-narrow-unsorted", [](ProductCase& c) { c.pattern = P::kUnsorted, c.spare = 5, c.width = 8; });
  product("matmul-narrow-unsorted-128", [](ProductCase& c) {
    c.pattern = P::kUnsorted, c.spare = 5, c.width = 64, c.block_rows = c.block_columns = 128;
  });
  product("matmul-narrow-batches",
          [](ProductCase& c) { c.batch = 3, c.matrix_batched = c.dense_batched = true, c.width = 24; });
  product("matmul-narrow-shared-matrix", [](ProductCase& c) { c.batch = 3, c.dense_batched = true, c.width = 8; });
  product("matmul-narrow-shared-dense", [](ProductCase& c) {
    c.batch = 3, c.matrix_batched = true, c.block_rows = c.block_columns = 128, c.width = 64;
  });
  // Several waves of clusters.
  product("matmul-narrow-many",
          [](ProductCase& c) { c.batch = 16, c.matrix_batched = true, c.rows = 1288, c.columns = 712, c.width = 8; });
  product("matmul-narrow-many-128", [](ProductCase& c) {
    c.batch = 24, c.dense_batched = true, c.rows = 1288, c.columns = 712, c.width = 64;
    c.block_rows = c.block_columns = 128;
  });
  product("matmul-narrow-nan", [](ProductCase& c) { c.spoiled = true, c.width = 16; });
  product("matmul-narrow-nan-128",
          [](ProductCase& c) { c.spoiled = true, c.width = 64, c.block_rows = c.block_columns = 128; });
  for (const auto& [name, fault] : faults)
    for (const int block : {64, 128})
      product("matmul-narrow-" + std::string(name) + "-" + std::to_string(block), [&, fault = fault](ProductCase& c) {
        c.fault = fault, c.pattern = P::kFull, c.block_rows = c.block_columns = block, c.width = 8;
        c.batch = 2, c.matrix_batched = block == 64;
      });
  add("matmul-narrow-invariance", [] { return RunInvariance(64); });
  add("matmul-narrow-invariance-128", [] { return RunInvariance(128); });
  add("matmul-narrow-choice", RunChoice);

  sampled("matmul-sampled-whole", [](SampledCase& c) { c.rows = 384, c.columns = 512, c.depth = 128; });
  sampled("matmul-sampled-whole-128",
          [](SampledCase& c) { c.rows = 384, c.columns = 512, c.depth = 128, c.block_rows = c.block_columns = 128; });
  sampled("matmul-sampled-least", [](SampledCase& c) { c.rows = c.columns = c.depth = 8, c.capacity = 3; });
  sampled("matmul-sampled-odd-lengths", [](SampledCase& c) { c.rows = 331, c.columns = 203, c.entries = E::kAll; });
  sampled("matmul-sampled-odd-depth", [](SampledCase& c) { c.depth = 133, c.entries = E::kAll; });
  sampled("matmul-sampled-no-depth", [](SampledCase& c) { c.depth = 0; });
  sampled("matmul-sampled-no-rows", [](SampledCase& c) { c.rows = 0; });
  sampled("matmul-sampled-no-capacity", [](SampledCase& c) { c.capacity = 0; });
  sampled("matmul-sampled-none", [](SampledCase& c) { c.entries = E::kNone; });
  sampled("matmul-sampled-all", [](SampledCase& c) { c.entries = E::kAll; });
  sampled("matmul-sampled-all-128",
          [](SampledCase& c) { c.entries = E::kAll, c.block_rows = c.block_columns = 128, c.depth = 392; });
  sampled("matmul-sampled-wild", [](SampledCase& c) { c.entries = E::kWild; });
  sampled("matmul-sampled-wild-128",
          [](SampledCase& c) { c.entries = E::kWild, c.block_rows = c.block_columns = 128; });
  sampled("matmul-sampled-nan", [](SampledCase& c) { c.entries = E::kAll, c.spoiled = true; });
  sampled("matmul-sampled-nan-128",
          [](SampledCase& c) { c.entries = E::kAll, c.spoiled = true, c.block_rows = c.block_columns = 128; });
  // One entry after the other, as fast as they come: results that wait to be copied must not be overwritten.
  sampled("matmul-sampled-singles",
          [](SampledCase& c) { c.entries = E::kSingles, c.rows = 136, c.depth = 8, c.capacity = 700; });
  sampled("matmul-sampled-singles-128x64", [](SampledCase& c) {
    c.entries = E::kSingles, c.rows = 264, c.depth = 8, c.capacity = 500, c.block_rows = 128;
  });
  // More entries than are grouped at a time.
  sampled("matmul-sampled-grouped",
          [](SampledCase& c) { c.rows = 20000, c.columns = 968, c.depth = 8, c.capacity = 2600; });
  sampled("matmul-sampled-grouped-128", [](SampledCase& c) {
    c.rows = 20000, c.columns = 968, c.depth = 8, c.capacity = 1300, c.block_rows = c.block_columns = 128;
    c.batch = 2, c.lists_batched = true;
  });
  sampled("matmul-sampled-batches",
          [](SampledCase& c) { c.batch = 3, c.left_batched = c.right_batched = c.lists_batched = true, c.depth = 72; });
  sampled("matmul-sampled-shared-lists", [](SampledCase& c) {
    c.batch = 3, c.left_batched = c.right_batched = true, c.depth = 72, c.block_rows = c.block_columns = 128;
  });
  sampled("matmul-sampled-shared-operands",
          [](SampledCase& c) { c.batch = 3, c.lists_batched = true, c.depth = 72, c.block_columns = 128; });
  sampled("matmul-sampled-many", [](SampledCase& c) {
    c.batch = 4, c.right_batched = c.lists_batched = true, c.depth = 72, c.capacity = 150;
  });
  sampled("matmul-sampled-many-128", [](SampledCase& c) {
    c.batch = 4, c.left_batched = c.lists_batched = true, c.capacity = 150, c.block_rows = c.block_columns = 128;
  });

  add("matmul-refusals", RunRefusals);
  add("time-matmul-128", [] { return TimeProducts(128); });
  add("time-matmul-64", [] { return TimeProducts(64); });
  add("time-narrow-128", [] { return TimeNarrow(128); });
  add("time-narrow-64", [] { return TimeNarrow(64); });
  return cases;
}

}  // namespace

std::vector<std::string> MatmulNames() {
  std::vector<std::string> names;
  for (const Named& c : Cases()) names.push_back(c.name);
  return names;
}

bool RunMatmul(const std::string& name, bool& known) {
  for (const Named& c : Cases())
    if (name == c.name) return c.run();
  return known = false;
}

}  // namespace jax_bsk::check
