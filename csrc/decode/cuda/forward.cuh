// Attention over a cache in pages, sm_80 and newer: the forward of attention/sm80 with three differences. The query
// heads that share a key/value head are rows of one tile, so that keys and values are read once. A row's keys are cut
// into parts for as many CTAs as there are (Flash-Decoding, Dao et al. 2023), whose results are merged in their order.
// And a CTA's copies run ahead from one unit of work into the next, because memory is what bounds it.
#pragma once

#include <type_traits>

#include "decode/cuda/config.h"
#include "decode/cuda/copies.cuh"
#include "decode/cuda/masks.cuh"
#include "decode/cuda/merge.cuh"
#include "decode/cuda/units.cuh"
#include "device/mma.cuh"
#include "device/numbers.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/dependent_launch.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/matrix.cuh"
#include "device/ptx/thread.cuh"
#include "device/softmax.cuh"
#include "device/tensor_map.h"
#include "device/tile.cuh"

namespace jax_bsk::decode::cuda {

using device::LogitMap;
using device::OnlineSoftmax;

// Steps that are computed at once: of bytes two, which are not more bytes than one of 16 bits, and half of the waits.
// (On sm_80 they spill.) And those that the copies are ahead.
template <typename Config>
#if __CUDA_ARCH__ >= 900
constexpr int kStepsAtOnce = Config::kQuantised ? 2 : 1;
#else
constexpr int kStepsAtOnce = 1;
#endif
template <typename Config>
constexpr int kStepsAhead = Config::kStages - kStepsAtOnce<Config>;

// The stage of a number below 2 kStages.
template <typename Config>
__device__ __forceinline__ int Wrap(int stage) {
  return stage < Config::kStages ? stage : stage - Config::kStages;
}

// Descriptions of units that are kept: of the one that is computed, and of those that the producer is ahead. It is
// kStages steps ahead, of as many units at most.
template <typename Config>
constexpr int kUnitsKept = Config::kStages < 4 ? 4 : 8;

template <typename Config>
struct Shared {
  static_assert(Config::kStages < kUnitsKept<Config>);
  Stage<Config> stages[Config::kStages];  // first: aligned as the copy engine wants it
  uint64_t full[Config::kStages];         // barriers, by which the copy engine says that a stage is here
  // The queries, where registers have no room for them.
  device::Tile<typename Config::Element, Config::kQueriesInRegisters ? 1 : Config::kWideRows, Config::kDim> query;
  int keys[Config::kStages][Config::kTileKv];  // as FoundRow has them
  int tiles[Config::kStages];                  // bit tile of listed keys, or -1, and the step's number in its block
  int steps[Config::kStages];
  union {
    uint8_t by_warp[Config::kWarps];
    uint32_t any;
  } masked[Config::kStages];  // not 0: some row does not attend to a key of the step (that the warp found)
  Unit units[kUnitsKept<Config>];
  float2 stats[Config::kWarps][Config::kNarrowRows];
  uint32_t bad_values[2];  // see device::CleanRows
  int before[1];           // units before each sequence: as many more as there are sequences
};

// ---- Queries: a thread's share of its warp's 16 rows, in the layout of device/mma.cuh

template <typename Config>
struct Queries {
  uint32_t fragments[Config::kQueriesInRegisters ? Config::kDim / 16 : 1][4];
  // Of a row's logits: bfloat16 queries become float16 times a power of two, by which their largest is 1,024 to 2,048.
  // What is 2^-24 of it or more keeps all its bits.
  static constexpr bool kScaled = !std::is_same_v<typename Config::Element, typename Config::Product>;
  float scale[kScaled ? 2 : 1];

  // The element at (row, column) of the tile's first head and query.
  static __device__ __forceinline__ const typename Config::Element* Row(const KernelParams& params, const Unit& unit,
                                                                        int row) {
    const int query = params.by_group_heads.Quotient(unit.row + row), head = params.by_group_heads.Rest(unit.row + row);
    const int64_t token = int64_t{unit.group} * params.tokens + unit.first_token + query;
    return static_cast<const typename Config::Element*>(params.query) +
           (token * params.shape.heads + unit.kv_head * params.group_heads + head) * params.dim;
  }

  // `warp_row`: the warp's first row of the tile. A barrier must follow before the queries are used.
  __device__ __forceinline__ void Load(const KernelParams& params, const Unit& unit, int warp_row,
                                       Shared<Config>& shared) {
    const int dim = params.dim;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
    if constexpr (Config::kQueriesInRegisters) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + g + 8 * half;
        const bool valid = row < unit.rows;
        const auto* from = reinterpret_cast<const uint32_t*>(Row(params, unit, valid ? row : 0));
#pragma unroll
        for (int k = 0; k < Config::kDim / 16; ++k) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            // Columns in the order in which a lane's keys have them: see Multiply.
            const int column = 16 * k + (Config::kQuantised ? 4 * t + 2 * j : 2 * t + 8 * j);
            fragments[k][half + 2 * j] = valid && column < dim ? __ldg(from + column / 2) : 0u;
          }
        }
        if constexpr (kScaled) Scale(half);
      }
    } else {
      using Tile = std::remove_reference_t<decltype(shared.query)>;
      for (int i = thread; i < Tile::kRows * Tile::kChunks; i += Config::kThreads) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks, column = chunk * Tile::kPerChunk;
        const bool valid = row < unit.rows && column < dim;
        const auto* from = Row(params, unit, valid ? row : 0) + (valid ? column : 0);
        *reinterpret_cast<uint4*>(shared.query.Chunk(row, chunk)) =
            valid ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // A row's fragments from bfloat16 to float16.
  __device__ __forceinline__ void Scale(int half) {
    constexpr uint32_t kExponent = 0x7F80;
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < Config::kDim / 16; ++k)
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        const uint32_t low = fragments[k][i] & kExponent, high = fragments[k][i] >> 16 & kExponent;
        largest = max(largest, max(low == kExponent ? 0 : low, high == kExponent ? 0 : high));
      }
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    // Exponents of float32, biased: those of a number and its inverse have the sum 254.
    const uint32_t exponent = min(127 + 10 + 127 - (largest >> 7), 253u);
    const float factor = __uint_as_float(exponent << 23);
    scale[half] = __uint_as_float((254 - exponent) << 23);
#pragma unroll
    for (int k = 0; k < Config::kDim / 16; ++k)
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        const uint32_t pair = fragments[k][i];
        fragments[k][i] = device::PackPair<device::Float16>(__uint_as_float(pair << 16) * factor,
                                                            __uint_as_float(pair & 0xFFFF0000u) * factor);
      }
  }

  // acc = Q K^T.
  template <int kN8, typename KeyTile>
  __device__ __forceinline__ void Multiply(float (&acc)[1][kN8][4], const Shared<Config>& shared, int warp_row,
                                           const KeyTile& key) const {
    device::Clear(acc);
    using Element = typename Config::Product;
    if constexpr (Config::kQuantised) {
      // A lane gets four columns in a row of each 16, 4t to 4t + 3, for one product: any order of the columns will do,
      // if the queries have the same. A word of each of four matrices: two chunks of eight rows, then of the next
      // eight.
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const typename KeyTile::Lane from(key, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < Config::kDim / 16; k += 2) {
#pragma unroll
        for (int n = 0; n < kN8; n += 2) {
          uint32_t words[4];
          device::LoadMatrices(words, from.At(8 * n, k));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t right[2];
            device::Widen<typename Config::Cache, false>(words[i], right);
            device::MultiplyAccumulate<Element>(acc[0][n + i / 2], fragments[k + i % 2], right[0], right[1]);
          }
        }
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int n = 0; n < kN8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][n][e] *= scale[e / 2];
      }
    } else if constexpr (Config::kQueriesInRegisters) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const typename KeyTile::Lane from(key, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < Config::kDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kN8; n += 2) {
          uint32_t right[4];
          device::LoadMatrices(right, from.At(8 * n, 2 * k));
          device::MultiplyAccumulate<Element>(acc[0][n], fragments[k], right[0], right[1]);
          device::MultiplyAccumulate<Element>(acc[0][n + 1], fragments[k], right[2], right[3]);
        }
      }
    } else {
      device::MultiplyRows(acc, shared.query, warp_row, key);
    }
  }
};

// acc += A B as device::MultiplyColumns, B of one byte per element. Of each 16 columns of B the even ones go to one
// tile of eight columns of `acc` and the odd ones to the next: a thread then has four columns in a row, 16c + 4t to 16c
// + 4t + 3, as acc[2c][0], acc[2c + 1][0], acc[2c][1], acc[2c + 1][1].
template <int kK8, int kN8, typename TileB>
__device__ __forceinline__ void MultiplyQuantisedColumns(float (&acc)[1][kN8][4], const float (&a)[1][kK8][4],
                                                         const TileB& b) {
  using Cache = typename TileB::Element;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Four matrices of 8 rows and 16 bytes: rows 0-7 and 8-15 of one chunk, then of the next.
  const typename TileB::Lane from(b, lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kK8 / 2; ++k) {
    uint32_t left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = a[0][2 * k + i / 2];
      left[i] = device::PackPair<device::Float16>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int chunk = 0; chunk < kN8 / 2; chunk += 2) {
      // A word: two columns of one row, then of the next.
      uint32_t words[4];
      device::LoadMatricesTransposed(words, from.At(16 * k, chunk));
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t first[2], second[2];  // eight rows, and the next
        device::Widen<Cache, true>(words[2 * c], first);
        device::Widen<Cache, true>(words[2 * c + 1], second);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          device::MultiplyAccumulate<device::Float16>(acc[0][2 * (chunk + c) + odd], left, first[odd], second[odd]);
        }
      }
    }
  }
}

// ---- Producer: finds the steps of the CTA's units, one after another, and starts their copies

template <typename Config>
class Producer {
 public:
  __device__ __forceinline__ Producer(const KernelParams& params, const CacheMaps& maps, Shared<Config>& shared)
      : params_(params), maps_(maps), shared_(shared), number_(static_cast<int>(blockIdx.x)) {
    Find();
  }

  // Starts the copies of the step found last into a stage, and finds the next. After the last step there are none.
  __device__ __forceinline__ void Start(int stage) {
    if (found_) {
      const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
      auto& tiles = shared_.stages[stage];
      if (!ByEngine()) {
        CopyRows(tiles.key, params_.key, rows_[0], kv_head_, params_.dim);
        CopyRows(tiles.value, params_.value, rows_[0], kv_head_, params_.value_dim);
        const bool whole = __all_sync(0xFFFFFFFFu, IsWhole(rows_[0]));
        if (lane < 16) shared_.keys[stage][RowOfLane(warp, lane)] = rows_[0].key;
        if (lane == 0) shared_.masked[stage].by_warp[warp] = !whole;
        if (threadIdx.x == 0) NoteBlock(stage);
      } else if (warp == turn_) {
#if __CUDA_ARCH__ >= 900
        StartBoxes<Config>(tiles, shared_.full[stage], maps_, rows_, kv_head_);
#endif
        const bool whole = __all_sync(0xFFFFFFFFu, IsWhole(rows_[0]) && IsWhole(rows_[1]));
        shared_.keys[stage][lane] = rows_[0].key, shared_.keys[stage][lane + 32] = rows_[1].key;
        if (lane == 0) shared_.masked[stage].any = !whole, NoteBlock(stage);
      }
      Find();
    }
    if (!ByEngine()) device::CommitCopies();
  }

  // Between this thread's last use of a stage, a barrier, and Start: the copy engine may write over what it read or
  // wrote.
  __device__ __forceinline__ void Release() const {
#if __CUDA_ARCH__ >= 900
    if (ByEngine()) device::sm90::FenceAsyncProxy();
#endif
  }

  // Waits for the copies of the oldest kSteps steps on their way, which lie in the stages from `first` on; a barrier
  // must follow. Before, kStepsAhead of them are on their way.
  template <int kSteps>
  __device__ __forceinline__ void Wait(int first) {
    if (ByEngine()) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int stage = Wrap<Config>(first + step);
        device::sm90::Wait(shared_.full[stage], phases_ >> stage & 1);
        phases_ ^= 1u << stage;
      }
#endif
    } else {
      device::WaitForGroups<kStepsAhead<Config> - kSteps>();
    }
  }

 private:
  __device__ __forceinline__ bool ByEngine() const {
#if __CUDA_ARCH__ >= 900
    return maps_.rows > 0;
#else
    return false;
#endif
  }
  // Whether all rows of queries attend to a key.
  __device__ __forceinline__ bool IsWhole(const FoundRow& row) const {
    return Config::kListed ? tile_ < 0 && row.key >= 0 : mask_(row.key, static_cast<int>(params_.sink_tokens));
  }
  __device__ __forceinline__ void NoteBlock(int stage) const {
    if constexpr (Config::kListed) {
      shared_.tiles[stage] = tile_, shared_.steps[stage] = params_.block_steps == 1 ? 0 : (step_ - 1) % 2;
    }
  }

  // The rows of the next step. For the copy engine one warp finds all of them, two a lane; the warps take turns.
  __device__ __forceinline__ void Find() {
    if (left_ == 0) NextUnit();
    found_ = left_ > 0;
    if (!found_) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (!ByEngine()) {
      rows_[0] = FindOne(RowOfLane(warp, lane));
    } else {
      turn_ = (turn_ + 1) % Config::kWarps;
      if (warp == turn_) rows_[0] = FindOne(lane), rows_[1] = FindOne(lane + 32);
    }
    ++step_, --left_;
  }
  __device__ __forceinline__ FoundRow FindOne(int at) {
    if constexpr (Config::kListed) {
      return FindListed(params_, group_, kv_len_, step_, at, &tile_);
    } else {
      return FindRow(params_, table_, group_, kv_head_, kv_len_, steps_, step_, at);
    }
  }

  // Goes to the next unit that has steps, and describes it to the consumers; or says that there is none.
  __device__ __forceinline__ void NextUnit() {
    const int total = shared_.before[params_.sequences];
    Unit unit;
    unit.steps = 0;
    for (; number_ < total && unit.steps == 0; number_ += static_cast<int>(gridDim.x)) {
      unit = FindUnit<Config>(params_, shared_.before, number_, &steps_);
    }
    if (threadIdx.x == 0) shared_.units[slot_] = unit;
    slot_ = (slot_ + 1) % kUnitsKept<Config>;
    left_ = unit.steps;
    if (left_ == 0) return;
    table_ = unit.table, group_ = unit.group, kv_head_ = unit.kv_head, kv_len_ = unit.kv_len, step_ = unit.step;
    if constexpr (!Config::kListed) mask_ = UnitMask(params_, unit);
    Prefetch(unit);
  }

  // What is read once per unit, and waited for: with memory as busy as it is here, for 2 us.
  __device__ __forceinline__ void Prefetch(const Unit& unit) const {
    const int thread = static_cast<int>(threadIdx.x);
    constexpr int kLines = Config::kDim * static_cast<int>(sizeof(typename Config::Element)) / 128;
    const int column = thread % kLines * (128 / static_cast<int>(sizeof(typename Config::Element)));
    if (unit.narrow && thread < unit.rows * kLines && column < params_.dim) {
      device::PrefetchL2(Queries<Config>::Row(params_, unit, thread / kLines) + column);
    }
    if (!Config::kListed && params_.selection == nullptr) {
      const int first = params_.by_page_size.Quotient(steps_[unit.step] * kStepKeys);
      const int last = params_.by_page_size.Quotient(steps_[unit.step + unit.steps - 1] * kStepKeys + kStepKeys - 1);
      const int page = first + 32 * thread;
      if (page <= min(last + 31, params_.max_pages - 1)) {
        device::PrefetchL2(params_.page_indices + int64_t{unit.table} * params_.max_pages + page);
      }
    }
  }

  const KernelParams& params_;
  const CacheMaps& maps_;
  Shared<Config>& shared_;
  uint32_t phases_ = 0;  // parities of the stages' barriers
  int number_;           // of the unit after this one
  int slot_ = 0;
  bool found_ = false;
  int turn_ = 0;  // the warp that has the step found last, if the engine copies
  FoundRow rows_[2] = {};
  int tile_ = -1;  // of listed keys
  // The unit whose steps are found.
  int table_ = 0, group_ = 0, kv_head_ = 0, kv_len_ = 0, step_ = 0, left_ = 0;
  Steps steps_{};
  UnitMask mask_{};
};

// ---- Consumers

// One unit, of 16 rows (kNarrow) or of 64.
template <typename Config, bool kNarrow>
struct Consumer {
  static constexpr int kWarpKeys = kNarrow ? Config::kTileKv / Config::kWarps : Config::kTileKv;
  // At a time: logits of 64 keys would spill beside 256 columns of output, or beside bytes that are widened.
  static constexpr int kPasses = kNarrow ? 1 : Config::kDim > 128 || Config::kQuantised ? 4 : Config::kListed ? 2 : 1;
  static constexpr int kKeys = kWarpKeys / kPasses;
  static constexpr int kAtOnce = kNarrow ? kStepsAtOnce<Config> : 1;  // steps
  using KeyTile = device::SwizzledTile<typename Config::Cache, kKeys, Config::kDim, Config::kTileKv>;
  using Logits = float[1][kKeys / 8][4];

  const KernelParams& params;
  Shared<Config>& shared;
  Queries<Config> queries;
  OnlineSoftmax softmax;
  float out[1][Config::kDim / 8][4];

  __device__ __forceinline__ Consumer(const KernelParams& params, Shared<Config>& shared)
      : params(params), shared(shared) {
    device::Clear(out);
  }

  // Read where they are used: held, they would be among the registers that spill on sm_80.
  __device__ __forceinline__ int Warp() const { return device::ThreadHere() / 32; }
  __device__ __forceinline__ int WarpRow() const { return kNarrow ? 0 : 16 * Warp(); }
  __device__ __forceinline__ int WarpKey() const { return kNarrow ? kWarpKeys * Warp() : 0; }

  // Calls `change(x, attended, found, column)` for each pair of the keys from `first` on; `found` is as FoundRow's.
  template <typename Change>
  __device__ __forceinline__ void ForPairs(Logits& x, int stage, int first, const Unit& unit,
                                           const Change& change) const {
    const int lane = device::ThreadHere() % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowMask<Config> mask(params, unit, unit.row + WarpRow() + g + 8 * half, shared.tiles[stage],
                                 shared.steps[stage]);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = first + 8 * n + 2 * t + e, found = shared.keys[stage][column];
          change(x[0][n][2 * half + e], mask(found, column), found, column);
        }
    }
  }

  // out += P V for kSteps steps, in the stages from `stage` on.
  template <int kSteps>
  __device__ __forceinline__ void Take(int stage, const Unit& unit, const LogitMap& map) {
    bool masked[kSteps];
    uint64_t bad[kSteps];  // values that are not finite: they reach only the rows that attend to them
    const auto stage_of = [stage](int step) { return Wrap<Config>(stage + step); };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = stage_of(step);
      masked[step] = shared.masked[at].any != 0;
      bad[step] = 0;
      if (!masked[step]) continue;
      auto& values = shared.stages[at].value;
      bad[step] = device::CleanRows<Config::kThreads>(values, shared.bad_values, device::ThreadHere());
      if (kSteps > 1) __syncthreads();  // as CleanRows wants it between two
    }
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int first = WarpKey() + pass * kKeys;
      float all[1][kSteps * kKeys / 8][4];
      const auto logits_of = [&all](int step) -> Logits& {
        return reinterpret_cast<Logits&>(all[0][step * kKeys / 8]);
      };
      const auto tile_of = [first](auto& tile) -> const KeyTile& {
        return reinterpret_cast<const KeyTile&>(*tile.Chunk(first, 0));
      };
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        queries.Multiply(logits_of(step), shared, WarpRow(), tile_of(shared.stages[stage_of(step)].key));
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Logits& x = logits_of(step);
        if (!map.plain) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[0][n][e] = map(x[0][n][e]);
        }
        if (masked[step]) {
          ForPairs(x, stage_of(step), first, unit, [](float& logit, bool attended, int found, int) {
            if (!attended || found < 0) logit = attended ? device::QuietNan() : -device::Infinity();
          });
        }
      }
      float rescale[2];
      softmax.Update(all[0], map.multiplier, rescale);
      // Rarely, once rows have seen some keys. (The vote would spill beside 256 columns.)
      if (Config::kDim > 128 || __any_sync(0xFFFFFFFFu, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
        for (int n = 0; n < Config::kDim / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[0][n][e] *= rescale[e / 2];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Logits& x = logits_of(step);
        if (bad[step] != 0) {
          ForPairs(x, stage_of(step), first, unit,
                   [bad = bad[step]](float& probability, bool attended, int, int column) {
                     if (attended && (bad >> column & 1) != 0) probability = device::QuietNan();
                   });
        }
        const KeyTile& value = tile_of(shared.stages[stage_of(step)].value);
        if constexpr (Config::kQuantised) {
          MultiplyQuantisedColumns(out, x, value);
        } else {
          device::MultiplyColumns(out, x, value);
        }
      }
    }
  }

  // Stores the rows, or this part of them, by way of the stage that was used last.
  __device__ __forceinline__ void Finish(int stage, const Unit& unit) {
    const int thread = device::ThreadHere(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    auto* rows = reinterpret_cast<float*>(&shared.stages[stage]);
    // Four columns of a row lie together, in an order by which neither writing nor reading meets a bank twice.
    constexpr int kColumns = Config::kOutColumns, kChunks = kColumns / 4;
    const auto chunk_of = [rows](int row, int chunk) {
      return rows + row * kColumns + 4 * (chunk ^ ((row & 1) * 4 | (row & 2)));
    };
    const RowStore<Config> store(params, unit);
#pragma unroll
    for (int first = 0; first < Config::kDim; first += kColumns) {
      __syncthreads();  // nobody reads the stage any more
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + g + 8 * half;
        if constexpr (Config::kQuantised) {
#pragma unroll
          for (int n = 0; n < kColumns / 8; n += 2) {
            const float (&even)[4] = out[0][first / 8 + n], (&odd)[4] = out[0][first / 8 + n + 1];
            *reinterpret_cast<float4*>(chunk_of(row, 2 * n + t)) =
                make_float4(even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            *reinterpret_cast<float2*>(chunk_of(row, 2 * n + t / 2) + t % 2 * 2) =
                make_float2(out[0][first / 8 + n][2 * half], out[0][first / 8 + n][2 * half + 1]);
          }
        }
        if (first > 0) continue;
        const float sum = device::QuadSum(softmax.sum[half]);
        if (t == 0) shared.stats[warp][g + 8 * half] = make_float2(softmax.max[half], sum);
      }
      __syncthreads();
      for (int i = thread; i < unit.rows * kChunks; i += Config::kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, column = first + 4 * chunk;
        if constexpr (kNarrow) {
          // The four warps' shares of the keys, in their order.
          float max = -device::Infinity();
#pragma unroll
          for (int w = 0; w < Config::kWarps; ++w) max = fmaxf(max, shared.stats[w][row].x);
          const float shift = max == -device::Infinity() ? 0.f : max;
          float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
          float sum = 0.f;
#pragma unroll
          for (int w = 0; w < Config::kWarps; ++w) {
            const float2 stats = shared.stats[w][row];
            const float factor = device::Exp2(stats.x - shift);
            AddScaled(total, *reinterpret_cast<const float4*>(chunk_of(16 * w + row, chunk)), factor);
            sum = fmaf(stats.y, factor, sum);
          }
          store(row, column, total, max, sum);
        } else {
          const float2 stats = shared.stats[row / 16][row % 16];
          store(row, column, *reinterpret_cast<const float4*>(chunk_of(row, chunk)), stats.x, stats.y);
        }
      }
    }
  }
};

// Computes a unit; `stage` is that of its first step, and then of the step after its last.
template <typename Config, bool kNarrow>
__device__ __forceinline__ void ComputeUnit(const KernelParams& params, Shared<Config>& shared,
                                            Producer<Config>& producer, const Unit& unit, const LogitMap& map,
                                            int& stage) {
  Consumer<Config, kNarrow> consumer(params, shared);
  consumer.queries.Load(params, unit, consumer.WarpRow(), shared);
  int left = unit.steps, last = 0;
  // Waits for kSteps steps, starts as many further on, and computes.
  const auto take = [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    producer.template Wait<kSteps>(stage);
    producer.Release();
    __syncthreads();  // the steps are here, and nobody reads those before
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) producer.Start(Wrap<Config>(stage + kStepsAhead<Config> + step));
    consumer.template Take<kSteps>(stage, unit, map);
    last = Wrap<Config>(stage + kSteps - 1);
    stage = Wrap<Config>(stage + kSteps);
    left -= kSteps;
  };
  constexpr int kAtOnce = Consumer<Config, kNarrow>::kAtOnce;
#pragma unroll 1
  while (left >= kAtOnce) take(std::integral_constant<int, kAtOnce>());
  if constexpr (kAtOnce > 1) {
#pragma unroll 1
    while (left > 0) take(std::integral_constant<int, 1>());
  }
  consumer.Finish(last, unit);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    ForwardKernel(const __grid_constant__ KernelParams params, const __grid_constant__ CacheMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Config>*>(shared_bytes);

  // ---- Prologue: units are counted, and the first steps are on their way.
  if (threadIdx.x < 2) shared.bad_values[threadIdx.x] = 0;
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    for (auto& full : shared.full) device::sm90::InitBarrier(full, 1);
    device::sm90::FenceBarrierInit();
  }
#endif
  CountUnits<Config>(params, shared.before);  // with barriers of the CTA
  Producer<Config> producer(params, maps, shared);
#pragma unroll 1
  for (int first = 0; first < kStepsAhead<Config>; ++first) producer.Start(first);
  const LogitMap map(params.scale, params.soft_cap);
  __syncthreads();
  device::LetNextKernelStart();

  // ---- Units. A description was written at least one barrier ago: the producer is two steps ahead or more.
  int stage = 0;
#pragma unroll 1
  for (int slot = 0; shared.units[slot].steps > 0; slot = (slot + 1) % kUnitsKept<Config>) {
    const Unit& unit = shared.units[slot];
    if (unit.narrow) {
      ComputeUnit<Config, true>(params, shared, producer, unit, map, stage);
    } else {
      ComputeUnit<Config, false>(params, shared, producer, unit, map, stage);
    }
  }
  device::WaitForCopies();
}

// ---- Launch

// Rows that the copy engine can take at a time: a step's, or a power of two that divides a page's, or 0. What lies
// behind the last row of the only page of a sequence may be read as well.
inline int BoxRows(const KernelParams& params) {
  const int64_t page = params.by_page_size.value();
  if ((params.max_pages == 1 && params.selection == nullptr) || page % kStepKeys == 0) return kStepKeys;
  const int64_t rows = page & -page;
  return rows < 8 ? 0 : static_cast<int>(rows);
}

template <typename Config>
bool MakeMaps(const KernelParams& params, CacheMaps* maps) {
  constexpr int64_t kBytes = sizeof(typename Config::Cache);
  const Shape& shape = params.shape;
  const int64_t positions = shape.groups * params.pages * int64_t{params.by_page_size.value()};
  const auto make = [&](const Rows& rows, int dim, CUtensorMap* map) {
    return device::sm90::MakeByteMap(
        rows.first, dim * kBytes,
        {{positions, rows.stride * kBytes}, {params.kv_heads, rows.head_stride * kBytes}, {1, 16}}, maps->rows, map);
  };
  return make(params.key, params.dim, &maps->key) && make(params.value, params.value_dim, &maps->value);
}

template <typename Config>
cudaError_t Launch(const KernelParams& params, const device::DeviceFacts& facts, cudaStream_t stream) {
  static_assert(sizeof(Shared<Config>) <= SharedBytesAtMost<Config>());
  CacheMaps maps{};
  const bool empty = params.shape.groups * params.shape.pages * params.shape.page_size == 0;
  if (facts.capability == 90 && !empty) maps.rows = BoxRows(params);
  if (maps.rows > 0 && !MakeMaps<Config>(params, &maps)) return cudaErrorNotSupported;
  const int bytes = static_cast<int>(sizeof(Shared<Config>)) + 4 * params.sequences;
  const cudaError_t error =
      cudaFuncSetAttribute(ForwardKernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  ForwardKernel<Config><<<facts.multiprocessors * Config::kCtas, Config::kThreads, bytes, stream>>>(params, maps);
  if (const cudaError_t launched = cudaGetLastError(); launched != cudaSuccess) return launched;
  // Newer devices run the code of sm_80, whose merge would not wait for the forward.
  return LaunchMerge<Config>(params, facts.capability == 90, stream);
}

}  // namespace jax_bsk::decode::cuda
