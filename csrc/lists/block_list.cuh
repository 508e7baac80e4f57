// Validated reading of what the user's device memory says: block lists, bit tiles, lengths. Every thread of a CTA walks
// the list itself (the loads broadcast), so all of them agree on every step without a barrier.
#pragma once

#include <cstdint>

#include "lists/block_list.h"

namespace jax_bsk::lists {

// Index of a [batch, heads] table whose dimensions are 1 or full.
__device__ __forceinline__ int64_t TableIndex(int64_t batch_size, int64_t head_count, int batch, int head) {
  return (batch_size == 1 ? 0 : batch) * head_count + (head_count == 1 ? 0 : head);
}

struct LengthLimits {
  int query;
  int key;
};

// The example's lengths, clamped to what the arrays hold.
__device__ __forceinline__ LengthLimits ReadLengths(const Lengths& lengths, int batch, int q_len, int kv_len) {
  if (lengths.pairs == nullptr) return {q_len, kv_len};
  const int32_t* pair = lengths.pairs + (lengths.batch == 1 ? 0 : 2 * int64_t{batch});
  return {min(max(__ldg(pair), 0), q_len), min(max(__ldg(pair + 1), 0), kv_len)};
}

// Words of one row of a bit tile: bit c % 32 of word c / 32 stands for key c of the block.
__device__ __forceinline__ const uint32_t* BitTileRow(const BitTiles& tiles, int batch, int head, int tile, int row,
                                                      int block_q, int block_kv) {
  const int64_t index = TableIndex(tiles.batch, tiles.heads, batch, head) * tiles.count + tile;
  return tiles.words + (index * block_q + row) * (block_kv / 32);
}

// The first kColumns (32 or 64) bits of a bit tile's row.
template <int kColumns>
__device__ __forceinline__ uint64_t RowBits(const uint32_t* words) {
  static_assert(kColumns == 32 || kColumns == 64);
  uint64_t bits = __ldg(words);
  if constexpr (kColumns == 64) bits |= static_cast<uint64_t>(__ldg(words + 1)) << 32;
  return bits;
}

constexpr int kLargestBlock = 128;

// One kernel tile to visit.
struct Step {
  int start;   // its first query or key
  int offset;  // the same, counted from the start of its list block
  int tile;    // bit tile of the list block, -1 = every pair attends
};

// The range of a row's entries.
struct ListRow {
  int64_t begin;
  int length;  // -1: the offsets cannot be true
};

// From a row's offsets, as they came.
__device__ __forceinline__ ListRow MakeRow(const BlockList& list, int64_t table, int begin, int end) {
  const bool poisoned = begin < 0 || end < begin || end > list.capacity;
  return {table * list.capacity + begin, poisoned ? -1 : end - begin};
}

__device__ __forceinline__ ListRow FindRow(const BlockList& list, int64_t table, int row) {
  const int32_t* offsets = list.offsets + table * (list.rows + 1) + row;
  return MakeRow(list, table, __ldg(offsets), __ldg(offsets + 1));
}
__device__ __forceinline__ ListRow FindRow(const BlockList& list, int batch, int head, int row) {
  return FindRow(list, TableIndex(list.batch, list.heads, batch, head), row);
}

// True if the rows of a table have no entry in common: none of its offsets is less than the one before it. Each of the
// CTA's threads answers for a part of them.
template <int kThreads>
__device__ __forceinline__ bool InOrder(const BlockList& list, int64_t table) {
  const int32_t* offsets = list.offsets + table * (list.rows + 1);
  bool in_order = true;
  for (int row = static_cast<int>(threadIdx.x); row < list.rows; row += kThreads) {
    in_order &= __ldg(offsets + row) <= __ldg(offsets + row + 1);
  }
  return in_order;
}

// The index of the gate that belongs to the entry at `position` of the list's arrays: gates are [batch, heads,
// capacity] whatever the lists share.
__device__ __forceinline__ int GateIndex(const BlockList& list, int64_t head_count, int batch, int head,
                                         int64_t position) {
  const int64_t skipped = batch * head_count + head - TableIndex(list.batch, list.heads, batch, head);
  return static_cast<int>(skipped * list.capacity + position);
}
__device__ __forceinline__ float ReadGate(const void* gates, int index) {
  return __ldg(static_cast<const float*>(gates) + index);
}

// Walks one row of a block list in steps of kTile queries or keys, leaving out steps that begin at or past `limit`.
// Stops at the first thing that cannot be true and calls the row poisoned. The next entry is always loaded one entry
// ahead, so that no step waits for global memory.
//
// `list` and `tiles` are kernel parameters: read again where they are needed, they cost no registers.
//
// Order: whether the walk is from the row's beginning to its end or the other way round. In kernel parameters, it costs
// no register either.
struct FromBeginning {
  __device__ __forceinline__ constexpr int64_t Step() const { return 1; }
  __device__ __forceinline__ constexpr int FromEnd() const { return 0; }
};
struct EitherWay {
  const int64_t& step;  // 1 or -1
  const int& from_end;  // 0 or 1
  __device__ __forceinline__ int64_t Step() const { return step; }
  __device__ __forceinline__ int FromEnd() const { return from_end; }
};
template <int kTile, typename Order = FromBeginning>
class BlockWalker {
 public:
  __device__ BlockWalker(const BlockList& list, const BitTiles& tiles, int batch, int head, int row, int block,
                         int limit)
      : list_(list), tiles_(tiles), block_(block), limit_(limit), offset_(block) {
    Restart(batch, head, row);
  }

  // At the beginning of a row found before, or at its end.
  __device__ BlockWalker(const BlockList& list, const BitTiles& tiles, const ListRow& row, int block, int limit,
                         Order order = {})
      : list_(list), tiles_(tiles), order_(order), block_(block), limit_(limit), offset_(block) {
    Restart(row);
  }

  // Goes to the beginning of another row.
  __device__ void Restart(int batch, int head, int row) { Restart(FindRow(list_, batch, head, row)); }
  __device__ void Restart(const ListRow& row) {
    left_ = row.length;
    position_ = row.begin + order_.FromEnd() * (row.length - 1);
    offset_ = block_;
    LoadEntry();
  }

  // False at the end of the row, or when the row is poisoned.
  __device__ __forceinline__ bool Next(Step& step) {
    while (true) {
      if (offset_ >= block_) {
        if (left_ <= 0) return false;
        if (next_id_ < 0 || next_id_ >= list_.ids_end || next_tile_ < -1 || next_tile_ >= tiles_.count) {
          left_ = -1;
          return false;
        }
        start_ = next_id_ * block_;
        tile_ = next_tile_;
        offset_ = 0;
        --left_;
        LoadEntry();
        if constexpr (kTile >= kLargestBlock) {  // an entry is one step: there is no place in it to remember
          step = {start_, 0, tile_};
          offset_ = kLargestBlock;
          if (step.start < limit_) return true;
          continue;
        }
      }
      const int offset = order_.FromEnd() ? block_ - kTile - offset_ : offset_;
      step = {start_ + offset, offset, tile_};
      offset_ += kTile;
      if (step.start < limit_) return true;
    }
  }

  __device__ bool poisoned() const { return left_ < 0; }

  // The position of the last step's entry in the list's arrays.
  __device__ __forceinline__ int64_t position() const {
    return position_ - (left_ > 0 ? 2 * order_.Step() : order_.Step());
  }

 private:
  __device__ __forceinline__ void LoadEntry() {
    if (left_ > 0) {
      next_id_ = __ldg(list_.ids + position_);
      next_tile_ = __ldg(list_.tiles + position_);
      position_ += order_.Step();
    }
  }

  const BlockList& list_;
  const BitTiles& tiles_;
  Order order_{};
  int block_, limit_;
  int64_t position_;  // of the entry after the next
  int left_;          // entries not yet taken; -1 = poisoned
  int next_id_ = 0, next_tile_ = 0;
  int start_ = 0, offset_, tile_ = -1;
};

}  // namespace jax_bsk::lists
