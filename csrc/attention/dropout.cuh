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

// KeptBytes::Of, of which nvcc does not know that `flip` has two values: it would make branches of it.
__device__ __forceinline__ KeptBytes KeptBytesHere(int threshold) {
  KeptBytes bytes = KeptBytes::Of(threshold);
  asm("" : "+r"(bytes.flip));
  return bytes;
}

// Which of a thread's pairs are not dropped, of at most 128 columns: those whose bit 8 * byte + 7 - m is set, of the
// sixteen columns number m, in the word of the column's parity. Byte as in DropoutByte. One word for each of KeptBytes
// would be 16 registers, which no kernel of 128 dimensions has.
struct KeptPairs {
  uint32_t parity[2];

  __device__ __forceinline__ void Clear() { parity[0] = parity[1] = 0; }
  // Enters the four pairs of a DropoutWord, given its products, as KeptBytes says. nvcc would make five logical
  // instructions of these three.
  __device__ __forceinline__ void Add(int m, int e, uint64_t products, const KeptBytes& bytes) {
    const auto low = static_cast<uint32_t>(products), high = static_cast<uint32_t>(products >> 32);
    uint32_t byte, flags;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(byte) : "r"(low), "r"(high), "r"(bytes.flip));  // a ^ b ^ c
    asm("lop3.b32 %0, %1, %2, %3, 0xA8;"
        : "=r"(flags)
        : "r"(byte), "r"(bytes.Lower(byte)), "r"(0x80808080u));  // (a | b) & c
    parity[e] += flags >> m;
  }
  // After all pairs.
  __device__ __forceinline__ void Flip(uint32_t flip) { parity[0] ^= flip, parity[1] ^= flip; }

  __device__ __forceinline__ bool Stays(int m, int e, int byte) const { return parity[e] >> (8 * byte + 7 - m) & 1; }
  // Of two columns that are neighbours, 16 bits each: all ones for a pair that stays, else 0. (prmt replicates a sign
  // where the selector has 8.)
  __device__ __forceinline__ uint32_t Pair(int m, int byte) const {
    uint32_t mask;
    asm("prmt.b32 %0, %1, %2, %3;"
        : "=r"(mask)
        : "r"(parity[0] << m), "r"(parity[1] << m), "r"((8 | byte) * 0x11 | (12 | byte) * 0x1100));
    return mask;
  }
};

}  // namespace jax_bsk::attention::cuda
