// The result of a part, or of all parts so far: sums that are relative to the largest score. Parts are put together in
// their order, whoever computed them, so that the result has the same bits.
#pragma once

#include "cpu/exponential.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "kernels.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

using namespace jax_bsk::cpu::JAX_BSK_CPU_ISA;

template <class C>
struct Partial {
  C* out;      // [rows, ld] sums of 2^(score - maximum) * value
  C* maximum;  // [rows] of the scores, in base-2 units
  C* sum;      // [rows] of 2^(score - maximum)
  int64_t rows, ld;

  Partial(Carver& carver, int64_t rows, int64_t value_dim) : rows(rows), ld(RoundUpToLanes<C>(value_dim)) {
    const int64_t padded = RoundUpToLanes<C>(rows);
    out = carver.Take<C>(padded * ld);  // UnpackTransposed and the groups of rows of few.h fill them up
    maximum = carver.Take<C>(padded);
    sum = carver.Take<C>(padded);
  }

  void Clear() const {
    const int64_t padded = RoundUpToLanes<C>(rows);
    Fill<C>(out, padded * ld, C(0));
    Fill<C>(maximum, padded, -kInfinity<C>);
    Fill<C>(sum, padded, C(0));
  }
};

// Not inlined, so that the products and sums are rounded alike wherever it is called.
template <class C>
JAX_BSK_NO_INLINE void Merge(const Partial<C>& part, const Partial<C>& into) {
  for (int64_t first = 0; first < into.rows; first += kLanes<C>) {
    const Vec<C> before = Load<C>(into.maximum + first), other = Load<C>(part.maximum + first);
    const Vec<C> maximum = Max<C>(other, before);
    const Vec<C> shift = Select<C>(maximum == -kInfinity<C>, Vec<C>{}, maximum);
    const Vec<C> old_scale = Exp2<C>(before - shift), new_scale = Exp2<C>(other - shift);
    Store<C>(into.maximum + first, maximum);
    Store<C>(into.sum + first, Load<C>(into.sum + first) * old_scale + Load<C>(part.sum + first) * new_scale);
    C scales[2][kLanes<C>];
    Store<C>(scales[0], old_scale);
    Store<C>(scales[1], new_scale);
    for (int64_t r = first; r < Minimum(first + kLanes<C>, into.rows); ++r) {
      C* const to = into.out + r * into.ld;
      for (int64_t c = 0; c < into.ld; c += kLanes<C>) {
        Store<C>(to + c,
                 Load<C>(to + c) * scales[0][r - first] + Load<C>(part.out + r * part.ld + c) * scales[1][r - first]);
      }
    }
  }
}

// Where row r of a tile lies: index into [G, T, N].
JAX_BSK_INLINE int64_t RowIndex(const ForwardParams& p, const Tile& tile, int64_t r) {
  const int64_t group = p.shape.heads / p.shape.kv_heads, row = tile.first_row + r;
  const int64_t token = tile.group * p.shape.tokens + tile.first_token + row / group;
  return token * p.shape.heads + tile.kv_head * group + row % group;
}

// The sink joins the denominator; log-sum-exp in natural units; out = sums / denominator.
template <class C, class E>
void Finish(const ForwardParams& p, const Tile& tile, const Partial<C>& x) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t index = RowIndex(p, tile, r);
    const double sink = p.sinks != nullptr ? double(p.sinks[index % p.shape.heads]) : -__builtin_inf();
    const double maximum = x.maximum[r] * kLn2, sum = x.sum[r];
    double total = sum, shift = maximum, factor = sum == 0 ? 0 : 1 / sum;
    if (sink != -__builtin_inf()) {
      if (sink > maximum) shift = sink;
      total = sum == 0 ? 0 : sum * __builtin_exp(maximum - shift);
      const double own = sink == shift ? 1 : __builtin_exp(sink - shift);  // also of +inf
      // A sink of NaN makes the row NaN, also where it attends to no key.
      factor = sum == 0 && own == own ? 0 : __builtin_exp(maximum - shift) / (total + own);
      total += own;
    }
    p.lse[index] = total == 0 ? kNoLogSumExp<float> : static_cast<float>(shift + __builtin_log(total));
    const C scale = static_cast<C>(factor * p.value_scale);
    E* const to = static_cast<E*>(p.out) + index * p.shape.value_dim;
    for (int64_t c = 0; c < p.shape.value_dim; c += kLanes<C>) {
      StoreUpTo<C>(to + c, Load<C>(x.out + r * x.ld + c) * scale, p.shape.value_dim - c);
    }
  }
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
