// Blocks of a dense operand in scratch memory, packed once for all the products of a task that need them.
#pragma once

#include "cpu/scratch.h"
#include "matrix.h"

namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA {

// Block `number` has one place, number % places: where each has its own, each is packed once.
template <class C>
class HeldBlocks {
 public:
  // Room for `count` blocks of `size` elements, or for as many as `bytes` hold.
  HeldBlocks(Carver& carver, int64_t count, int64_t size, int64_t bytes)
      : size_(size), places_(bytes / (size * static_cast<int64_t>(sizeof(C)))) {
    if (places_ > count) places_ = count;
    if (places_ < 1) places_ = 1;
    numbers_ = carver.Take<int64_t>(places_);
    blocks_ = carver.Take<C>(places_ * size_);
  }

  void Clear() { Fill<int64_t>(numbers_, places_, -1); }

  bool Holds(int64_t number) const { return numbers_[number % places_] == number; }

  // The address of the block; pack(to) writes it unless it is there already.
  template <class Pack>
  JAX_BSK_INLINE const C* Get(int64_t number, const Pack& pack) {
    C* const block = blocks_ + number % places_ * size_;
    if (!Holds(number)) {
      pack(block);
      numbers_[number % places_] = number;
    }
    return block;
  }

 private:
  int64_t size_;
  int64_t places_;
  int64_t* numbers_;  // [places] of the blocks that are there, -1 for none
  C* blocks_;         // [places, size]
};

}  // namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA
