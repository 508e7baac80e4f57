// What takes the producer's place for many tiles: one warp that looks at the lists of the CTA's tiles and fetches
// their queries, keys and values, ahead over the borders of tiles.
#pragma once

#include "attention/sm90/fwd_producer.cuh"
#include "attention/sm90/fwd_shared.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// One stream of steps over all tiles of the CTA (blockIdx.x, and every gridDim.x further), kKeyStages ahead of the
// products: while a tile is computed the next one's header, list, queries and first keys arrive. A tile without keys to
// attend to has one step, of keys past the end, where the copy engine fills in zeros: so every tile has a step, and
// headers are neither announced nor released. A place in their ring is free again once a later tile's first keys have
// been released: no warp does that before it has stored its tile. tests/rings/feeder.py checks the waits for all
// interleavings.
template <typename Config>
class ForwardFeeder {
 public:
  using Shared = ForwardShared<Config>;
  static constexpr int kHeaders = Shared::kHeaders, kEntries = ListAhead<true>::kEntries;
  // Tiles of one step each: the one being stored, those of the steps ahead, and the one that is begun.
  static_assert(kHeaders >= Config::kKeyStages + 2);
  static_assert(!Config::kExtras, "the numbers of a bias's tiles are not read here");

  __device__ ForwardFeeder(Shared& shared, const ForwardParams& params, const ForwardPlan& plan)
      : shared_(shared),
        params_(params),
        plan_(plan),
        scheduler_(shared, params, plan),
        loader_(shared, params, plan) {}

  __device__ __forceinline__ void Run() {
    AskWords();
    BeginTile();
    AskQueries();
#pragma unroll 1
    for (int i = 0; i < Config::kKeyStages; ++i) {
      AskKeys();
      AskValues(0);
    }
    // Once the keys of `step` are released, and the values of the step before.
#pragma unroll 1
    for (uint32_t step = 0; step < keys_; ++step) {
      AskKeys();
      // Those of the tile after the step's, once the step's are in registers.
      if (queries_ == TileOf(step) + 1 && queries_ < tiles_) AskQueries();
      AskValues(step);
    }
  }

 private:
  __device__ __forceinline__ TileHeader& Header(uint32_t number) { return shared_.headers[number % kHeaders]; }
  // The number of a step's tile among the CTA's.
  __device__ __forceinline__ uint32_t TileOf(uint32_t step) {
    return static_cast<uint32_t>(shared_.Step(step).flags) >> StepInfo::kHeader;
  }
  // The tile to be begun next, or one past the end.
  __device__ __forceinline__ int NextTile() const { return static_cast<int>(blockIdx.x + tiles_ * gridDim.x); }

  __device__ __forceinline__ void AskKeys() {
    device::WaitForCopies();
    __syncwarp();
    if (done_) return;
    const TileHeader& header = Header(tiles_ - 1);
    bool more = true;
    if (fresh_) {
      more = Take(header);
      if (!more) next_start_ = plan_.past_end, next_bits_ = -1;
      fresh_ = false;
    }
    typename ForwardLoader<Config>::Blocks now{{next_start_, next_start_ + 64}, {next_bits_, next_bits_}};
    if constexpr (Config::kGated) now.gate[0] = now.gate[1] = gate_;
    more = more && Take(header);
    int flags = static_cast<int>((tiles_ - 1) << StepInfo::kHeader);
    if (!more) {
      flags |= left_ < 0 ? StepInfo::kLast | StepInfo::kRowPoisoned : StepInfo::kLast;
      done_ = NextTile() >= plan_.tiles;
      if (done_) flags |= StepInfo::kFinal;
    }
    loader_.LoadKeys(keys_++, now, header, flags);
    // Behind LoadKeys, which has waited for all warps to leave the tile whose header's place this takes.
    if (!more && !done_) BeginTile();
  }

  __device__ __forceinline__ void AskQueries() { scheduler_.LoadQueries(Header(queries_++)); }

  // Up to kValueStages beyond those that are `released`.
  __device__ __forceinline__ void AskValues(uint32_t released) {
    const uint32_t end = min(keys_, released + Config::kValueStages);
#pragma unroll 1
    for (; values_ < end; ++values_) loader_.LoadValues(values_, Header(TileOf(values_)));
  }

  // Once the words of the tile are there: its first entries are asked for, and the words of the tile after it.
  __device__ __forceinline__ void BeginTile() {
    device::WaitForCopies();
    __syncwarp();
    TileHeader header = scheduler_.HeaderOf(NextTile(), [&](int i) { return shared_.ahead.words[i]; });
    if (header.q_rows == 0) header.row.length = min(header.row.length, 0);
    header.query_parity = tiles_ & 1;
    if (device::sm90::ElectLane()) Header(tiles_) = header;
    fresh_ = true;
    left_ = header.row.length;
    taken_ = 0;
    offset_ = static_cast<int>(params_.shape.block_kv);
    ++tiles_;
    __syncwarp();
    AskEntries(header, 0);
    AskEntries(header, kEntries / 2);
    if (NextTile() < plan_.tiles) AskWords();
  }

  __device__ __forceinline__ void AskWords() {
    const int lane = device::ThreadHere() % 32;
    if (lane < ListAhead<true>::kWords) {
      device::CopyAsync4(device::SharedAddress(&shared_.ahead.words[lane]), scheduler_.WordOf(NextTile()));
    }
  }

  // Half a ring of entries: a half of the lanes copies ids, the other bit tiles.
  __device__ __forceinline__ void AskEntries(const TileHeader& header, int first) {
    const int lane = device::ThreadHere() % 32, entry = first + lane % (kEntries / 2);
    if (entry < header.row.length) {
      const bool ids = lane < kEntries / 2;
      device::CopyAsync4(device::SharedAddress(&shared_.ahead.entries[ids ? 0 : 1][entry % kEntries]),
                         (ids ? params_.rows.ids : params_.rows.tiles) + header.row.begin + entry);
    }
  }

  // The next step of the tile, as lists::BlockWalker::Next has it, from entries that have been copied.
  __device__ __forceinline__ bool Take(const TileHeader& header) {
    const int block = static_cast<int>(params_.shape.block_kv);
    do {
      if (offset_ >= block) {
        if (left_ <= 0) return false;
        const int id = shared_.ahead.entries[0][taken_ % kEntries], bits = shared_.ahead.entries[1][taken_ % kEntries];
        if (id < 0 || id >= params_.rows.ids_end || bits < -1 || bits >= params_.tiles.count) {
          left_ = -1;
          return false;
        }
        start_ = id * block;
        next_bits_ = bits;
        offset_ = 0;
        --left_;
        ++taken_;
        if (taken_ % (kEntries / 2) == 0) {
          device::WaitForCopies();
          __syncwarp();
          AskEntries(header, taken_ + kEntries / 2);
        }
      }
      next_start_ = start_ + offset_;
      offset_ += Config::kTileKv;
    } while (next_start_ >= header.key_limit);
    if constexpr (Config::kGated) gate_ = loader_.ReadGate(header.row.begin + taken_ - 1, header);
    return true;
  }

  Shared& shared_;
  const ForwardParams& params_;
  const ForwardPlan& plan_;
  ForwardScheduler<Config> scheduler_;
  ForwardLoader<Config> loader_;
  uint32_t keys_ = 0, values_ = 0;       // steps whose keys, and whose values, were asked for
  uint32_t tiles_ = 0, queries_ = 0;     // tiles that were begun, and whose queries were asked for
  bool fresh_ = true, done_ = false;     // no step of the tile is known yet; the last of all was asked for
  int next_start_ = 0, next_bits_ = -1;  // of the next step to ask for
  float gate_ = 1.f;                     // likewise
  int left_ = 0, taken_ = 0;    // entries of the row that are not taken (-1: the row is poisoned), and that are
  int start_ = 0, offset_ = 0;  // of the last entry: its first key, and its keys that steps were made of
};

}  // namespace jax_bsk::attention::cuda::sm90
