// The row sums that the backward is given, delta = rowsum(dO o O) - dlse. A task has all heads of some queries. Lane l
// of a row's sum has the products l, l + lanes, ..., and the lanes are added at the end: an order that depends on the
// head size, the type and the instruction set alone.
#pragma once

#include "../params.h"
#include "cpu/elements.h"
#include "kernels.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

using namespace jax_bsk::cpu::JAX_BSK_CPU_ISA;

template <class C, class E>
JAX_BSK_INLINE C RowProducts(const E* dout, const E* out, int64_t dim) {
  Vec<C> sum = {};
  int64_t d = 0;
  for (; d + kLanes<C> <= dim; d += kLanes<C>) {
    sum = MultiplyAdd<C>(Elements<C, E>::Load(dout + d), Elements<C, E>::Load(out + d), sum);
  }
  if (d < dim) sum = MultiplyAdd<C>(LoadPart<C>(dout + d, dim - d), LoadPart<C>(out + d, dim - d), sum);
  return LaneSum<C>(sum);
}

template <class C, class E>
void DeltaTask(const DeltaParams& p, int64_t task) {
  const int64_t queries = DeltaQueries(p), tasks = DeltaTasksOfExample(p);
  const int64_t b = task / tasks, begin = task % tasks * queries;
  const int64_t end = begin + queries < p.q_len ? begin + queries : p.q_len;
  const int64_t first = (b * p.q_len + begin) * p.heads * p.value_dim;
  const E* dout = static_cast<const E*>(p.dout) + first;
  const E* out = static_cast<const E*>(p.out) + first;
  const C* dlse = static_cast<const C*>(p.dlse);
  C* delta = static_cast<C*>(p.delta);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t row = (b * p.heads + h) * p.q_len + t;
      const C sum = RowProducts<C>(dout, out, p.value_dim);
      delta[row] = dlse == nullptr ? sum : sum - dlse[row];
      dout += p.value_dim;
      out += p.value_dim;
    }
  }
}

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
