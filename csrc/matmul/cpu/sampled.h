// Blocks of a dense product at given places. A part of the work is some entries, whose sums stay in scratch while the
// depth passes by in steps: of each step, an operand's block is packed once for all the entries that need it.
#pragma once

#include "cpu/list_range.h"
#include "held_blocks.h"
#include "kernels.h"

namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA {

// Contracted length of a step. Measured at 2048^3, 20 % of blocks of 64, float32, one core: 119 GFLOP/s, and 126 with
// the left operand transposed; steps of 128: 117 and 111, of 256: 100 and 105, since the packed columns leave the
// second-level cache.
constexpr int64_t kDepth = 64;

// Bytes that packed blocks of the two operands may take. Lists are by rows, so that few of the left ones will do.
constexpr int64_t kHeldLeftBytes = 1 << 17;
constexpr int64_t kHeldRightBytes = 1 << 20;

template <class C>
struct SampledScratch {
  Carver carver;
  HeldBlocks<C> left;   // [rows, depth] each, or [depth, rows]
  HeldBlocks<C> right;  // [depth, columns] each
  C* sums;              // [entries, rows, columns]
  size_t bytes;

  SampledScratch(const SampledParams& p, int64_t entries, void* memory)
      : carver(memory),
        left(carver, p.row_blocks, RoundUpToLanes<C>(p.block_rows) * kDepth, kHeldLeftBytes),
        right(carver, p.column_blocks, RoundUpToLanes<C>(p.block_columns) * kDepth, kHeldRightBytes) {
    sums = carver.Take<C>(entries * p.block_rows * RoundUpToLanes<C>(p.block_columns));
    bytes = carver.Bytes();
  }
};

template <class C, class E, class Out>
void Sampled(const SampledParams& p, const SampledPart& part, void* memory) {
  SampledScratch<C> x(p, part.end - part.first, memory);

  // --- Where
  const int64_t ld = RoundUpToLanes<C>(p.block_columns);
  const int64_t sums_size = p.block_rows * ld;
  const int64_t list = (p.list_batch == 1 ? 0 : part.b) * p.capacity;
  const int32_t* const row_ids = p.row_ids + list;
  const int32_t* const column_ids = p.column_ids + list;
  const Matrix<const E> left = {static_cast<const E*>(p.left) + (p.left_batch == 1 ? 0 : part.b) * p.rows * p.depth,
                                p.rows, p.depth, p.left_transposed};
  const Matrix<const E> right = {
      static_cast<const E*>(p.right) + (p.right_batch == 1 ? 0 : part.b) * p.depth * p.columns, p.depth, p.columns,
      p.right_transposed};
  Out* const out = static_cast<Out*>(p.out) + part.b * p.capacity * p.block_rows * p.block_columns;
  const auto listed = [&](int64_t e) {
    return row_ids[e] >= 0 && row_ids[e] < p.row_blocks && column_ids[e] >= 0 && column_ids[e] < p.column_blocks;
  };
  const auto rows_of = [&](int64_t e) { return Minimum(p.block_rows, p.rows - row_ids[e] * p.block_rows); };
  const auto columns_of = [&](int64_t e) {
    return Minimum(p.block_columns, p.columns - column_ids[e] * p.block_columns);
  };

  Fill<C>(x.sums, (part.end - part.first) * sums_size, C(0));
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = Minimum(kDepth, p.depth - k);
    const auto left_block = [&](int64_t e) { return left.At(row_ids[e] * p.block_rows, rows_of(e), k, depth); };
    const auto right_block = [&](int64_t e) {
      return right.At(k, depth, column_ids[e] * p.block_columns, columns_of(e));
    };
    x.left.Clear();
    x.right.Clear();
    for (int64_t e = part.first; e < part.end; ++e) {
      if (!listed(e)) continue;

      // --- Load: the step's part of the entry's columns of the right operand, and of its rows of the left one, which
      // --- are used where they lie if they can be.
      const C* const columns =
          x.right.Get(column_ids[e], [&](C* to) { PackLanes<C>(right_block(e), p.right_transposed, to, ld); });
      const C* rows;
      int64_t rows_ld;
      if (kSame<C, E> && !p.left_transposed) {
        rows = reinterpret_cast<const C*>(left_block(e).at);
        rows_ld = p.depth;
      } else {
        rows_ld = p.left_transposed ? RoundUpToLanes<C>(p.block_rows) : kDepth;
        rows = x.left.Get(row_ids[e], [&](C* to) { PackLanes<C>(left_block(e), false, to, rows_ld); });
      }

      // --- Meanwhile the next entry's rows and columns come nearer. Measured as above: 105 to 119 GFLOP/s.
      Ahead ahead;
      if (e + 1 < part.end && listed(e + 1)) {
        if (!x.left.Holds(row_ids[e + 1])) Fetch(left_block(e + 1), ahead);
        if (!x.right.Holds(column_ids[e + 1])) Fetch(right_block(e + 1), ahead);
      }

      // --- Sums += rows columns
      const auto multiply =
          p.left_transposed ? Multiply<C, Operand::kColumns, Into::kAdd> : Multiply<C, Operand::kRows, Into::kAdd>;
      multiply(rows, rows_ld, columns, ld, rows_of(e), RoundUpToLanes<C>(columns_of(e)) / kLanes<C>, depth,
               x.sums + (e - part.first) * sums_size, ld, ahead, nullptr);
    }
  }

  // --- Finish: zeros beyond the matrix and in entries that are none.
  for (int64_t e = part.first; e < part.end; ++e) {
    const int64_t rows = listed(e) ? rows_of(e) : 0;
    const int64_t columns = listed(e) ? columns_of(e) : 0;
    Out* const to = out + e * p.block_rows * p.block_columns;
    UnpackRows<C>(x.sums + (e - part.first) * sums_size, ld, rows, columns, to, p.block_columns);
    FillRows<C>(to + columns, p.block_columns, rows, p.block_columns - columns, C(0));
    FillRows<C>(to + rows * p.block_columns, p.block_columns, p.block_rows - rows, p.block_columns, C(0));
  }
}

}  // namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA
