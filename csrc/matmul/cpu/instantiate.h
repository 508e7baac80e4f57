// The kernels of one instruction set for every element type, as the table ../cpu.cc calls through. Included by
// isa_*.cc, after the header of that name in csrc/cpu.
#pragma once

#include "kernels.h"
#include "product.h"
#include "sampled.h"

namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA {

inline size_t SizeProduct(const ProductParams& p) {
  return p.dtype == DType::kF64 ? ProductScratch<double>(p, nullptr).bytes : ProductScratch<float>(p, nullptr).bytes;
}

inline size_t SizeSampled(const SampledParams& p, int64_t entries) {
  return p.dtype == DType::kF64 ? SampledScratch<double>(p, entries, nullptr).bytes
                                : SampledScratch<float>(p, entries, nullptr).bytes;
}

inline void RunProduct(const ProductParams& p, const ProductPart& part, void* scratch) {
  const bool wide = p.out_dtype == DType::kF32;
  switch (p.dtype) {
    case DType::kF16:
      return wide ? Product<float, F16, float>(p, part, scratch) : Product<float, F16, F16>(p, part, scratch);
    case DType::kBF16:
      return wide ? Product<float, BF16, float>(p, part, scratch) : Product<float, BF16, BF16>(p, part, scratch);
    case DType::kF32:
      return Product<float, float, float>(p, part, scratch);
    case DType::kF64:
      return wide ? Product<double, double, float>(p, part, scratch)
                  : Product<double, double, double>(p, part, scratch);
  }
}

inline void RunSampled(const SampledParams& p, const SampledPart& part, void* scratch) {
  const bool wide = p.out_dtype == DType::kF32;
  switch (p.dtype) {
    case DType::kF16:
      return wide ? Sampled<float, F16, float>(p, part, scratch) : Sampled<float, F16, F16>(p, part, scratch);
    case DType::kBF16:
      return wide ? Sampled<float, BF16, float>(p, part, scratch) : Sampled<float, BF16, BF16>(p, part, scratch);
    case DType::kF32:
      return Sampled<float, float, float>(p, part, scratch);
    case DType::kF64:
      return wide ? Sampled<double, double, float>(p, part, scratch)
                  : Sampled<double, double, double>(p, part, scratch);
  }
}

constexpr Kernels kKernels = {JAX_BSK_CPU_ISA_NAME, SizeProduct, SizeSampled, RunProduct, RunSampled};

}  // namespace jax_bsk::matmul::cpu::JAX_BSK_CPU_ISA
