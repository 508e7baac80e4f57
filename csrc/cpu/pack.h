// Moving blocks between the arrays and scratch memory: copies of rows in the compute type, and transposed copies whose
// lanes run along the rows.
#pragma once

#include "elements.h"

namespace jax_bsk::cpu::JAX_BSK_CPU_ISA {

template <class C>
JAX_BSK_INLINE constexpr int64_t RoundUpToLanes(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Where rows begin, in elements: `group` of them lie `inner` apart, and groups `outer`.
struct RowOffsets {
  int64_t outer, group, inner;
  JAX_BSK_INLINE RowOffsets(int64_t outer, int64_t group = 1, int64_t inner = 0)
      : outer(outer), group(group), inner(inner) {}
  JAX_BSK_INLINE int64_t operator()(int64_t row) const {
    return group == 1 ? row * outer : row / group * outer + row % group * inner;
  }
};

// to[column][row] = factor * from[row][column]. Columns and rows are padded with zeros to whole vectors.
template <class C, class E>
JAX_BSK_NO_INLINE void PackTransposed(const E* from, RowOffsets offset, int64_t rows, int64_t columns, C factor, C* to,
                                      int64_t ld) {
  constexpr int n = kLanes<C>;
  for (int64_t r = 0; r < rows; r += n) {
    for (int64_t c = 0; c < columns; c += n) {
      Vec<C> square[n];
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) {
        square[k] = r + k < rows ? factor * LoadUpTo<C>(from + offset(r + k) + c, columns - c) : Vec<C>{};
      }
      TransposeSquare<C>(square);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) Store<C>(to + (c + k) * ld + r, square[k]);
    }
  }
}

// to[row][column] = factor[row] * from[column][row]: the way back. `factor` (null: 1) and `from` are readable to whole
// vectors.
template <class C, class E>
JAX_BSK_NO_INLINE void UnpackTransposed(const C* from, int64_t ld, const C* factor, int64_t rows, int64_t columns,
                                        E* to, RowOffsets offset) {
  constexpr int n = kLanes<C>;
  for (int64_t r = 0; r < rows; r += n) {
    const Vec<C> scale = factor != nullptr ? Load<C>(factor + r) : Broadcast<C>(C(1));
    for (int64_t c = 0; c < columns; c += n) {
      Vec<C> square[n];
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) square[k] = Load<C>(from + (c + k) * ld + r) * scale;
      TransposeSquare<C>(square);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) {
        if (r + k < rows) StoreUpTo<C>(to + offset(r + k) + c, square[k], columns - c);
      }
    }
  }
}

// Copies rows times a factor, padded with zeros to whole vectors.
template <class C, class E>
JAX_BSK_NO_INLINE void PackRows(const E* from, int64_t stride, int64_t rows, int64_t columns, C* to, int64_t ld,
                                C factor = C(1)) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<C>) {
      Store<C>(to + r * ld + c, factor * LoadUpTo<C>(from + r * stride + c, columns - c));
    }
  }
}

// Writes packed rows back. `from` is readable to whole vectors.
template <class C, class E>
JAX_BSK_NO_INLINE void UnpackRows(const C* from, int64_t ld, int64_t rows, int64_t columns, E* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<C>) {
      StoreUpTo<C>(to + r * stride + c, Load<C>(from + r * ld + c), columns - c);
    }
  }
}

template <class C>
JAX_BSK_INLINE void Fill(C* to, int64_t count, C value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Writes one value into a block of rows of an array: rows nothing was computed for.
template <class C, class E>
JAX_BSK_NO_INLINE void FillRows(E* to, int64_t stride, int64_t rows, int64_t columns, C value) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<C>) {
      StoreUpTo<C>(to + r * stride + c, Broadcast<C>(value), columns - c);
    }
  }
}

}  // namespace jax_bsk::cpu::JAX_BSK_CPU_ISA
