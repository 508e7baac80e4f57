// Scores as unsigned numbers of the same order, on every platform.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_BSK_EVERYWHERE __host__ __device__
#else
#define JAX_BSK_EVERYWHERE
#endif

namespace jax_bsk::lists {

// Keys of groups that a row must take; no score has it. One that it never takes has 0.
constexpr uint32_t kRequiredKey = 0xFFFFFFFFu;

// Key of a float32's bits; magnitudes below `tiny` count as 0. So do -0 and, in XLA's sort on the CPU but not on GPUs,
// subnormal numbers: a kernel agrees with the plain JAX of its own platform. The largest finite number is equal to +inf
// there, too. NaN and -inf have 0. Without branches, so that a warp's loads need not wait for each other.
JAX_BSK_EVERYWHERE inline uint32_t ScoreKey(uint32_t bits, uint32_t tiny) {
  constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7F800000u;
  constexpr uint32_t kLargest = kSign | (kInfinity - 1), kSmallest = ~kLargest;  // keys of what is finite
  const uint32_t magnitude = bits & ~kSign;
  uint32_t key = bits ^ (bits & kSign ? ~0u : kSign);
  key = key < kSmallest ? 0 : key > kLargest ? kLargest : key;
  key = magnitude > kInfinity ? 0 : key;
  return magnitude < tiny ? kSign : key;
}

}  // namespace jax_bsk::lists
