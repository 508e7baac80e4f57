// The dense arrays as matrices that may lie transposed, and their windows: where in memory a part of one is, to be
// fetched ahead, packed, filled or written.
#pragma once

#include "cpu/multiply.h"
#include "cpu/pack.h"

namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA {

using namespace jax_bsk::cpu::JAX_BSK_CPU_ISA;

// Rows as they lie in memory.
template <class T>
struct Window {
  T* at;
  int64_t stride;
  int64_t rows;
  int64_t columns;
};

template <class T>
struct Matrix {
  T* data;  // [rows, columns], or [columns, rows] where it lies transposed
  int64_t rows;
  int64_t columns;
  bool transposed;

  JAX_BSK_INLINE Window<T> At(int64_t row, int64_t n_rows, int64_t column, int64_t n_columns) const {
    return transposed ? Window<T>{data + column * rows + row, rows, n_columns, n_rows}
                      : Window<T>{data + row * columns + column, columns, n_rows, n_columns};
  }
};

template <class T>
JAX_BSK_INLINE void Fetch(const Window<T>& from, Ahead& ahead) {
  ahead.Add(from.at, from.stride, from.rows, from.columns);
}

// to[row][column] of the matrix, however it lies: the operand of Multiply with the lanes.
template <class C, class E>
void PackLanes(const Window<const E>& from, bool transposed, C* to, int64_t ld) {
  if (transposed) {
    PackTransposed<C>(from.at, from.stride, from.rows, from.columns, C(1), to, ld);
  } else {
    PackRows<C>(from.at, from.stride, from.rows, from.columns, to, ld);
  }
}

// The way back.
template <class C, class E>
void UnpackLanes(const C* from, int64_t ld, const Window<E>& to, bool transposed) {
  if (transposed) {
    UnpackTransposed<C>(from, ld, static_cast<const C*>(nullptr), to.rows, to.columns, to.at, to.stride);
  } else {
    UnpackRows<C>(from, ld, to.rows, to.columns, to.at, to.stride);
  }
}

}  // namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA
