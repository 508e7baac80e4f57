// The table that an instruction set's translation unit (isa_*.cc) gives to ../cpu.cc. Plain function pointers: code
// built with wider instructions must stay behind this table, or a machine without them could execute it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace jax_bsk::matmul::cpu {

// Columns of the result that are computed at a time, in bytes of the type that is computed in: the width of the widest
// tile of cpu/multiply.h, so that 64 rows of the dense operand take a third of a 48 KiB first-level cache. 512 bytes
// were no faster.
constexpr int64_t kPanelBytes = 256;

// A part of a product: for one member of the batch, out blocks [first_block, end_block) of the panel that begins at
// `column` of the width.
struct ProductPart {
  int64_t b;
  int64_t column;
  int64_t first_block;
  int64_t end_block;
};

// A part of a sampled product: for one member of the batch, entries [first, end).
struct SampledPart {
  int64_t b;
  int64_t first;
  int64_t end;
};

struct Kernels {
  const char* name;
  size_t (*product_scratch)(const ProductParams&);                   // bytes, aligned as a worker's are
  size_t (*sampled_scratch)(const SampledParams&, int64_t entries);  // for parts of up to so many
  void (*product)(const ProductParams&, const ProductPart&, void* scratch);
  void (*sampled)(const SampledParams&, const SampledPart&, void* scratch);
};

// Null when this build has no code for the instruction set; whether the machine has it is the caller's question.
const Kernels* BaselineKernels();
const Kernels* Avx2Kernels();
const Kernels* Avx512Kernels();

}  // namespace jax_bsk::matmul::cpu
