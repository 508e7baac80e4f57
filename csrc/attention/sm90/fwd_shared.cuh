// Everything that producer and consumers of the Hopper forward share: the layout of shared memory, and the messages
// that travel with the pipeline's stages.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/sm90/bias.cuh"
#include "attention/sm90/config.h"
#include "attention/softmax.cuh"
#include "device/element.h"
#include "device/ptx/barrier.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/wgmma.cuh"
#include "device/ring.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

using device::sm90::Barrier;
using device::sm90::Divider;
using device::sm90::kReleasesPerWarp;
using device::sm90::ReadShared;
using device::sm90::Ring;

// The message of the scheduler to the loader and the consumers: the CTA's next tile.
struct TileHeader {
  enum Kind : int { kLive, kEmpty, kPoisoned, kEnd };  // kEmpty, kPoisoned: no step follows
  int kind;
  int tile;  // its number
  int q_start;
  int head;
  int batch;
  int kv_head;
  int q_rows;     // rows within the example's query length, 0 .. kTileQ
  int key_limit;  // the example's key/value length
  float sink;     // the head's logit, -inf without one
  lists::ListRow row;
  const uint32_t* bits;   // bit tile 0 from the tile's first row on
  int line;               // of a bias by distance: LineIndex of the first 64 queries
  uint32_t query_parity;  // of the phase in which a live tile's queries arrive
};

// One step: a tile of keys and values of at most kMaxPieces blocks.
struct alignas(16) StepInfo {
  static constexpr int kLast = 1, kRowPoisoned = 2, kMasked = 4, kBits = 8;  // kBits << piece: it has a bit tile
  static constexpr int kFinal = 32;  // the CTA's last, where no header says so (fwd_feeder.cuh)
  static constexpr int kHeader = 8;  // shift: the place of the tile's header in its ring, as far as a ring needs it
  int start[kMaxPieces];             // first key of each 64 keys of the tile
  int limit;                         // the example's key/value length
  int flags;
};

// What a step adds to its logits, with kExtras.
struct alignas(16) StepBias {
  // Bits of `read`: of each 64 keys, the biases by distance lie on no line; other terms are given. These are read. And
  // kRaise: references are to follow (RowSoftmax), because a bias is read, or a line grows too much from step to step.
  static constexpr int kOther = 1 << kMaxPieces, kRaise = kOther << 1;
  float2 lines[2][kMaxPieces];  // of the queries of each warpgroup and each 64 keys: BiasLines; 0 where there is none
  int read[2];                  // of each warpgroup
  int tiles[kMaxPieces];        // numbers of the entries' tiles of biases: see Bias
};

// Biases on lines as a product of tensor cores: in a tile of 64 x 64 pairs line {x, y} adds x + y (c - r) to row r and
// column c, which is [y, x - y r] times [c, 1]. Each of the two numbers of a row is the sum of three of type bfloat16,
// which hold all of its 24 bits; columns are whole numbers below 64, which are exact. So a row has eight columns of a
// product's 16 for the lines of each 64 keys, {y: 3, 0, x - y r: 3, 0}, and a key has {c, c, c, 0, 1, 1, 1, 0} for
// those of its 64 keys, and else zeros. (Added in registers, lines of 128 keys took 250 clocks of a step of 2,560, and
// put into the accumulators before the products, 900. H200, 128 dimensions.)
//
// Operands without swizzle: [8 rows][half of the columns][row][8 columns].
template <typename Config>
struct BiasRamp {
  alignas(128) uint16_t keys[Config::kTileKv / 8][2][8][8];
  alignas(128) uint4 rows[Config::kKeyStages][Config::kConsumers][kWarpgroupRows / 8][2][8];

  __device__ __forceinline__ void Init() {
    constexpr uint32_t kOne = 0x3F80;
    for (int i = static_cast<int>(threadIdx.x); i < Config::kTileKv * 16; i += Config::kThreads) {
      const int key = i / 16, column = i % 16;
      const uint32_t ramp = __float_as_uint(static_cast<float>(key % 64)) >> 16;
      keys[key / 8][column / 8][key % 8][column % 8] =
          static_cast<uint16_t>(column / 8 != key / 64 || column % 4 == 3 ? 0
                                : column % 8 < 4                          ? ramp
                                                                          : kOne);
    }
    uint4* all_rows = &rows[0][0][0][0][0];
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(rows) / sizeof(uint4));
         i += Config::kThreads) {
      all_rows[i] = make_uint4(0, 0, 0, 0);
    }
    device::sm90::FenceAsyncProxy();
  }
  // Of the first operand's columns 8 half .. 8 half + 7 of a row, for a line {x, y} of those 64 keys. To be followed by
  // a fence, before consumers hear of it.
  __device__ __forceinline__ void Write(int stage, int group, int row, int half, float x, float y) {
    const float value = fmaf(-y, static_cast<float>(row), x);
    const uint2 slope = Parts(y), rest = Parts(value);
    rows[stage][group][row / 8][half][row % 8] = make_uint4(slope.x, slope.y, rest.x, rest.y);
  }
  __device__ __forceinline__ uint64_t Keys() const { return Operand(keys); }
  __device__ __forceinline__ uint64_t Rows(int stage, int group) const { return Operand(rows[stage][group]); }

 private:
  __device__ __forceinline__ static uint64_t Operand(const void* first) {
    return device::sm90::PlainDescriptor(first, 8 * 16, 2 * 8 * 16);
  }
  // {high, middle}, {low, 0}.
  __device__ __forceinline__ static uint2 Parts(float x) {
    const auto part = [](float y) { return __uint_as_float(device::PackPair<device::BFloat16>(0.f, y) & 0xFFFF0000u); };
    const float high = part(x), middle = part(x - high);
    return {device::PackPair<device::BFloat16>(high, middle),
            device::PackPair<device::BFloat16>(x - high - middle, 0.f)};
  }
};
struct NoBiasRamp {};

// What ForwardFeeder, where there is one, copies of lists before it needs them.
template <bool kFeeder>
struct ListAhead {};
template <>
struct ListAhead<true> {
  static constexpr int kEntries = 32, kWords = 5;
  int words[kWords];         // that say where the next tile's row lies, and its lengths and sink
  int entries[2][kEntries];  // ids and bit tiles of the row: a ring, of which a half is asked for at a time
};

template <typename Config>
struct ForwardShared {
  using Element = typename Config::Element;
  static constexpr int kKeyStages = Config::kKeyStages, kValueStages = Config::kValueStages;
  static constexpr int kQueryElements = Config::kChunks * Config::kTileQ * kChunk;
  static constexpr int kKeyElements = Config::kChunks * Config::kTileKv * kChunk;
  // The consumers' tile, the loader's, and two that are known beforehand; for a feeder, see there.
  static constexpr int kHeaders = Config::kFeeder ? 8 : 4;

  // Tiles are [chunk][row][64 columns], swizzled.
  alignas(1024) Element query[kQueryElements];
  alignas(1024) Element key[kKeyStages][kKeyElements];
  alignas(1024) Element value[kValueStages][kKeyElements];
  alignas(16) uint8_t bits[kKeyStages][Config::kTileQ * 16];  // bit tiles of a step; see BitRow
  // Twice the stages: a consumer may read a step's entry until it has finished the step, though the keys' buffer has
  // gone back to the producer.
  StepInfo steps[2 * kKeyStages];
  float gates[Config::kGated ? 2 * kKeyStages : 1][kMaxPieces];  // of each 64 keys of a step, likewise
  StepBias biases[Config::kExtras ? 2 * kKeyStages : 1];         // likewise
  std::conditional_t<Config::kExtras, BiasRamp<Config>, NoBiasRamp> ramp;
  TileHeader headers[kHeaders];
  ListAhead<Config::kFeeder> ahead;
  uint32_t tail_parity;         // the loader's own: of tail_value's next phase. A register less
  int last_inexact;             // see ForwardConsumer::NoteInexact
  int inexact_noted[kHeaders];  // number of the tile that a header's place last noted
  Barrier full_query, empty_query;
  Barrier full_step[kKeyStages];  // with kExtras: the message of the step, for the helpers
  Barrier full_key[kKeyStages], empty_key[kKeyStages], full_value[kValueStages], empty_value[kValueStages];
  Barrier full_header[kHeaders], empty_header[kHeaders];
  Barrier tail_value;  // values of a step that the key/value length cuts, before they are clean
  Barrier open;        // never completes a phase: see ForwardConsumer::Step

  // The message of the CTA's step number `step`.
  __device__ __forceinline__ StepInfo& Step(uint32_t step) { return steps[step % (2 * kKeyStages)]; }

  __device__ __forceinline__ void Init() {
    using device::sm90::InitBarrier;
    // Every consumer warp releases a buffer for itself.
    constexpr int kWarp = kReleasesPerWarp, kWarps = 4 * Config::kConsumers * kWarp;
    constexpr int kHelpers = Config::kHelperWarps * kWarp;
    InitBarrier(full_query, 1);
    InitBarrier(empty_query, kWarps);
    for (int i = 0; i < kKeyStages; ++i) {
      InitBarrier(full_step[i], 1);
      InitBarrier(full_key[i], 1 + kHelpers);
      InitBarrier(empty_key[i], kWarps);
    }
    for (int i = 0; i < kValueStages; ++i) {
      InitBarrier(full_value[i], 1);
      InitBarrier(empty_value[i], kWarps);
    }
    for (int i = 0; i < kHeaders; ++i) {
      InitBarrier(full_header[i], 1);
      InitBarrier(empty_header[i], kWarps + kWarp + kHelpers);
    }
    InitBarrier(tail_value, 1);
    InitBarrier(open, 1);
    tail_parity = 0;
    last_inexact = -1;
    for (int i = 0; i < kHeaders; ++i) inexact_noted[i] = -1;
    device::sm90::FenceBarrierInit();
  }
};

// Numbers that the host computes for a launch, beside the parameters.
struct ForwardPlan {
  CUtensorMap query, key, value;
  LogitMap logits;
  BiasLines bias_lines;
  // With a bias by distance the last keys of a row come first: behind the diagonal most biases fall, and references
  // need not follow what falls.
  int64_t walk_step;       // -1, or 1 from the first key on
  int from_end;            // 1, or 0
  float bias_factor;       // of a bias, in units of a plain logit's product
  float kept_scale;        // of the probabilities that dropout leaves
  int tiles;               // of queries, over all heads and examples
  int past_end;            // first key position past every block
  int bit_bytes;           // of a bit tile's rows that belong to one CTA's tile
  int64_t bit_words;       // of a bit tile
  Divider q_tiles;         // of one head
  Divider heads, group;    // query heads; query heads a key/value head
  int32_t* tile_counter;   // null: one tile a CTA
  int32_t* inexact_tiles;  // [tiles]: see ForwardConsumer::NoteInexact
};

// The bits of 64 keys of a step: for row r of the CTA's tile at BitRow(...) + r * (block_kv / 8). With blocks of 128
// keys a row's sixteen bytes lie together; two blocks of 64 lie one after the other.
template <typename Config>
__device__ __forceinline__ int BitRowOffset(int block_kv, int start, int piece) {
  if (block_kv == 128) return Config::kTileKv == 128 ? 8 * piece : (start & 64) / 8;
  return piece * Config::kTileQ * 8;
}

// The position of a tile. Tiles of one head are neighbours, so that CTAs at work at the same time share keys and values
// in L2 (longest first over all heads lost 11 %, H200); within a head the last comes first, because under a causal mask
// it has the most to do.
template <typename Config>
__device__ __forceinline__ TileHeader PositionOf(int tile, const ForwardPlan& plan) {
  const int row = plan.q_tiles.Quotient(tile);  // batch * heads + head
  TileHeader header;
  header.tile = tile;
  header.q_start = (static_cast<int>(plan.q_tiles.divisor) - 1 - plan.q_tiles.Remainder(tile, row)) * Config::kTileQ;
  header.batch = plan.heads.Quotient(row);
  header.head = plan.heads.Remainder(row, header.batch);
  header.kv_head = plan.group.Quotient(header.head);
  return header;
}

// Sets a tile's limits from the example's lengths, as they came.
template <typename Config>
__device__ __forceinline__ void SetLimits(TileHeader& header, const Shape& shape, int q_length, int kv_length) {
  const int q_end = min(max(q_length, 0), static_cast<int>(shape.q_len));
  header.q_rows = max(0, min(q_end - header.q_start, Config::kTileQ));
  header.key_limit = min(max(kv_length, 0), static_cast<int>(shape.kv_len));
}

}  // namespace jax_bsk::attention::cuda::sm90
