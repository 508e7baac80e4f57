// Which keys the rows of a unit attend to.
#pragma once

#include <cstdint>

#include "decode/cuda/config.h"
#include "decode/cuda/copies.cuh"
#include "decode/cuda/units.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::decode::cuda {

__device__ __forceinline__ bool HasTree(const KernelParams& params, const Unit& unit) {
  return params.tree != nullptr && unit.q_len <= 64;
}
__device__ __forceinline__ int WindowBegin(const KernelParams& params, int position) {
  const int64_t first = params.window > 0 ? position - params.window + 1 : 0;
  return first > 0 ? static_cast<int>(first) : 0;
}

// Of one row.
template <typename Config>
class RowMask {
 public:
  // A row past the unit's last has any mask: nobody reads what becomes of it. `tile` and `step` are of listed keys: the
  // bit tile of the step, and its number within its block.
  __device__ __forceinline__ RowMask(const KernelParams& params, const Unit& unit, int row, int tile, int step) {
    const int query = params.by_group_heads.Quotient(row), start = unit.kv_len - unit.q_len;
    if constexpr (Config::kListed) {
      bits_ = ~uint64_t{0};
      if (tile < 0 || query >= unit.q_len) return;
      const uint32_t* words =
          lists::BitTileRow(params.bit_tiles, unit.group, 0, tile, query, params.block_q, params.block_kv);
      bits_ = lists::RowBits<64>(words + 2 * step);
    } else {
      const bool tree = HasTree(params, unit);
      begin_ = WindowBegin(params, start + query);
      end_ = params.causal && !tree ? min(unit.kv_len, start + query + 1) : unit.kv_len;
      sinks_ = static_cast<int>(params.sink_tokens);
      draft_ = tree ? start : unit.kv_len;
      if (tree && query < unit.q_len) {
        const uint32_t* words = params.tree + 2 * (int64_t{unit.group} * params.tokens + unit.first_token + query);
        bits_ = lists::RowBits<64>(words);
      }
    }
  }

  // Whether the row attends to a key of the step, as it was found (FoundRow), in a column.
  __device__ __forceinline__ bool operator()(int found, int column) const {
    if (found == kNoKey) return false;
    if constexpr (Config::kListed) {
      return found < 0 || (bits_ >> column & 1) != 0;  // what cannot be true, all rows attend to
    } else {
      const int key = found >= 0 ? found : ~found;
      return key < end_ && (key >= begin_ || key < sinks_) && (key < draft_ || (bits_ >> (key - draft_) & 1) != 0);
    }
  }

 private:
  int begin_ = 0, end_ = 0;  // of the positions in the window
  int sinks_ = 0;            // positions below are in it, too
  int draft_ = 0;            // first position that the tree's bits speak of
  uint64_t bits_ = 0;        // of the tree, or of a bit tile's row
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
