// Which pairs a call drops: a function of the head's key, the query and the key alone, the same in every kernel and in
// jax_bsk/attention/dropout.py, whatever the order of blocks, the tiles, or the sharding of batch and heads.
//
// Pairs are taken four at a time, {q, q + 8} x {k, k + 8} of every 16 x 16: those that one thread has in the
// accumulator of a tensor core's product, be its rows queries or keys. The four share a word, of which each has a byte.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace jax_bsk::attention {

// Probabilities of pairs whose byte is below `threshold` become 0, and the others are multiplied by `Scale()`.
struct Dropout {
  const uint32_t* keys;  // [B, N]; null: nothing is dropped
  int threshold;         // 1 .. 255, in 256ths
};

JAX_BSK_HOST_DEVICE bool Drops(const Dropout& dropout) { return dropout.keys != nullptr; }

// A bijective hash of 32 bits ("lowbias32" of C. Wellons' search for such functions, public domain).
JAX_BSK_HOST_DEVICE uint32_t DropoutHash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  x ^= x >> 16;
  return x;
}

// The number of a position among those that share its words: 8 of every 16.
JAX_BSK_HOST_DEVICE uint32_t DropoutPlace(int position) {
  return static_cast<uint32_t>(position >> 4 << 3 | (position & 7));
}
// What a query contributes to its words, with its head's key, and what a key does.
JAX_BSK_HOST_DEVICE uint32_t DropoutQueryWordOf(uint32_t head_key, uint32_t place) {
  return DropoutHash(head_key + 0x9e3779b9U * (place + 1));
}
JAX_BSK_HOST_DEVICE uint32_t DropoutQueryWord(uint32_t head_key, int query) {
  return DropoutQueryWordOf(head_key, DropoutPlace(query));
}
JAX_BSK_HOST_DEVICE uint32_t DropoutKeyWordOf(uint32_t place) { return DropoutHash(place + 0x85ebca6bU); }
JAX_BSK_HOST_DEVICE uint32_t DropoutKeyWord(int key) { return DropoutKeyWordOf(DropoutPlace(key)); }

// The product of two words, of 64 bits.
JAX_BSK_HOST_DEVICE uint64_t DropoutProduct(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__  // of the operator between 64 bits nvcc makes one more addition
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// The word of four pairs, and the place of a pair's byte in it: bits 8 * byte .. 8 * byte + 7. Both arguments are
// hashed already, so two products mix them well enough: of 2^30 pairs, statistics of bytes, rows, columns, neighbours,
// heads and pairs of rows are those of random numbers. One product is not enough: where two keys' words are to each
// other as small whole numbers, the keys are dropped together more often than by chance.
JAX_BSK_HOST_DEVICE uint64_t DropoutProducts(uint32_t query_word, uint32_t key_word) {
  const uint64_t first = DropoutProduct(query_word, key_word);
  return DropoutProduct(static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32));
}
JAX_BSK_HOST_DEVICE uint32_t DropoutWord(uint32_t query_word, uint32_t key_word) {
  const uint64_t products = DropoutProducts(query_word, key_word);
  return static_cast<uint32_t>(products) ^ static_cast<uint32_t>(products >> 32);
}
JAX_BSK_HOST_DEVICE int DropoutByte(int query, int key) { return (query >> 3 & 1) + 2 * (key >> 3 & 1); }

JAX_BSK_HOST_DEVICE bool IsDropped(uint32_t word, int byte, int threshold) {
  return static_cast<int>(word >> (8 * byte) & 0xFF) < threshold;
}

// The four bytes at once: a byte of Flags(word) ^ flip has its highest bit set where the pair of that byte stays.
// A byte x stays where x >= threshold, which is ~x < 256 - threshold: thresholds of more than 127 are those of at most
// 128 for the complement.
struct KeptBytes {
  uint32_t flip;  // all ones for the complement, else 0
  uint32_t less;  // 1 .. 128 in each byte

  JAX_BSK_HOST_DEVICE static KeptBytes Of(int threshold) {
    const bool high = threshold > 127;
    return {high ? ~0U : 0U, static_cast<uint32_t>(high ? 256 - threshold : threshold) * 0x01010101U};
  }
  // Whether the lower seven bits reach `less`; no byte borrows from the next.
  JAX_BSK_HOST_DEVICE uint32_t Lower(uint32_t byte) const { return (byte | 0x80808080U) - less; }
  JAX_BSK_HOST_DEVICE uint32_t Flags(uint32_t word) const { return (word ^ flip) | Lower(word ^ flip); }
};

// The factor of the pairs that stay.
JAX_BSK_HOST_DEVICE float DropoutScale(int threshold) { return 256.f / static_cast<float>(256 - threshold); }

}  // namespace jax_bsk::attention
