// Division by a number that is known on the host, without the twenty instructions that a division takes on the device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace jax_bsk::device {

// Of numbers from 0 to 2^31 - 1 by one from 1 to 2^31 - 1: with l the number of bits of divisor - 1, the quotient is
// the high half of n * ceil(2^(31 + l) / divisor), shifted by l - 1 (Granlund and Montgomery 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    int bits = 0;
    while ((uint64_t{1} << bits) < divisor_) ++bits;
    if (bits == 0) return;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + divisor_ - 1) / divisor_);
    shift_ = bits - 1;
  }
  JAX_BSK_HOST_DEVICE int value() const { return static_cast<int>(divisor_); }
  // The quotient, rounded down and up, and the rest.
  JAX_BSK_HOST_DEVICE int Quotient(int n) const {
    return divisor_ == 1
               ? n
               : static_cast<int>(static_cast<uint32_t>((uint64_t{static_cast<uint32_t>(n)} * multiplier_) >> 32) >>
                                  shift_);
  }
  JAX_BSK_HOST_DEVICE int Ceiling(int n) const { return n == 0 ? 0 : Quotient(n - 1) + 1; }
  JAX_BSK_HOST_DEVICE int Rest(int n) const { return n - Quotient(n) * static_cast<int>(divisor_); }

 private:
  uint32_t divisor_ = 1, multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace jax_bsk::device
