// The terms of a bias as the Hopper kernels add them, one after the other.
#pragma once

#include <cstdint>

#include "attention/bias.cuh"
#include "attention/params.h"
#include "device/ptx/convert.cuh"
#include "device/ptx/registers.cuh"

namespace jax_bsk::attention::cuda::sm90 {

constexpr int kBiasTerms = 3, kDistanceTerm = 1;

__device__ __forceinline__ bool HasTerm(const Bias& bias, int which) {
  return (which == 0 ? bias.dense : which == 1 ? bias.distances : bias.tiles) != nullptr;
}

// Term 0 .. kBiasTerms - 1 of a head. `tile` is the number of the entry of the block that query and key are in, as it
// came: producers have no registers to look at it.
__device__ __forceinline__ BiasTermView TermView(const Bias& bias, const Shape& shape, int which, int batch, int head,
                                                 int tile, int query, int key) {
  if (which == 0) return DenseBiasView(bias, batch, head);
  if (which == 1) return DistanceBiasView(bias, shape, batch, head);
  BiasTermView view = TileBiasView(bias, batch, head);
  const int block_query = query & -static_cast<int>(shape.block_q), block_key = key & -static_cast<int>(shape.block_kv);
  if (tile < 0) view.data = nullptr;
  view.first += min(int64_t{tile}, bias.tiles_count - 1) * bias.tiles_q * bias.tiles_kv -
                int64_t{block_query} * view.step_q - int64_t{block_key} * view.step_kv;
  return view;
}

__device__ __forceinline__ int64_t BiasIndex(const BiasTermView& view, int query, int key) {
  return view.first + int64_t{query} * view.step_q + int64_t{key} * view.step_kv;
}

template <typename Element>
__device__ __forceinline__ float ReadBias(const BiasTermView& view, int64_t index) {
  return view.wide ? LoadBias(static_cast<const float*>(view.data) + index)
                   : LoadBias(static_cast<const Element*>(view.data) + index);
}

// One side of a tile of 64 x 64 pairs: 64 queries or keys from `start` on, this thread's first of them, and how many
// there are in all.
struct BiasAxis {
  int start, first, length;
  __device__ __forceinline__ bool Inside() const { return start + 64 <= length; }
};

// The lines of a bias by distance: see bias_lines.h. Numbers of the host's, for a launch.
struct BiasLines {
  const float2* lines;  // x is the bias in the middle, y what it gains per key, NaN where there is no line; null: none
  int of_table, zero;
};

// The index of the line of the 64 queries from `query` on and the first 64 keys. Each 64 keys more add 1.
// There are fewer than 2^31 lines: the numbers of so many would take 500 GB.
__device__ __forceinline__ int LineIndex(const BiasLines& lines, const Bias& bias, int batch, int head, int query) {
  const int table = static_cast<int>(lists::TableIndex(bias.distances_batch, bias.distances_heads, batch, head));
  return table * lines.of_table + lines.zero - query / 64;
}
// The line of the 64 queries and the 64 keys from `query` and `key` on. One that is read past the end is of no pair.
__device__ __forceinline__ float2 FindBiasLine(const BiasLines& lines, const Bias& bias, int batch, int head, int query,
                                               int key) {
  if (lines.lines == nullptr) return {0.f, device::QuietNan()};
  const int table = static_cast<int>(lists::TableIndex(bias.distances_batch, bias.distances_heads, batch, head));
  const int number = min(max((key - query) / 64 + lines.zero, 0), lines.of_table - 1);
  return __ldg(lines.lines + (table * lines.of_table + number));
}
__device__ __forceinline__ bool IsBiasLine(const float2& line) { return line.y == line.y; }

// factor * bias of a thread's pairs in an accumulator of 64 x 64, as AddBiasTile has them, from those of a line. `row`
// and `column` are the thread's first ones in the tile.
struct LinePairs {
  float first, step;

  template <bool kKeyRows>
  __device__ static __forceinline__ LinePairs Of(const float2& line, int row, int column, float factor) {
    const float step = factor * (kKeyRows ? -line.y : line.y);
    return {fmaf(step, static_cast<float>(column - row), factor * line.x), step};
  }
  // Pair i of the eight columns number n.
  __device__ __forceinline__ float operator()(int n, int i) const {
    return fmaf(step, static_cast<float>(8 * n + i % 2 - 8 * (i / 2)), first);
  }
  template <int kFirst, int kCount>
  __device__ __forceinline__ void Set(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) x[kFirst + i] = (*this)(i / 4, i % 4);
  }
  template <int kFirst, int kCount>
  __device__ __forceinline__ void Add(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) x[kFirst + i] += (*this)(i / 4, i % 4);
  }
};
template <int kFirst, int kCount>
__device__ __forceinline__ void SetNoBias(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) x[kFirst + i] = 0.f;
}

__device__ __forceinline__ float2 LoadBiasPair(const float* element) {
  return __ldg(reinterpret_cast<const float2*>(element));
}
template <typename Half>
__device__ __forceinline__ float2 LoadBiasPair(const Half* element) {
  const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(element));
  return {device::ToFloat(Half{static_cast<uint16_t>(bits)}), device::ToFloat(Half{static_cast<uint16_t>(bits >> 16)})};
}

// Adds factor * term to a thread's pairs in an accumulator of 64 x 64: x[kFirst + 4n + 2 * half + e] is of its row
// first + 8 * half and its column first + 8n + e. kKeyRows: rows are keys and columns queries. What lies past the ends
// of the arrays is masked: there the last number is read.
template <typename Element, bool kKeyRows, int kFirst, int kCount>
__device__ __forceinline__ void AddBiasTile(float (&x)[kCount], const BiasTermView& view, const BiasAxis& rows,
                                            const BiasAxis& columns, float factor) {
  const int step_row = kKeyRows ? view.step_kv : view.step_q, step_column = kKeyRows ? view.step_q : view.step_kv;
  const int row = rows.start + rows.first, column = columns.start + columns.first;
  const int64_t index = view.first + int64_t{row} * step_row + int64_t{column} * step_column;
  const auto add = [&](int n, int half, int e, float value) {
    float& logit = x[kFirst + 4 * n + 2 * half + e];
    logit = BiasedLogit(logit, value, factor);
  };
  if (view.step_q < 0 && rows.Inside() && columns.Inside()) {
    // By distance: the second row's number is the first row's of eight columns before.
    constexpr int kStep = kKeyRows ? -1 : 1;
    const float* numbers = static_cast<const float*>(view.data) + index;
    float before[2] = {LoadBias(numbers - 8 * kStep), LoadBias(numbers - 7 * kStep)};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = LoadBias(numbers + kStep * (8 * n + e));
        add(n, 0, e, value);
        add(n, 1, e, before[e]);
        before[e] = value;
      }
      if (n % 4 == 3) device::sm90::Pin(x);
    }
    return;
  }
  const auto add_numbers = [&](auto* numbers) {
    if (!rows.Inside() || !columns.Inside()) {
      const int last = columns.length - 1 - column, second = max(0, min(8, rows.length - 1 - row)) * step_row;
      numbers += min(0, rows.length - 1 - row) * step_row;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto* own = numbers + min(8 * n + e, last) * step_column;
          add(n, 0, e, LoadBias(own));
          add(n, 1, e, LoadBias(own + second));
        }
        device::sm90::Pin(x);
      }
    } else if (!kKeyRows && step_column == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = LoadBias(numbers + 8 * half * step_row);
#pragma unroll
        for (int n = 0; n < 8; ++n) add(n, half, 0, value), add(n, half, 1, value);
      }
    } else if constexpr (kKeyRows) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          add(n, i % 2, i / 2, LoadBias(numbers + i % 2 * 8 * step_row));
          if (i % 2 == 1) numbers += i == 1 ? step_column : 7 * step_column;
        }
        if (n % 2 == 1) device::sm90::Pin(x);
      }
    } else {                                                 // step_column is 1
      const bool even = ((view.first | step_row) & 1) == 0;  // columns are
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* own = numbers + 8 * half * step_row;
        if (even) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float2 pair = LoadBiasPair(own + 8 * n);
            add(n, half, 0, pair.x);
            add(n, half, 1, pair.y);
            if (n == 7 && half == 1) device::sm90::Pin(x);  // what is waited for is waited for once for all of them
          }
        } else {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            add(n, half, 0, LoadBias(own + 8 * n)), add(n, half, 1, LoadBias(own + 8 * n + 1));
            if (n % 4 == 3) device::sm90::Pin(x);
          }
        }
      }
    }
  };
  if (view.wide) {
    add_numbers(static_cast<const float*>(view.data) + index);
  } else {
    add_numbers(static_cast<const Element*>(view.data) + index);
  }
}

// Adds the terms to the logit of one pair.
template <typename Element>
__device__ __forceinline__ void AddBiasOfPair(float& logit, float factor, const Bias& bias, const Shape& shape,
                                              int batch, int head, int tile, int query, int key) {
#pragma unroll 1
  for (int which = 0; which < kBiasTerms; ++which) {
    if (!HasTerm(bias, which)) continue;
    const BiasTermView view = TermView(bias, shape, which, batch, head, tile, query, key);
    if (view.data != nullptr) {
      logit = BiasedLogit(logit, ReadBias<Element>(view, BiasIndex(view, query, key)), factor);
    }
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
