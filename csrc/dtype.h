// Element types that kernels are told about.
#pragma once

#include <cstdint>

namespace jax_bsk {

enum class DType : int32_t { kF16, kBF16, kF32, kF64 };

}  // namespace jax_bsk
