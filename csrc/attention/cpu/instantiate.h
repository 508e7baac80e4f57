// The kernels of one instruction set for every element type, as the table ../cpu.cc calls through. Included by
// isa_*.cc, after the header of that name in csrc/cpu.
#pragma once

#include "backward.h"
#include "bias_gradient.h"
#include "delta.h"
#include "forward.h"
#include "kernels.h"

namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA {

template <class C>
size_t ScratchBytes(const ForwardParams& p) {
  return ForwardScratch<C>(p, nullptr).bytes;
}

template <class C>
size_t ScratchBytes(const BackwardParams& p) {
  return BackwardScratch<C>(p, nullptr).bytes;
}

template <class C>
size_t ScratchBytes(const BiasGradientParams& p) {
  return BiasGradientScratch<C>(p, nullptr).bytes;
}

template <class Params>
size_t Scratch(const Params& p) {
  return p.dtype == DType::kF64 ? ScratchBytes<double>(p) : ScratchBytes<float>(p);
}

inline void RunForward(const ForwardParams& p, int64_t task, void* scratch) {
  switch (p.dtype) {
    case DType::kF16:
      return ForwardTask<float, F16>(p, task, scratch);
    case DType::kBF16:
      return ForwardTask<float, BF16>(p, task, scratch);
    case DType::kF32:
      return ForwardTask<float, float>(p, task, scratch);
    case DType::kF64:
      return ForwardTask<double, double>(p, task, scratch);
  }
}

inline void RunBackwardQuery(const BackwardParams& p, int64_t task, void* scratch) {
  switch (p.dtype) {
    case DType::kF16:
      return BackwardQueryTask<float, F16>(p, task, scratch);
    case DType::kBF16:
      return BackwardQueryTask<float, BF16>(p, task, scratch);
    case DType::kF32:
      return BackwardQueryTask<float, float>(p, task, scratch);
    case DType::kF64:
      return BackwardQueryTask<double, double>(p, task, scratch);
  }
}

inline void RunBackwardKey(const BackwardParams& p, int64_t task, void* scratch) {
  switch (p.dtype) {
    case DType::kF16:
      return BackwardKeyTask<float, F16>(p, task, scratch);
    case DType::kBF16:
      return BackwardKeyTask<float, BF16>(p, task, scratch);
    case DType::kF32:
      return BackwardKeyTask<float, float>(p, task, scratch);
    case DType::kF64:
      return BackwardKeyTask<double, double>(p, task, scratch);
  }
}

inline void RunBiasGradient(const BiasGradientParams& p, int64_t task, void* scratch) {
  switch (p.dtype) {
    case DType::kF16:
      return BiasGradientTask<float, F16>(p, task, scratch);
    case DType::kBF16:
      return BiasGradientTask<float, BF16>(p, task, scratch);
    case DType::kF32:
      return BiasGradientTask<float, float>(p, task, scratch);
    case DType::kF64:
      return BiasGradientTask<double, double>(p, task, scratch);
  }
}

inline void RunDelta(const DeltaParams& p, int64_t task) {
  switch (p.dtype) {
    case DType::kF16:
      return DeltaTask<float, F16>(p, task);
    case DType::kBF16:
      return DeltaTask<float, BF16>(p, task);
    case DType::kF32:
      return DeltaTask<float, float>(p, task);
    case DType::kF64:
      return DeltaTask<double, double>(p, task);
  }
}

constexpr Kernels kKernels = {
    JAX_BSK_CPU_ISA_NAME, Scratch<ForwardParams>,      Scratch<BackwardParams>, RunForward, RunBackwardQuery,
    RunBackwardKey,       Scratch<BiasGradientParams>, RunBiasGradient,         RunDelta,
};

}  // namespace jax_bsk::attention::cpu::JAX_BSK_CPU_ISA
