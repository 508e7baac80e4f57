// The producer of the Hopper forward: a warp that schedules and a warp that loads.
#pragma once

#include "attention/sm90/fwd_shared.cuh"
#include "device/numbers.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/thread.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template <typename Config>
__device__ __forceinline__ auto WalkRow(const ForwardParams& params, const ForwardPlan& plan,
                                        const TileHeader& header) {
  const int block_kv = static_cast<int>(params.shape.block_kv);
  if constexpr (Config::kExtras) {
    return lists::BlockWalker<Config::kTileKv, lists::EitherWay>(params.rows, params.tiles, header.row, block_kv,
                                                                 header.key_limit, {plan.walk_step, plan.from_end});
  } else {
    return lists::BlockWalker<Config::kTileKv>(params.rows, params.tiles, header.row, block_kv, header.key_limit);
  }
}

// The scheduler: one warp that takes tiles, looks at the beginning of their lists, announces them and fetches their
// queries, well before anyone needs them: what it waits for in global memory, nobody else does.
template <typename Config>
class ForwardScheduler {
 public:
  using Shared = ForwardShared<Config>;

  __device__ ForwardScheduler(Shared& shared, const ForwardParams& params, const ForwardPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  // Announces the tiles that the counter hands out; without a counter, tile blockIdx.x alone.
  __device__ __forceinline__ void Run() {
    const int tiles = plan_.tiles;
    int tile = plan_.tile_counter == nullptr ? blockIdx.x : Share(TakeTile());
    while (tile < tiles) {
      const int next = plan_.tile_counter == nullptr ? tiles : TakeTile();  // asked for now, used when this tile is out
      const TileHeader header = Look(tile);
      Announce(header);
      if (header.kind == TileHeader::kLive) LoadQueries(header);
      tile = Share(next);
    }
    TileHeader end{};
    end.kind = TileHeader::kEnd;
    Announce(end);
  }

 private:
  template <typename>
  friend class ForwardFeeder;

  // For lane 0.
  __device__ __forceinline__ int TakeTile() {
    return device::ThreadHere() % 32 == 0 ? atomicAdd(plan_.tile_counter, 1) : 0;
  }
  __device__ __forceinline__ static int Share(int x, int lane = 0) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

  __device__ __forceinline__ TileHeader Look(int tile) {
    const int word = __ldg(WordOf(tile));
    return HeaderOf(tile, [&](int i) { return Share(word, i); });
  }

  // Each lane reads one word of what a tile needs: one round trip to memory and not one after the other.
  __device__ __forceinline__ const int32_t* WordOf(int tile) {
    const TileHeader header = PositionOf<Config>(tile, plan_);
    const int row = header.q_start >> (params_.shape.block_q == 128 ? 7 : 6);
    const int64_t table = lists::TableIndex(params_.rows.batch, params_.rows.heads, header.batch, header.head);
    const int lane = device::ThreadHere() % 32;
    const int32_t* source = params_.rows.offsets + table * (params_.rows.rows + 1) + row + (lane & 1);
    if (lane / 2 == 1) {
      source = params_.lengths.pairs + (params_.lengths.batch == 1 ? 0 : 2 * int64_t{header.batch}) + (lane & 1);
    } else if (lane / 2 == 2 && params_.sinks != nullptr) {
      source = static_cast<const int32_t*>(params_.sinks) +
               lists::TableIndex(params_.sinks_batch, params_.sinks_heads, header.batch, header.head);
    }
    return source;
  }

  // The header of a tile whose words are those.
  template <typename Words>
  __device__ __forceinline__ TileHeader HeaderOf(int tile, const Words& word) {
    TileHeader header = PositionOf<Config>(tile, plan_);
    const bool large = params_.shape.block_q == 128;
    const int block_kv = static_cast<int>(params_.shape.block_kv);
    const int64_t table = lists::TableIndex(params_.rows.batch, params_.rows.heads, header.batch, header.head);
    header.row = lists::MakeRow(params_.rows, table, word(0), word(1));
    SetLimits<Config>(header, params_.shape, word(2), word(3));
    const float sink = __int_as_float(word(4));
    header.sink = params_.sinks != nullptr ? sink : -device::Infinity();
    // Also where no key is within the length the list is followed: an entry that cannot be true poisons its row. With
    // no keys at all none can be.
    const bool unsound = header.row.length < 0 || (header.row.length > 0 && params_.shape.kv_len == 0);
    header.kind = unsound                                        ? TileHeader::kPoisoned
                  : header.row.length == 0 || header.q_rows == 0 ? TileHeader::kEmpty
                                                                 : TileHeader::kLive;
    header.bits = lists::BitTileRow(params_.tiles, header.batch, header.head, 0, header.q_start & (large ? 127 : 63),
                                    large ? 128 : 64, block_kv);
    if constexpr (Config::kExtras) {
      if (plan_.bias_lines.lines != nullptr) {
        header.line = LineIndex(plan_.bias_lines, params_.bias, header.batch, header.head, header.q_start);
      }
    }
    header.query_parity = live_ & 1;
    if (header.kind == TileHeader::kLive) ++live_;
    return header;
  }

  __device__ __forceinline__ void Announce(const TileHeader& header) {
    device::sm90::Wait(shared_.empty_header[headers_.Stage()], headers_.Empty());
    if (device::sm90::ElectLane()) {
      shared_.headers[headers_.Stage()] = header;
      device::sm90::Arrive(shared_.full_header[headers_.Stage()]);
    }
    headers_.Advance();
  }

  __device__ __forceinline__ void LoadQueries(const TileHeader& header) {
    device::sm90::Wait(shared_.empty_query, header.query_parity ^ 1);
    if (device::sm90::ElectLane()) {
      device::sm90::ArriveExpecting(shared_.full_query, sizeof(shared_.query));
#pragma unroll
      for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
        device::sm90::LoadBox(shared_.query + chunk * Config::kTileQ * kChunk, plan_.query, shared_.full_query,
                              chunk * kChunk, header.q_start, header.head, header.batch);
      }
    }
  }

  Shared& shared_;
  const ForwardParams& params_;
  const ForwardPlan& plan_;
  Ring<Shared::kHeaders> headers_;
  uint32_t live_ = 0;  // tiles so far
};

// The loader: one warp that walks the lists of live tiles and fetches keys and values.
template <typename Config>
class ForwardLoader {
 public:
  using Shared = ForwardShared<Config>;
  using Element = typename Config::Element;

  __device__ ForwardLoader(Shared& shared, const ForwardParams& params, const ForwardPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  __device__ __forceinline__ void Run() {
    while (true) {
      device::sm90::Wait(shared_.full_header[headers_.Stage()], headers_.Full());
      // Read where it lies: in registers it would be spilled.
      const TileHeader& header = shared_.headers[headers_.Stage()];
      if (header.kind == TileHeader::kEnd) return;
      if (header.kind == TileHeader::kLive) Load(header);
      device::sm90::ReleaseForWarp(shared_.empty_header[headers_.Stage()]);
      headers_.Advance();
    }
  }

 private:
  template <typename>
  friend class ForwardFeeder;

  // A step's keys are of one block, or of two of 64: where each begins, and its bit tile or -1.
  struct Blocks {
    int start[kMaxPieces];
    int tile[kMaxPieces];
    float gate[kMaxPieces];     // with gates
    int bias_tile[kMaxPieces];  // with kExtras
  };

  __device__ __forceinline__ void Load(const TileHeader& header) {
    auto walker = WalkRow<Config>(params_, plan_, header);
    lists::Step next;
    // A list may still have nothing within the length, or nothing sound: then one step of keys past the end, where the
    // copy engine fills in zeros and no key is attended to.
    float gate = 1.f;
    int bias_tile = -1;
    const auto read_entry = [&](bool there) {
      if constexpr (Config::kGated) {
        if (there) gate = ReadGate(walker.position(), header);
      }
      if constexpr (Config::kExtras) {
        if (there && params_.bias.tiles != nullptr) bias_tile = __ldg(params_.bias.row_tiles + walker.position());
      }
      return there;
    };
    if (!read_entry(walker.Next(next))) next = {plan_.past_end, 0, -1};

    // K0 K1 V0 K2 V1 ..: the keys of a step are needed one product before the values of the one before.
    bool more = true;
    for (bool first = true; more; first = false) {
      Blocks now{{next.start, next.start + 64}, {next.tile, next.tile}, {gate, gate}, {bias_tile, bias_tile}};
      more = read_entry(walker.Next(next));
      if (TwoPieces()) {
        now.start[1] = plan_.past_end;
        now.tile[1] = -1;
        if (more) {
          now.start[1] = next.start;
          now.tile[1] = next.tile;
          now.gate[1] = gate;
          now.bias_tile[1] = bias_tile;
          more = read_entry(walker.Next(next));
        }
      }
      int flags = headers_.count % headers_.kPeriod << StepInfo::kHeader;
      if (!more) flags |= walker.poisoned() ? StepInfo::kLast | StepInfo::kRowPoisoned : StepInfo::kLast;
      LoadKeys(step_, now, header, flags);
      if (!first) LoadValues(step_ - 1, header);
      ++step_;
    }
    LoadValues(step_ - 1, header);
  }

  __device__ __forceinline__ float ReadGate(int64_t position, const TileHeader& header) const {
    return lists::ReadGate(params_.gates,
                           lists::GateIndex(params_.rows, params_.shape.heads, header.batch, header.head, position));
  }

  // True if a tile's keys come from two blocks.
  __device__ __forceinline__ bool TwoPieces() const {
    return Config::kTileKv == 128 && params_.shape.block_kv < Config::kTileKv;
  }

  // True if a tile reaches past a length.
  __device__ __forceinline__ static bool ReachesPast(const int (&start)[kMaxPieces], int limit) {
    return start[0] + 64 > limit || (Config::kTileKv == 128 && start[1] + 64 > limit);
  }

  // A tile of keys or values, in boxes of one piece and one chunk.
  __device__ __forceinline__ void LoadTile(Element* tile, const CUtensorMap& map, Barrier& barrier,
                                           const int (&start)[kMaxPieces], const TileHeader& header) {
    device::sm90::ArriveExpecting(barrier, kTileBytes);
    const int kv_head = header.kv_head, batch = header.batch;
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      Element* target = tile + chunk * Config::kTileKv * kChunk;
      device::sm90::LoadBox(target, map, barrier, chunk * kChunk, start[0], kv_head, batch);
      if (TwoPieces()) {
        device::sm90::LoadBox(target + 64 * kChunk, map, barrier, chunk * kChunk, start[1], kv_head, batch);
      }
    }
  }

  __device__ __forceinline__ void LoadKeys(uint32_t step, const Blocks& blocks, const TileHeader& header, int flags) {
    const Ring<Config::kKeyStages> place{step};
    const int stage = place.Stage(), limit = header.key_limit;
    if (ReachesPast(blocks.start, limit)) flags |= StepInfo::kMasked;
    if (blocks.tile[0] >= 0) flags |= StepInfo::kMasked | StepInfo::kBits;
    if (blocks.tile[1] >= 0) flags |= StepInfo::kMasked | StepInfo::kBits << 1;
    device::sm90::Wait(shared_.empty_key[stage], place.Empty());
    if (device::sm90::ElectLane()) {
      Barrier& full = shared_.full_key[stage];
      shared_.Step(step) = StepInfo{{blocks.start[0], blocks.start[1]}, limit, flags};
      if constexpr (Config::kGated) {
        float (&gates)[kMaxPieces] = shared_.gates[step % (2 * Shared::kKeyStages)];
        gates[0] = blocks.gate[0], gates[1] = blocks.gate[1];
      }
      if constexpr (Config::kExtras) {
        int (&tiles)[kMaxPieces] = shared_.biases[step % (2 * Shared::kKeyStages)].tiles;
        tiles[0] = blocks.bias_tile[0], tiles[1] = blocks.bias_tile[1];
        device::sm90::Arrive(shared_.full_step[stage]);
      }
      if (flags & StepInfo::kBits) LoadBits(stage, 0, blocks.tile[0], header, full);
      if (flags & StepInfo::kBits << 1 && TwoPieces()) LoadBits(stage, 1, blocks.tile[1], header, full);
      LoadTile(shared_.key[stage], plan_.key, full, blocks.start, header);
    }
    __syncwarp();
  }

  // The bit tile of a piece, before the keys' arrival: its bytes count towards the same phase.
  __device__ __forceinline__ void LoadBits(int stage, int piece, int tile, const TileHeader& header, Barrier& full) {
    const int bytes = plan_.bit_bytes;
    const uint32_t* words = header.bits + tile * plan_.bit_words;
    device::sm90::Expect(full, bytes);
    device::sm90::LoadBytes(shared_.bits[stage] + piece * bytes, words, full, bytes);
  }

  __device__ __forceinline__ void LoadValues(uint32_t step, const TileHeader& header) {
    const Ring<Config::kValueStages> place{step};
    const int stage = place.Stage();
    const auto& start = shared_.Step(step).start;
    // Values past the example's length are not attended to, but 0 * NaN is NaN: they become zero. Past the end of the
    // array the copy engine does that.
    const int limit = header.key_limit;
    const bool cut = limit < static_cast<int>(params_.shape.kv_len) && ReachesPast(start, limit);
    device::sm90::Wait(shared_.empty_value[stage], place.Empty());
    if (device::sm90::ElectLane()) {
      LoadTile(shared_.value[stage], plan_.value, cut ? shared_.tail_value : shared_.full_value[stage], start, header);
    }
    if (cut) {
      const uint32_t parity = ReadShared(shared_.tail_parity);
      device::sm90::Wait(shared_.tail_value, parity);
      if (device::sm90::ElectLane()) shared_.tail_parity = parity ^ 1;
      ZeroRows(shared_.value[stage], start, limit);
      device::sm90::FenceAsyncProxy();
      __syncwarp();
      if (device::sm90::ElectLane()) device::sm90::Arrive(shared_.full_value[stage]);
    }
  }

  __device__ __forceinline__ void ZeroRows(Element* tile, const int (&start)[kMaxPieces], int limit) {
    constexpr int kVectors = kChunk * 2 / 16;  // 16-byte vectors a row of a chunk
#pragma unroll 1
    for (int i = device::ThreadHere() % 32; i < Config::kChunks * Config::kTileKv * kVectors; i += 32) {
      const int row = i / kVectors % Config::kTileKv;
      const int key = row < 64 ? start[0] + row : start[1] + row - 64;
      if (key >= limit) reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  static constexpr int kTileBytes = Shared::kKeyElements * static_cast<int>(sizeof(Element));

  Shared& shared_;
  const ForwardParams& params_;
  const ForwardPlan& plan_;
  uint32_t step_ = 0;  // of the CTA
  Ring<Shared::kHeaders> headers_;
};

}  // namespace jax_bsk::attention::cuda::sm90
