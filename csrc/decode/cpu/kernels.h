// The table that an instruction set's translation unit (isa_*.cc) gives to ../cpu.cc. Plain function pointers: code
// built with wider instructions must stay behind this table, or a machine without them could execute it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace jax_bsk::decode::cpu {

// Rows of a tile at most.
inline constexpr int64_t kTileRows = 64;
// With no more rows than this, reading the keys is most of a tile's work (see few.h).
inline constexpr int64_t kFewRows = 16;

// Some rows of a sequence and a key/value head. Row r of them is token r / (heads / kv_heads) and head
// r % (heads / kv_heads) of the group. Everything has been compared with its bounds, but for kv_len.
struct Tile {
  int64_t group;
  int64_t seq;
  int64_t kv_head;
  int64_t first_token;  // of the sequence
  int64_t q_len;
  int64_t kv_len;  // negative: the length is bad, and the rows become NaN
  int64_t first_row;
  int64_t rows;
  int64_t part;  // visited positions of a part
};

// Tokens that no tile has: they become 0, or NaN.
struct Rest {
  int64_t group;
  int64_t first_token;
  int64_t tokens;
  bool poisoned;
};

struct Kernels {
  const char* name;
  size_t (*scratch)(const ForwardParams&);  // bytes, aligned as a worker's are; enough for all of the following
  int64_t (*visited)(const ForwardParams&, const Tile&);            // positions that a tile visits
  size_t (*partial)(const ForwardParams&, const Tile&);             // bytes of a part's result
  void (*whole)(const ForwardParams&, const Tile&, void* scratch);  // all parts in their order, and the results
  void (*part)(const ForwardParams&, const Tile&, int64_t part, void* partial, void* scratch);
  // The results from those of `parts` parts, which lie in a row.
  void (*merge)(const ForwardParams&, const Tile&, int64_t parts, void* partials, void* scratch);
  void (*rest)(const ForwardParams&, const Rest&);
};

// Null when this build has no code for the instruction set; whether the machine has it is the caller's question.
const Kernels* BaselineKernels();
const Kernels* Avx2Kernels();
const Kernels* Avx512Kernels();

}  // namespace jax_bsk::decode::cpu
