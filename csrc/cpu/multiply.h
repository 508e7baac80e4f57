// Products of small blocks: c[m][n] (+)= sum over k of a(m, k) * b[k][n], where n runs along the lanes, b and c are
// packed scratch, and the elements of `a` are broadcast, so that `a` may be read where it lies.
#pragma once

#include "vector.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

// One tile of the result in registers: kTileRows x kTileVectors accumulators, kTileVectors of b and one broadcast. 6 x
// 4 of 32 registers: 24 products for 10 loads. 6 x 2 where there are 16 registers.
#if JAX_BSK_CPU_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

// What becomes of the product. Sums over several blocks add whole block products, which rounds less than one long
// chain.
enum class Into {
  kStore,    // c = product
  kAdd,      // c += product
  kRescale,  // c = c * scale[n] + product
};

// How a(m, k) lies in memory.
enum class Operand {
  kRows,     // a[m * lda + k]
  kColumns,  // a[k * lda + m]
};

template <class C, int kRows, int kVectors, Operand kOperand, Into kInto>
JAX_BSK_INLINE void MultiplyTile(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* c, int64_t ldc,
                                 const C* scale) {
  Vec<C> sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> right[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) right[n] = Load<C>(b + k * ldb + n * kLanes<C>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<C> left = Broadcast<C>(kOperand == Operand::kRows ? a[m * lda + k] : a[k * lda + m]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      C* to = c + m * ldc + n * kLanes<C>;
      Vec<C> result = sums[m][n];
      if constexpr (kInto == Into::kAdd) result += Load<C>(to);
      if constexpr (kInto == Into::kRescale) result += Load<C>(to) * Load<C>(scale + n * kLanes<C>);
      Store<C>(to, result);
    }
  }
}

// Rows of arrays that will be needed next, fetched into the second-level cache a few at a time between the tiles of a
// product. They often lie thousands of elements apart, which the processor's own prefetcher does not follow and which,
// being often a power of two, leaves them an eighth of the cache. Measured at attention with 8 heads of 64 float32,
// AVX-512, one core: forward 115 to 122 GFLOP/s without, 127 with.
class Ahead {
 public:
  // Up to kMost times.
  template <class E>
  void Add(const E* from, int64_t stride, int64_t rows, int64_t columns) {
    runs_[count_++] = {reinterpret_cast<const char*>(from), stride * static_cast<int64_t>(sizeof(E)),
                       columns * static_cast<int64_t>(sizeof(E)), rows};
  }

  // To be done with within `tiles` calls of Some().
  void Spread(int64_t tiles) {
    int64_t rows = 0;
    for (int64_t i = 0; i < count_; ++i) rows += runs_[i].rows;
    step_ = rows == 0 ? 0 : (rows + tiles - 1) / tiles;
  }

  JAX_BSK_INLINE void Some() {
    for (int64_t r = 0; r < step_ && at_ < count_;) {
      Run& run = runs_[at_];
      if (run.rows <= 0) {
        ++at_;
        continue;
      }
      for (int64_t byte = 0; byte < run.row_bytes; byte += 64) __builtin_prefetch(run.next + byte, 0, 2);
      run.next += run.stride;
      --run.rows;
      ++r;
    }
  }

 private:
  struct Run {
    const char* next;
    int64_t stride;  // bytes
    int64_t row_bytes;
    int64_t rows;
  };
  static constexpr int64_t kMost = 3;
  Run runs_[kMost];
  int64_t count_ = 0;
  int64_t at_ = 0;
  int64_t step_ = 0;
};

template <class C, int kVectors, Operand kOperand, Into kInto>
void MultiplyPanel(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t rows, int64_t depth, C* c, int64_t ldc,
                   const C* scale, Ahead& ahead) {
  constexpr int64_t step = kOperand == Operand::kColumns;
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    ahead.Some();
    MultiplyTile<C, kTileRows, kVectors, kOperand, kInto>(a + m * (step ? 1 : lda), lda, b, ldb, depth, c + m * ldc,
                                                          ldc, scale);
  }
  a += m * (step ? 1 : lda);
  c += m * ldc;
  ahead.Some();
  switch (rows - m) {
    case 1:
      return MultiplyTile<C, 1, kVectors, kOperand, kInto>(a, lda, b, ldb, depth, c, ldc, scale);
    case 2:
      return MultiplyTile<C, 2, kVectors, kOperand, kInto>(a, lda, b, ldb, depth, c, ldc, scale);
    case 3:
      return MultiplyTile<C, 3, kVectors, kOperand, kInto>(a, lda, b, ldb, depth, c, ldc, scale);
    case 4:
      return MultiplyTile<C, 4, kVectors, kOperand, kInto>(a, lda, b, ldb, depth, c, ldc, scale);
    case 5:
      return MultiplyTile<C, 5, kVectors, kOperand, kInto>(a, lda, b, ldb, depth, c, ldc, scale);
    default:
      return;
  }
}

// `vectors` is the width of b and c in vectors; all of a panel's rows pass before the next panel of b is touched.
template <class C, Operand kOperand, Into kInto>
void Multiply(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t rows, int64_t vectors, int64_t depth, C* c,
              int64_t ldc, Ahead ahead = {}, const C* scale = nullptr) {
  constexpr int64_t lanes = kLanes<C>;
  ahead.Spread((rows + kTileRows - 1) / kTileRows);
  while (vectors > 0) {
    int64_t width = 1;
    if (vectors >= kTileVectors) {
      width = kTileVectors;
      MultiplyPanel<C, kTileVectors, kOperand, kInto>(a, lda, b, ldb, rows, depth, c, ldc, scale, ahead);
    } else if (vectors >= 2) {
      width = 2;
      MultiplyPanel<C, 2, kOperand, kInto>(a, lda, b, ldb, rows, depth, c, ldc, scale, ahead);
    } else {
      MultiplyPanel<C, 1, kOperand, kInto>(a, lda, b, ldb, rows, depth, c, ldc, scale, ahead);
    }
    vectors -= width;
    b += width * lanes;
    c += width * lanes;
    if constexpr (kInto == Into::kRescale) scale += width * lanes;
  }
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
