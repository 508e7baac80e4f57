// The kernels of one instruction set for every element type, as the table ../cpu.cc calls through. Included by
// isa_*.cc, after the header of that name in csrc/cpu.
#pragma once

#include "forward.h"
#include "kernels.h"

namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA {

// Calls visit(C(), E()) with the compute type and the element type of a call.
template <class Visit>
JAX_BSK_INLINE auto WithTypes(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kF16:
      return visit(float(), F16());
    case DType::kBF16:
      return visit(float(), BF16());
    case DType::kF64:
      return visit(double(), double());
    default:
      return visit(float(), float());
  }
}

inline size_t ScratchBytes(const ForwardParams& p) {
  return WithTypes(p.dtype, [&](auto c, auto e) {
    return ForwardScratch<decltype(c), decltype(e)>(p.shape, kTileRows, nullptr).bytes;
  });
}

inline size_t BytesOfPartial(const ForwardParams& p, const Tile& tile) {
  return WithTypes(p.dtype, [&](auto c, auto) { return PartialBytes<decltype(c)>(p, tile); });
}

inline void RunWhole(const ForwardParams& p, const Tile& tile, void* scratch) {
  WithTypes(p.dtype, [&](auto c, auto e) { WholeTask<decltype(c), decltype(e)>(p, tile, scratch); });
}

inline void RunPart(const ForwardParams& p, const Tile& tile, int64_t part, void* partial, void* scratch) {
  WithTypes(p.dtype, [&](auto c, auto e) { PartTask<decltype(c), decltype(e)>(p, tile, part, partial, scratch); });
}

inline void RunMerge(const ForwardParams& p, const Tile& tile, int64_t parts, void* partials, void* scratch) {
  WithTypes(p.dtype, [&](auto c, auto e) { MergeTask<decltype(c), decltype(e)>(p, tile, parts, partials, scratch); });
}

inline void RunRest(const ForwardParams& p, const Rest& rest) {
  WithTypes(p.dtype, [&](auto c, auto e) { RestTask<decltype(c), decltype(e)>(p, rest); });
}

constexpr Kernels kKernels = {
    JAX_BSK_CPU_ISA_NAME, ScratchBytes, VisitedPositions, BytesOfPartial, RunWhole, RunPart, RunMerge, RunRest};

}  // namespace jax_bsk::decode::cpu::JAX_BSK_CPU_ISA
