// Which keys the rows of a unit attend to.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "decode/cuda/units.cuh"

namespace jax_bsk::decode::cuda {

__device__ __forceinline__ bool HasTree(const KernelParams& params, const Unit& unit) {
  return params.tree != nullptr && unit.q_len <= 64;
}
__device__ __forceinline__ int WindowBegin(const KernelParams& params, int position) {
  const int64_t first = params.window > 0 ? position - params.window + 1 : 0;
  return first > 0 ? static_cast<int>(first) : 0;
}

// Of one row.
struct RowMask {
  int begin, end;  // of the positions in the window
  int sinks;       // positions below are in it, too
  int draft;       // first position that the tree's bits speak of
  uint64_t bits;

  // A row past the unit's last has any mask: nobody reads what becomes of it.
  __device__ __forceinline__ RowMask(const KernelParams& params, const Unit& unit, int row) {
    const int query = params.by_group_heads.Quotient(row), start = unit.kv_len - unit.q_len;
    const bool tree = HasTree(params, unit);
    begin = WindowBegin(params, start + query);
    end = params.causal && !tree ? min(unit.kv_len, start + query + 1) : unit.kv_len;
    sinks = static_cast<int>(params.sink_tokens);
    draft = tree ? start : unit.kv_len;
    bits = 0;
    if (tree && query < unit.q_len) {
      const uint32_t* words = params.tree + 2 * (int64_t{unit.group} * params.tokens + unit.first_token + query);
      bits = __ldg(words) | static_cast<uint64_t>(__ldg(words + 1)) << 32;
    }
  }
  __device__ __forceinline__ bool operator()(int key) const {
    return key < end && (key >= begin || key < sinks) && (key < draft || (bits >> (key - draft) & 1) != 0);
  }
};

// Of all rows together: true where each of them attends. The first query's end and the last one's window bound the
// others'.
struct UnitMask {
  int begin, end;

  UnitMask() = default;
  __device__ __forceinline__ UnitMask(const KernelParams& params, const Unit& unit) {
    const int start = unit.kv_len - unit.q_len;
    const int first = params.by_group_heads.Quotient(unit.row);
    const int last = params.by_group_heads.Quotient(unit.row + unit.rows - 1);
    begin = WindowBegin(params, start + last);
    end = HasTree(params, unit) ? start : params.causal ? min(unit.kv_len, start + first + 1) : unit.kv_len;
  }
  __device__ __forceinline__ bool operator()(int key, int sinks) const {
    return key >= 0 && key < end && (key >= begin || key < sinks);
  }
};

}  // namespace jax_bsk::decode::cuda
