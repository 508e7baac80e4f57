// A block of visited positions: where the rows of its keys and values lie, and whether all rows of the tile attend to
// all of them.
#pragma once

#include "cpu/pack.h"
#include "visits.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

constexpr int64_t kBlock = 64;  // positions of a block; parts are multiples of it

template <class E>
struct Block {
  int64_t count = 0;         // of positions
  bool masked = false;       // some row does not attend to some key, or reads outside the cache
  int64_t position[kBlock];  // [count]
  const E* key[kBlock];      // rows of zeros from `count` on, and for positions whose page lies outside the cache
  const E* value[kBlock];
  bool missing[kBlock];  // whose page lies outside the cache
};

// What is the same for all blocks of a tile.
template <class E>
class Blocks {
 public:
  // `zeros` are as many as a key or a value has elements.
  Blocks(const ForwardParams& p, const Tile& tile, const E* zeros)
      : mask(p, tile), visible_(VisibleTo(p, tile, mask)), cursor_(p, tile, visible_), zeros_(zeros) {
    const Shape& s = p.shape;
    page_size_ = s.page_size;
    pages_ = s.pages;
    sink_tokens_ = p.window > 0 ? p.sink_tokens : 0;
    const int64_t first = tile.group * s.pages * s.page_size;
    keys_ = static_cast<const E*>(p.key.first) + first * p.key.stride + tile.kv_head * p.key.head_stride;
    values_ = static_cast<const E*>(p.value.first) + first * p.value.stride + tile.kv_head * p.value.head_stride;
    key_stride_ = p.key.stride;
    value_stride_ = p.value.stride;
    table_ = p.page_indices + (tile.group * s.seqs + tile.seq) * s.max_pages;
  }

  // Leaves out the next positions.
  void Skip(int64_t count) {
    while (count > 0) {
      const Run run = cursor_.Next(count);
      if (run.begin >= run.end) return;
      count -= run.end - run.begin;
    }
  }

  // The next block, of no more than `most` positions.
  void Next(int64_t most, Block<E>& block) {
    block.count = 0;
    block.masked = false;
    most = Minimum(most, kBlock);
    while (block.count < most) {
      const Run run = cursor_.Next(most - block.count);
      if (run.begin >= run.end) break;
      const bool low_enough = run.end <= visible_.every_high;
      block.masked |= !low_enough || (run.begin < visible_.every_low && run.end > sink_tokens_);
      for (int64_t at = run.begin; at < run.end;) {
        const int64_t page = at / page_size_;
        const int64_t end = Minimum(run.end, (page + 1) * page_size_);
        Add(table_[page], at, end, at - page * page_size_, block);
        at = end;
      }
    }
    for (int64_t k = block.count; k < kBlock; ++k) {
      block.key[k] = block.value[k] = zeros_;
      block.missing[k] = false;
    }
    block.masked |= block.count > 0 && block.count < kBlock;
  }

  const Mask mask;

 private:
  // Positions of one page, of which `row` is the first.
  void Add(int64_t page, int64_t begin, int64_t end, int64_t row, Block<E>& block) {
    const bool missing = page < 0 || page >= pages_;
    block.masked |= missing;
    const int64_t from = missing ? 0 : page * page_size_ + row;
    for (int64_t i = 0; i < end - begin; ++i, ++block.count) {
      block.position[block.count] = begin + i;
      block.key[block.count] = missing ? zeros_ : keys_ + (from + i) * key_stride_;
      block.value[block.count] = missing ? zeros_ : values_ + (from + i) * value_stride_;
      block.missing[block.count] = missing;
    }
  }

  const Visible visible_;
  Cursor cursor_;
  const E* zeros_;
  int64_t page_size_, pages_, sink_tokens_;
  const E *keys_, *values_;  // of the group and the head
  int64_t key_stride_, value_stride_;
  const int32_t* table_;  // [max_pages]
};

// Puts the row of zeros in place of each value that holds an infinity or a NaN: times a weight of 0 it would reach rows
// that do not attend to it. Returns whether there was any; `spoiled` says which.
template <class C, class E>
JAX_BSK_NO_INLINE bool CleanValues(Block<E>& block, int64_t value_dim, const E* zeros, bool* spoiled) {
  bool any = false;
  for (int64_t k = 0; k < block.count; ++k) {
    Vec<C> sum = {};
    for (int64_t c = 0; c < value_dim; c += kLanes<C>) sum += LoadUpTo<C>(block.value[k] + c, value_dim - c) * C(0);
    C lanes[kLanes<C>];
    Store<C>(lanes, sum);
    spoiled[k] = false;
    for (int i = 0; i < kLanes<C>; ++i) spoiled[k] |= !(lanes[i] == C(0));
    if (!spoiled[k]) continue;
    block.value[k] = zeros;
    any = true;
  }
  return any;
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
