// The producer warps of the Hopper kernel for gradients of biases: one that looks for the tiles of pairs of the CTA's
// slots, one that loads their operands, and one that reads statistics.
#pragma once

#include <climits>

#include "attention/bias.cuh"
#include "attention/sm90/bias_gradient_shared.cuh"
#include "attention/softmax.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/thread.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// Each lane has a tile of queries and one or two tiles of keys, and looks through the row or the two rows of the list
// for the entries that these have. A message is held back until the next one is known: only then can it say whether its
// operands are used again.
template <typename Config>
class PairSearch {
 public:
  using Shared = BiasGradientShared<Config>;
  using Message = PairMessage;
  static constexpr int kSlotTiles = Config::kSlotTiles;
  static constexpr uint32_t kNone = 0xFFFFFFFFu;  // no message is held back

  __device__ PairSearch(Shared& shared, const BiasGradientParams& params, const PairPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  // The groups go round the CTAs, back and forth: those of a table have less and less to do.
  __device__ __forceinline__ void Run() {
    Own().first_group = 0;
#pragma unroll 1
    while (true) {
      const auto first = static_cast<unsigned>(Own().first_group), count = static_cast<unsigned>(plan_.groups.count);
      if (first >= count) break;
      const unsigned group = first + (first / gridDim.x % 2 == 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (group < count) {
        const unsigned table = group / static_cast<unsigned>(plan_.groups.of_table);
        const int place = static_cast<int>(group - table * static_cast<unsigned>(plan_.groups.of_table));
        Own().table = static_cast<int>(table);
        if constexpr (Config::kDiagonals) {
          Diagonals(place);
        } else {
          Tiles(place);
        }
      }
      Own().first_group += static_cast<int>(gridDim.x);
    }
    EmitWithoutPairs(Message::kEnd, 0, 0);
  }

 private:
  // ---- Slots

  // Two diagonals of tiles, 2m - 1 and 2m of key tile - query tile. The first pairs of a table are the longest. Lanes
  // have neighbouring tiles of queries, and what was found is used for all examples and heads that share a list.
  __device__ __forceinline__ void Diagonals(int place) {
    const auto& groups = plan_.groups;
    const int both = min(groups.before_zero, groups.after_zero);
    const int m = place <= 2 * both                        ? (place % 2 == 1 ? (place + 1) / 2 : -place / 2)
                  : groups.before_zero > groups.after_zero ? both - place
                                                           : place - both;
    Own().first = 2 * m - 1;
    Own().begin = max(0, -2 * m);
    bool any = false;
#pragma unroll 1
    for (; Own().begin < QEnd(); Own().begin += 32) {
      const int q_tile = Own().begin + Lane();
      Own().q_tile = q_tile < QEnd() ? q_tile : -1;
      Own().key_tile = Own().q_tile + Own().first;
      Own().searched = -1;
#pragma unroll 1
      for (Own().member = 0; Own().member < Members(); ++Own().member) {
        SetMember(Own().member);
        any |= EmitLanes(ListTable() != Own().searched, 32, [](int) { return false; });
      }
    }
    if (any) EmitWithoutPairs(Message::kStore, 0, Own().first * kPairTile);
  }
  __device__ __forceinline__ int QEnd() const { return min(plan_.groups.q_tiles, plan_.groups.kv_tiles - Own().first); }

  // Neighbouring tiles of a row; a lane has a tile of one example and head.
  __device__ __forceinline__ void Tiles(int place) {
    const auto& groups = plan_.groups;
    const int of_row = (groups.kv_tiles + groups.key_tiles - 1) / groups.key_tiles;
    const int q_tile = place / of_row;
    Own().q_tile = q_tile;
    Own().first = (place - q_tile * of_row) * groups.key_tiles;
#pragma unroll 1
    for (Own().begin = 0; Own().begin < Items(); Own().begin += 32) {
      const int item = min(Own().begin + Lane(), Items() - 1), tile = item / Members();
      SetMember(item - tile * Members());
      Own().key_tile = Own().first + tile;
      EmitLanes(true, min(32, Items() - Own().begin),
                [&](int lane) { return (Own().begin + lane) % Members() == Members() - 1; });
    }
  }
  __device__ __forceinline__ int Items() const {
    return min(plan_.groups.key_tiles, plan_.groups.kv_tiles - Own().first) * Members();
  }

  // Examples and heads that share the table, and this lane's.
  __device__ __forceinline__ int MemberHeads() const { return plan_.groups.tables_heads == 1 ? Heads() : 1; }
  __device__ __forceinline__ int Members() const {
    return MemberHeads() * (plan_.groups.tables_batch == 1 ? static_cast<int>(params_.shape.batch) : 1);
  }
  __device__ __forceinline__ void SetMember(int member) {
    const int heads = plan_.groups.tables_heads, own = MemberHeads();
    Own().batch = plan_.groups.tables_batch == 1 ? member / own : Own().table / heads;
    Own().head = heads == 1 ? member % own : Own().table % heads;
  }
  __device__ __forceinline__ int Heads() const { return static_cast<int>(params_.shape.heads); }
  __device__ __forceinline__ int ListTable() const {
    return static_cast<int>(lists::TableIndex(params_.rows.batch, params_.rows.heads, Own().batch, Own().head));
  }

  // Sends the tiles of the lanes below `count`, one lane after the other, and more than once where a block is listed
  // more than once. ends(lane): a slot is complete after the lane's tile. Returns whether there was any tile.
  template <typename Ends>
  __device__ __forceinline__ bool EmitLanes(bool search, int count, const Ends& ends) {
    bool any = false, next = false;  // next: the lane's second entries, or later ones
#pragma unroll 1
    for (int lane = 0; lane < count;) {
      if (search) Search(next);
      search = false;
      const int present = Present();
      const unsigned hits = __ballot_sync(0xFFFFFFFFu, present != 0) >> lane;
      if (Config::kDiagonals && !next) {
        if (hits == 0) break;
        lane += __ffs(hits) - 1;
      }
      const int tiles = Share(present, lane);
      const bool more = tiles != 0 && Share(Own().more, lane), complete = !more && ends(lane);
      any |= tiles != 0;
#pragma unroll 1
      for (int tile = 0; tile < kSlotTiles; ++tile) {
        if (tiles >> tile & 1) Emit(lane, tile, (tile == 0 ? 0 : Message::kSecond) | (complete ? Message::kStore : 0));
      }
      if (tiles == 0 && complete) {
        EmitWithoutPairs(Message::kStore, Share(Own().q_tile, lane) * kPairTile,
                         Share(Own().key_tile, lane) * kPairTile);
      }
      if (more) {
        search = next = true;
        continue;
      }
      if (next) {  // the other lanes' first entries once more
        search = true, next = false;
        Own().searched = -1;
      }
      ++lane;
    }
    return any;
  }

  // ---- Search

  __device__ __forceinline__ int QueryRows() const { return params_.shape.block_q == 128 ? 1 : 2; }   // of a tile
  __device__ __forceinline__ int KeyBlocks() const { return params_.shape.block_kv == 128 ? 1 : 2; }  // likewise

  // Finds the first entries of this lane's tiles, or the `next`. A row ends at the first entry that cannot be true.
  __device__ __forceinline__ void Search(bool next) {
    const BlockList& list = params_.rows;
    FoundEntry* const found = shared_.found[Lane()];
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 4 * kSlotTiles; ++i) {
      found[i].floor = !next ? -1 : found[i].bits == Message::kAbsent ? INT_MAX : found[i].position;
      found[i].bits = Message::kAbsent;
    }
    Own().more = false;
    Own().searched = ListTable();
    const int first_id = Own().key_tile * KeyBlocks(), wanted = kSlotTiles * KeyBlocks();
    const int64_t skipped = Own().searched * list.capacity;
#pragma unroll 1
    for (int i = 0; i < QueryRows(); ++i) {
      const int row_id = Own().q_tile * QueryRows() + i;
      int at = 0, end = 0;
      if (Own().q_tile >= 0 && row_id < list.rows) {
        const lists::ListRow row = lists::FindRow(list, int64_t{Own().searched}, row_id);
        if (row.length > 0) at = static_cast<int>(row.begin - skipped), end = at + row.length;
      }
#pragma unroll 1
      while (__any_sync(0xFFFFFFFFu, at < end)) {
        constexpr int kEach = 4;  // whose loads overlap
        int ids[kEach], tiles[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          ids[j] = tiles[j] = -2;
          if (at + j < end)
            ids[j] = __ldg(list.ids + skipped + at + j), tiles[j] = __ldg(list.tiles + skipped + at + j);
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (ids[j] < 0 || ids[j] >= list.ids_end || tiles[j] < -1 || tiles[j] >= params_.tiles.count) {
            end = min(end, at + j);
          }
          const int offset = ids[j] - first_id;
          if (at + j < end && offset >= 0 && offset < wanted) {
            FoundEntry& entry = found[i * wanted + offset];
            if (entry.bits != Message::kAbsent) {
              Own().more = true;
            } else if (at + j > entry.floor) {
              entry.bits = tiles[j], entry.position = at + j;
            }
          }
        }
        at += kEach;
      }
    }
    __syncwarp();
  }

  // The place of a quarter of one of a lane's tiles in shared_.found.
  __device__ __forceinline__ int FoundPlace(int tile, int quarter) const {
    const int blocks = KeyBlocks();
    return (quarter / 2 * QueryRows() / 2) * kSlotTiles * blocks + tile * blocks + quarter % 2 * blocks / 2;
  }
  // A bit for each of this lane's tiles: whether something was found of it, within the lengths.
  __device__ __forceinline__ int Present() const {
    const auto limit = lists::ReadLengths(params_.lengths, Own().batch, static_cast<int>(params_.shape.q_len),
                                          static_cast<int>(params_.shape.kv_len));
    int present = 0;
#pragma unroll 1
    for (int i = 0; i < 4 * kSlotTiles; ++i) {
      const int tile = i / 4;
      if (shared_.found[Lane()][FoundPlace(tile, i % 4)].bits != Message::kAbsent &&
          Own().q_tile * kPairTile < limit.query && (Own().key_tile + tile) * kPairTile < limit.key) {
        present |= 1 << tile;
      }
    }
    return present;
  }

  // ---- Messages

  // One of a lane's tiles of pairs.
  __device__ __forceinline__ void Emit(int lane, int tile, int flags) {
    const int batch = Share(Own().batch, lane), head = Share(Own().head, lane), table = Share(Own().searched, lane);
    const int q_start = Share(Own().q_tile, lane) * kPairTile;
    const int key_start = (Share(Own().key_tile, lane) + tile) * kPairTile;
    const int kv_head = head / static_cast<int>(params_.shape.heads / params_.shape.kv_heads);
    flags |= Message::kPairs | Message::kNewLeft | Message::kNewRight;
    if (held_ != kNone) {
      const Message& before = shared_.steps[held_ % Shared::kSteps];
      const bool same_left = before.batch == batch && before.head == head && before.q_start == q_start;
      const bool same_right = before.batch == batch && before.kv_head == kv_head && before.key_start == key_start;
      if (same_left) flags &= ~Message::kNewLeft;
      if (same_right) flags &= ~Message::kNewRight;
      PublishHeld((same_left ? 0 : Message::kLastLeft) | (same_right ? 0 : Message::kLastRight));
    }
    Message& message = WaitForPlace();
    const auto limit = lists::ReadLengths(params_.lengths, batch, static_cast<int>(params_.shape.q_len),
                                          static_cast<int>(params_.shape.kv_len));
    const int quarter = Lane() % 4;
    const FoundEntry& entry = shared_.found[lane][FoundPlace(tile, quarter)];
    const int bits = entry.bits;
    const unsigned with_bits = __ballot_sync(0xFFFFFFFFu, bits >= 0) & 15;
    if (__any_sync(0xFFFFFFFFu, bits != -1) || q_start + kPairTile > limit.query || key_start + kPairTile > limit.key) {
      flags |= Message::kMasked | static_cast<int>(with_bits) * Message::kBits;
    }
    if (Lane() < 4) {
      int bias_tile = -1;
      float gate = 1.f;
      const int64_t position = table * params_.rows.capacity + entry.position;
      if (bits != Message::kAbsent && params_.bias.tiles != nullptr) {
        bias_tile = __ldg(params_.bias.row_tiles + position);
      }
      if (bits != Message::kAbsent && params_.gates != nullptr) {
        gate =
            lists::ReadGate(params_.gates, lists::GateIndex(params_.rows, params_.shape.heads, batch, head, position));
      }
      message.tiles[quarter / 2][quarter % 2] = bits;
      message.bias_tiles[quarter / 2][quarter % 2] = bias_tile;
      message.gates[quarter / 2][quarter % 2] = gate;
    }
    if (Lane() == 0) {
      message.flags = flags, message.table = Own().table;
      message.batch = batch, message.head = head, message.kv_head = kv_head;
      message.q_start = q_start, message.key_start = key_start;
      message.query_limit = limit.query, message.key_limit = limit.key;
    }
    __syncwarp();
    held_ = count_++;
  }

  // The slot is complete, or has nothing; or the end.
  __device__ __forceinline__ void EmitWithoutPairs(int flags, int q_start, int key_start) {
    // Others wait for the message that is held back: the ring must not fill behind it. Of diagonals nothing is shared
    // between slots.
    if (Config::kDiagonals || (flags & Message::kEnd) || (held_ != kNone && count_ - held_ >= Shared::kSteps - 1)) {
      PublishHeld(Message::kLastLeft | Message::kLastRight);
    }
    Message& message = WaitForPlace();
    if (Lane() == 0) {
      message.flags = flags, message.table = Own().table;
      message.q_start = q_start, message.key_start = key_start;
    }
    Publish(count_++);
  }

  __device__ __forceinline__ Message& WaitForPlace() {
    const Ring<Shared::kSteps> place{count_};
    device::sm90::Wait(shared_.empty_step[place.Stage()], place.Empty());
    return shared_.steps[place.Stage()];
  }
  __device__ __forceinline__ void Publish(uint32_t number) {
    device::sm90::ReleaseForWarp(shared_.full_step[number % Shared::kSteps]);
  }
  __device__ __forceinline__ void PublishHeld(int flags) {
    if (held_ == kNone) return;
    __syncwarp();  // all lanes have looked at it
    if (Lane() == 0) shared_.steps[held_ % Shared::kSteps].flags |= flags;
    Publish(held_);
    held_ = kNone;
  }

  __device__ __forceinline__ static int Lane() { return device::ThreadHere() % 32; }
  __device__ __forceinline__ static int Share(int x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

  __device__ __forceinline__ SearchWords& Own() const { return shared_.search[Lane()]; }

  Shared& shared_;
  const BiasGradientParams& params_;
  const PairPlan& plan_;
  uint32_t held_ = kNone, count_ = 0;  // messages: the one that is held back, and all so far
};

// One warp that loads the operands, and the bit tiles.
template <typename Config>
class PairLoader {
 public:
  using Shared = BiasGradientShared<Config>;
  using Element = typename Config::Element;
  using Message = PairMessage;

  __device__ PairLoader(Shared& shared, const BiasGradientParams& params, const PairPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  __device__ __forceinline__ void Run() {
    Ring<Shared::kSteps> steps;
    while (true) {
      device::sm90::Wait(shared_.full_step[steps.Stage()], steps.Full());
      const Message& message = shared_.steps[steps.Stage()];
      const int flags = ReadShared(message.flags);
      if (flags & Message::kEnd) return;
      if (flags & Message::kPairs) {
        LoadSide(message, flags);
        const int batch = ReadShared(message.batch), head = ReadShared(message.head);
        const int kv_head = ReadShared(message.kv_head);
        const int q_start = ReadShared(message.q_start), key_start = ReadShared(message.key_start);
        const bool new_left = flags & Message::kNewLeft, new_right = flags & Message::kNewRight;
        const int left = left_.Stage(), right = right_.Stage();
        // What has more buffers first: it does not wait for the tile that is being multiplied.
        if (new_right) {
          Load(shared_.value[right], plan_.value, shared_.full_value[right], shared_.empty_value[right], right_.Empty(),
               key_start, kv_head, batch);
          Load(shared_.key[right], plan_.key, shared_.full_key[right], shared_.empty_key[right], right_.Empty(),
               key_start, kv_head, batch);
          right_.Advance();
        }
        if (new_left) {
          Load(shared_.dout[left], plan_.dout, shared_.full_dout[left], shared_.empty_dout[left], left_.Empty(),
               q_start, head, batch);
          Load(shared_.query[left], plan_.query, shared_.full_query[left], shared_.empty_query[left], left_.Empty(),
               q_start, head, batch);
          left_.Advance();
        }
      }
      device::sm90::ReleaseForWarp(shared_.empty_step[steps.Stage()]);
      steps.Advance();
    }
  }

 private:
  __device__ __forceinline__ void Load(Element* tile, const CUtensorMap& map, Barrier& full, Barrier& empty,
                                       uint32_t parity, int position, int head, int batch) {
    device::sm90::Wait(empty, parity);
    if (device::sm90::ElectLane()) {
      device::sm90::ArriveExpecting(full, Config::kTileElements * static_cast<int>(sizeof(Element)));
#pragma unroll
      for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
        device::sm90::LoadBox(tile + chunk * kPairTile * kChunk, map, full, chunk * kChunk, position, head, batch);
      }
    }
    __syncwarp();
  }

  // The bit tiles; an arrival in any case.
  __device__ __forceinline__ void LoadSide(const Message& message, int flags) {
    const int stage = sides_.Stage();
    device::sm90::Wait(shared_.empty_side[stage], sides_.Empty());
    sides_.Advance();
    if (device::sm90::ElectLane()) {
      Barrier& full = shared_.full_side[stage];
      const int block_q = static_cast<int>(params_.shape.block_q), block_kv = static_cast<int>(params_.shape.block_kv);
      const int bytes = 8 * block_kv;  // of 64 queries
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        // With blocks of 128 keys the two quarters are of one entry.
        if ((flags & Message::kBits << quarter) == 0 || (block_kv == 128 && quarter % 2 == 1)) continue;
        const int half = quarter / 2;
        const uint32_t* words =
            lists::BitTileRow(params_.tiles, message.batch, message.head, message.tiles[half][quarter % 2],
                              block_q == 128 ? 64 * half : 0, block_q, block_kv);
        device::sm90::Expect(full, bytes);
        device::sm90::LoadBytes(shared_.sides[stage].bits[half] + quarter % 2 * 512, words, full, bytes);
      }
      device::sm90::Arrive(full);
    }
    __syncwarp();
  }

  Shared& shared_;
  const BiasGradientParams& params_;
  const PairPlan& plan_;
  Ring<Config::kLeftStages> left_;
  Ring<Config::kRightStages> right_;
  Ring<Shared::kSides> sides_;
};

// One warp: statistics of the queries, and dense biases to L2, a few tiles before they are needed.
template <typename Config>
__device__ __forceinline__ void ReadPairStatistics(BiasGradientShared<Config>& shared,
                                                   const BiasGradientParams& params) {
  using Shared = BiasGradientShared<Config>;
  using Message = PairMessage;
  const int lane = device::ThreadHere() % 32;
  Ring<Shared::kSteps> steps;
  Ring<Shared::kSides> sides;
  while (true) {
    device::sm90::Wait(shared.full_step[steps.Stage()], steps.Full());
    const Message& message = shared.steps[steps.Stage()];
    const int flags = ReadShared(message.flags);
    if (flags & Message::kEnd) return;
    if (flags & Message::kPairs) {
      const int64_t first = (message.batch * params.shape.heads + message.head) * params.shape.q_len + message.q_start;
      const int queries = message.query_limit - message.q_start;
      float lse[4], rest[4], delta[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane + 32 * i;
        lse[i] = kNoLogSumExp<float>, rest[i] = delta[i] = 0.f;
        if (row < queries) {
          lse[i] = __ldg(static_cast<const float*>(params.lse) + first + row);
          rest[i] = __ldg(static_cast<const float*>(params.lse_rest) + first + row);
          delta[i] = __ldg(static_cast<const float*>(params.delta) + first + row);
        }
      }
      device::sm90::Wait(shared.empty_side[sides.Stage()], sides.Empty());
      if (params.bias.dense != nullptr && params.bias.dense_q > 1 && params.bias.dense_kv > 1) {
        const BiasTermView view = DenseBiasView(params.bias, message.batch, message.head);
        const int size = view.wide ? 4 : 2;
        const int last_query = static_cast<int>(params.shape.q_len) - 1;
        const int last_key = static_cast<int>(params.shape.kv_len) - 1;
#pragma unroll 1
        for (int row = lane; row < kPairTile; row += 32)
#pragma unroll 1
          for (int column = 0; column < kPairTile; column += 128 / size) {
            const int64_t at = view.first + int64_t{min(message.q_start + row, last_query)} * view.step_q +
                               min(message.key_start + column, last_key);
            device::PrefetchL2(static_cast<const char*>(view.data) + at * size);
          }
      }
      float (&statistics)[3][kPairTile] = shared.sides[sides.Stage()].statistics;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane + 32 * i;
        const auto result = RowStatistics::Of(lse[i], rest[i], delta[i]);
        statistics[0][row] = result.lse;
        statistics[1][row] = result.delta;
        // As for the backward: below 2^-15 it is of no account.
        statistics[2][row] = fabsf(result.lse) < 1024.f ? 0.f : result.rest;
      }
      device::sm90::ReleaseForWarp(shared.full_side[sides.Stage()]);
      sides.Advance();
    }
    device::sm90::ReleaseForWarp(shared.empty_step[steps.Stage()]);
    steps.Advance();
  }
}

}  // namespace jax_bsk::attention::cuda::sm90
