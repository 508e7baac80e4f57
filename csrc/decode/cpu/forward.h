// A tile in parts: each part of so many visited positions is summed by itself, and the parts are put together in their
// order, by whom and when does not matter.
#pragma once

#include "few.h"
#include "many.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

template <class C, class E>
struct ForwardScratch {
  E* zeros;  // [max(head_dim, value_dim)]
  FewScratch<C> few;
  ManyScratch<C> many;
  Partial<C> part, all;
  size_t bytes;

  // Of a tile of `rows` rows.
  ForwardScratch(const Shape& s, int64_t rows, void* memory) : ForwardScratch(s, rows, Carver(memory)) {}

 private:
  ForwardScratch(const Shape& s, int64_t rows, Carver carver)
      : zeros(carver.Take<E>(Maximum(s.head_dim, s.value_dim))),
        few(carver, s),
        many(carver, s),
        part(carver, rows, s.value_dim),
        all(carver, rows, s.value_dim),
        bytes(carver.Bytes()) {}
};

template <class C>
size_t PartialBytes(const ForwardParams& p, const Tile& tile) {
  Carver carver(nullptr);
  Partial<C>(carver, tile.rows, p.shape.value_dim);
  return carver.Bytes();
}

template <class C>
Partial<C> PartialAt(const ForwardParams& p, const Tile& tile, void* memory) {
  Carver carver(memory);
  return Partial<C>(carver, tile.rows, p.shape.value_dim);
}

// Values of rows that nothing is computed for.
template <class C, class E>
void FillRow(const ForwardParams& p, int64_t index, bool poisoned) {
  E* const out = static_cast<E*>(p.out) + index * p.shape.value_dim;
  FillRows<C>(out, 0, 1, p.shape.value_dim, poisoned ? kNaN<C> : C(0));
  p.lse[index] = poisoned ? kNaN<float> : kNoLogSumExp<float>;
}

template <class C, class E>
void RestTask(const ForwardParams& p, const Rest& rest) {
  const int64_t first = (rest.group * p.shape.tokens + rest.first_token) * p.shape.heads;
  for (int64_t i = 0; i < rest.tokens * p.shape.heads; ++i) FillRow<C, E>(p, first + i, rest.poisoned);
}

// The next `tile.part` positions.
template <class C, class E>
void ComputePart(const ForwardParams& p, const Tile& tile, Blocks<E>& blocks, const ForwardScratch<C, E>& x,
                 const Partial<C>& result) {
  if (HasFewRows<C>(p.shape, tile.rows)) {
    FewRowsPart<C, E>(p, tile, blocks, tile.part, x.zeros, x.few, result);
  } else {
    ManyRowsPart<C, E>(p, tile, blocks, tile.part, x.zeros, x.many, result);
  }
}

template <class C, class E>
void PartTask(const ForwardParams& p, const Tile& tile, int64_t part, void* partial, void* memory) {
  const ForwardScratch<C, E> x(p.shape, tile.rows, memory);
  Fill<E>(x.zeros, Maximum(p.shape.head_dim, p.shape.value_dim), E{});
  Blocks<E> blocks(p, tile, x.zeros);
  blocks.Skip(part * tile.part);
  ComputePart<C, E>(p, tile, blocks, x, PartialAt<C>(p, tile, partial));
}

template <class C, class E>
void MergeTask(const ForwardParams& p, const Tile& tile, int64_t parts, void* partials, void* memory) {
  const ForwardScratch<C, E> x(p.shape, tile.rows, memory);
  x.all.Clear();
  const size_t bytes = PartialBytes<C>(p, tile);
  for (int64_t i = 0; i < parts; ++i) {
    Merge<C>(PartialAt<C>(p, tile, static_cast<char*>(partials) + i * bytes), x.all);
  }
  Finish<C, E>(p, tile, x.all);
}

template <class C, class E>
void WholeTask(const ForwardParams& p, const Tile& tile, void* memory) {
  if (tile.kv_len < 0) {
    for (int64_t r = 0; r < tile.rows; ++r) FillRow<C, E>(p, RowIndex(p, tile, r), true);
    return;
  }
  const ForwardScratch<C, E> x(p.shape, tile.rows, memory);
  Fill<E>(x.zeros, Maximum(p.shape.head_dim, p.shape.value_dim), E{});
  Blocks<E> blocks(p, tile, x.zeros);
  int64_t left = VisitedPositions(p, tile);
  x.all.Clear();
  for (; left > 0; left -= tile.part) {
    ComputePart<C, E>(p, tile, blocks, x, x.part);
    Merge<C>(x.part, x.all);
  }
  Finish<C, E>(p, tile, x.all);
}

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
