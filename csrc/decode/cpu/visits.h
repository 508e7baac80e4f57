// Which positions the rows of a tile visit, in which order, and which of them a row attends to. The page table and the
// selection are the user's memory: nothing here trusts an integer before it has been compared with its bounds.
#pragma once

#include "cpu/list_range.h"
#include "kernels.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

using namespace jax_bsk::cpu::JAX_BSK_CPU_ISA;

JAX_BSK_INLINE int64_t Maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// The tokens of a tile's sequence against its positions.
struct Mask {
  int64_t base;  // position of token 0; may be negative
  bool causal;
  int64_t window, sink_tokens;
  const uint32_t* tree;  // [q_len, 2], null: none

  Mask(const ForwardParams& p, const Tile& tile)
      : base(tile.kv_len - tile.q_len),
        causal(p.causal),
        window(p.window),
        sink_tokens(p.sink_tokens),
        tree(p.tree == nullptr || tile.q_len > 64 ? nullptr
                                                  : p.tree + (tile.group * p.shape.tokens + tile.first_token) * 2) {}

  // Whether a token of the sequence attends to a key of [0, kv_len).
  JAX_BSK_INLINE bool Attends(int64_t token, int64_t key) const {
    const int64_t position = base + token;
    if (window > 0 && key <= position - window && key >= sink_tokens) return false;
    if (tree != nullptr && key >= base) return tree[2 * token + (key - base) / 32] >> ((key - base) % 32) & 1;
    return !causal || key <= position;
  }
};

// The positions that tokens first .. last attend to lie in [0, sink_end) and [low, high), sink_end <= low, and all of
// these tokens attend to all of those that are below every_high, and below sink_tokens or not below every_low.
struct Visible {
  int64_t sink_end, low, high;
  int64_t every_low, every_high;

  Visible(const Mask& mask, int64_t kv_len, int64_t first, int64_t last) {
    const bool bounded = mask.causal && mask.tree == nullptr;
    high = bounded ? Clamp(mask.base + last + 1, kv_len) : kv_len;
    low = mask.window > 0 ? Clamp(mask.base + first - mask.window + 1, high) : 0;
    sink_end = mask.window > 0 ? Minimum(mask.sink_tokens, low) : 0;
    every_low = mask.window > 0 ? mask.base + last - mask.window + 1 : 0;
    every_high = mask.tree != nullptr ? mask.base : bounded ? mask.base + first + 1 : kv_len;
  }
};

// Neighbouring positions.
struct Run {
  int64_t begin, end;
};

// Walks over the visited positions of a tile.
class Cursor {
 public:
  Cursor(const ForwardParams& p, const Tile& tile, const Visible& visible) : visible_(visible), kv_len_(tile.kv_len) {
    const Shape& s = p.shape;
    page_size_ = s.page_size;
    if (p.selection != nullptr) {
      selection_ = p.selection + ((tile.group * s.seqs + tile.seq) * s.kv_heads + tile.kv_head) * s.selected;
      runs_ = s.selected;
    }
  }

  // The next visited positions, `most` > 0 at most; empty behind the last of them.
  Run Next(int64_t most) {
    while (run_.begin >= run_.end) {
      if (at_ == runs_) return {0, 0};
      run_ = Listed(at_++);
    }
    const Run result = {run_.begin, Minimum(run_.end, run_.begin + most)};
    run_.begin = result.end;
    return result;
  }

 private:
  Run Listed(int64_t i) const {
    if (selection_ == nullptr) return i == 0 ? Run{0, visible_.sink_end} : Run{visible_.low, visible_.high};
    const int64_t page = selection_[i];
    if (page < 0 || page * page_size_ >= kv_len_) return {0, 0};
    const int64_t begin = page * page_size_;
    const int64_t end = Minimum(begin + page_size_, visible_.high);
    // A page between the two ranges is left out; one that reaches into both is visited with what lies between them.
    if (end <= visible_.low) return {begin, Minimum(end, visible_.sink_end)};
    return {begin < visible_.sink_end ? begin : Maximum(begin, visible_.low), end};
  }

  Visible visible_;
  int64_t kv_len_;
  int64_t page_size_;
  const int32_t* selection_ = nullptr;  // [runs_]
  int64_t runs_ = 2;
  int64_t at_ = 0;
  Run run_ = {0, 0};
};

// The visible positions of a tile's rows.
JAX_BSK_INLINE Visible VisibleTo(const ForwardParams& p, const Tile& tile, const Mask& mask) {
  const int64_t group = p.shape.heads / p.shape.kv_heads;
  return Visible(mask, tile.kv_len, tile.first_row / group, (tile.first_row + tile.rows - 1) / group);
}

inline int64_t VisitedPositions(const ForwardParams& p, const Tile& tile) {
  if (tile.kv_len < 0) return 0;
  Cursor cursor(p, tile, VisibleTo(p, tile, Mask(p, tile)));
  int64_t count = 0;
  for (Run run = cursor.Next(INT64_MAX / 2); run.begin < run.end; run = cursor.Next(INT64_MAX / 2)) {
    count += run.end - run.begin;
  }
  return count;
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
