// Dropout of the pairs that a thread has in the accumulator of a tensor core's product, be its rows queries or keys.
#pragma once

#include <cstdint>

#include "attention/dropout.h"

namespace jax_bsk::attention::cuda {

// The words of a thread's pairs in one m16 tile, of which it has rows `row` and row + 8, and columns column + 8n and
// + 1. The four pairs of a word are all its own.
template <bool kKeyRows, int kN8>
struct DropoutWords {
  static_assert(kN8 % 2 == 0, "a word is of 16 columns");
  uint32_t words[kN8 / 2][2];

  // kKeyRows: rows are keys and columns queries. row % 16 and column % 16 are below 8.
  __device__ __forceinline__ void Make(uint32_t head_key, int row, int column) {
    const uint32_t row_word = kKeyRows ? DropoutKeyWord(row) : DropoutQueryWord(head_key, row);
#pragma unroll
    for (int pair = 0; pair < kN8 / 2; ++pair)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = column + 16 * pair + e;
        words[pair][e] = kKeyRows ? DropoutWord(DropoutQueryWord(head_key, at), row_word)
                                  : DropoutWord(row_word, DropoutKeyWord(at));
      }
  }

  // Whether the pair in acc[n][e] is dropped.
  __device__ __forceinline__ bool IsDropped(int n, int e, int threshold) const {
    const int byte = kKeyRows ? n % 2 + 2 * (e / 2) : e / 2 + 2 * (n % 2);
    return attention::IsDropped(words[n / 2][e % 2], byte, threshold);
  }
};

// All ones where the byte of that number has its highest bit set, else 0: for 16 bits each of `first` and `second`, and
// for 32 bits. (prmt replicates a sign where the selector has 8.)
__device__ __forceinline__ uint32_t KeptPair(uint32_t first, uint32_t second, int byte) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(first), "r"(second), "r"((8 | byte) * 0x11 | (12 | byte) * 0x1100));
  return mask;
}
__device__ __forceinline__ uint32_t KeptWord(uint32_t kept, int byte) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(kept), "r"((8 | byte) * 0x1111));
  return mask;
}

}  // namespace jax_bsk::attention::cuda
