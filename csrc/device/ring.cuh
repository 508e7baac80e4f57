// Small things that the Hopper kernels share: positions in rings of buffers, words read for a warp, divisions by
// numbers the host knows.
#pragma once

#include <cstdint>

#include "device/ptx/barrier.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::device::sm90 {

// A position in a ring of kSize buffers, as the number of buffers used before: one register. Both sides of a ring count
// the same way; Full() is the parity of the phase a reader waits for, Empty() that of the phase a writer waits for.
template <int kSize>
struct Ring {
  static constexpr uint32_t kPeriod = 2 * kSize;  // count % kPeriod tells as much as count
  uint32_t count = 0;
  __device__ __forceinline__ int Stage() const { return count % kSize; }
  __device__ __forceinline__ uint32_t Full() const { return count / kSize & 1; }
  __device__ __forceinline__ uint32_t Empty() const { return Full() ^ 1; }
  __device__ __forceinline__ void Advance() { ++count; }
};

// A word of shared memory that one lane reads for all: what the lane releases afterwards it has then read itself, also
// as far as compute-sanitizer can tell (it does not see that a converged warp reads together). And one the compiler
// knows to be the same in all lanes: products are not issued under divergence.
template <typename Word>
__device__ __forceinline__ Word ReadShared(const Word& word) {
  Word x = 0;
  if (device::ThreadHere() % 32 == 0) x = word;
  return __shfl_sync(0xFFFFFFFFu, x, 0);
}

// Arrivals of a warp that releases a buffer which all its lanes have read: one, once they all have. compute-sanitizer's
// racecheck does not see that the other lanes have read before; in what is built for it (JAX_BSK_RACECHECK) every lane
// arrives for itself.
#ifdef JAX_BSK_RACECHECK
constexpr int kReleasesPerWarp = 32;
#else
constexpr int kReleasesPerWarp = 1;
#endif
__device__ __forceinline__ void ReleaseForWarp(Barrier& barrier) {
  __syncwarp();
  if (kReleasesPerWarp == 32 || ElectLane()) Arrive(barrier);
}

// Division of 0 <= n < 2^31 by a number known to the host: a multiplication (Granlund and Montgomery 1994,
// Theorem 4.2). A tile's place takes three, before anything of it can be read.
struct Divider {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;
  Divider() = default;
  __host__ explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  __device__ __forceinline__ int Quotient(int n) const {
    return static_cast<int>((__umulhi(n, multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  __device__ __forceinline__ int Remainder(int n, int quotient) const {
    return n - quotient * static_cast<int>(divisor);
  }
};

}  // namespace jax_bsk::device::sm90
