// The producer warps of the Hopper backward: one schedules, one loads steps, one loads keys and values, one stores dS.
#pragma once

#include "attention/sm90/bwd_shared.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/bulk_copy.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/thread.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// The scheduler: hands out the items of a launch, each as soon as what it reads is there and what it overwrites is
// read.
template <typename Config>
class BackwardScheduler {
 public:
  using Shared = BackwardShared<Config>;

  __device__ BackwardScheduler(Shared& shared, const BackwardParams& params, const BackwardPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  __device__ __forceinline__ void Run() {
    int work = Share(TakeWork());
    while (work < plan_.work_count) {
      const int next = TakeWork();  // asked for now, used when this item is out
      BackwardItem item;
      if (Find(work, item)) {
        WaitForOthers(item);
        Announce(item);
      }
      work = Share(next);
    }
    BackwardItem end{};
    end.kind = BackwardItem::kEnd;
    Announce(end);
  }

 private:
  // For lane 0.
  __device__ __forceinline__ int TakeWork() {
    return device::ThreadHere() % 32 == 0 ? atomicAdd(plan_.work_counter, 1) : 0;
  }
  __device__ __forceinline__ static int Share(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

  // See bwd_plan.h. False for the places that the last slice leaves empty.
  __device__ __forceinline__ bool Find(int work, BackwardItem& item) {
    item.kind = BackwardItem::kKeys;
    item.slice = 0;
    int place = work;
    if (work >= plan_.key_items) {
      const int after = work - plan_.key_items, phase = plan_.slice_items.Quotient(after);
      const bool keys_left = phase + 1 < plan_.slices;  // the last phase has queries only
      place = plan_.slice_items.Remainder(after, phase);
      item.slice = phase + 1;
      if (!keys_left || place >= plan_.key_items) {
        if (keys_left) place -= plan_.key_items;
        item.kind = BackwardItem::kQueries;
        item.slice = phase;
      }
    }
    const bool keys = item.kind == BackwardItem::kKeys;
    if (keys) place = __ldg(plan_.order + int64_t{item.slice} * plan_.key_items + place);
    const Divider& tiles = keys ? plan_.key_tiles : plan_.query_blocks;
    const Divider& heads = keys ? plan_.kv_heads : plan_.heads;
    const int row_in_slice = tiles.Quotient(place), tile = tiles.Remainder(place, row_in_slice);
    const int group = keys ? 1 : plan_.group;
    const int row = item.slice * plan_.slice_heads * group + row_in_slice;
    if (row >= plan_.kv_rows * group) return false;
    item.table_row = keys ? row_in_slice * plan_.group : row_in_slice;
    item.batch = heads.Quotient(row);
    item.head = heads.Remainder(row, item.batch);
    // Under a causal mask the first keys and the last queries have the most to do: they come first.
    item.start = keys ? tile * Config::kTileKv
                      : (static_cast<int>(tiles.divisor) - 1 - tile) * static_cast<int>(params_.shape.block_q);
    const auto limit = lists::ReadLengths(params_.lengths, item.batch, static_cast<int>(params_.shape.q_len),
                                          static_cast<int>(params_.shape.kv_len));
    item.query_limit = limit.query;
    item.key_limit = limit.key;
    return true;
  }

  // Nobody waits for a later item, so whoever is waited for is at work or done.
  __device__ __forceinline__ void WaitForOthers(const BackwardItem& item) {
    if (item.kind == BackwardItem::kKeys) {
      const int before = item.slice - plan_.buffers;
      if (before >= 0) WaitFor(plan_.done_queries + before, Items(before, plan_.group * plan_.query_blocks.divisor));
    } else {
      WaitFor(plan_.done_keys + item.slice, Items(item.slice, plan_.key_tiles.divisor));
    }
  }
  __device__ __forceinline__ int Items(int slice, int row_items) const {
    return min(plan_.slice_heads, plan_.kv_rows - slice * plan_.slice_heads) * row_items;
  }
  __device__ __forceinline__ void WaitFor(const int32_t* counter, int count) {
    if (device::ThreadHere() % 32 == 0) {
      while (device::sm90::LoadAcquire(counter) < count) __nanosleep(100);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void Announce(const BackwardItem& item) {
    device::sm90::Wait(shared_.empty_item[items_.Stage()], items_.Empty());
    if (device::sm90::ElectLane()) {
      shared_.items[items_.Stage()] = item;
      device::sm90::Arrive(shared_.full_item[items_.Stage()]);
    }
    items_.Advance();
  }

  Shared& shared_;
  const BackwardParams& params_;
  const BackwardPlan& plan_;
  Ring<Shared::kItems> items_;
};

// Calls work(item, its place) for each item, from its announcement to the release of its place.
template <typename Shared, typename Work>
__device__ __forceinline__ void ForEachItem(Shared& shared, Work work) {
  Ring<Shared::kItems> items;
  while (true) {
    device::sm90::Wait(shared.full_item[items.Stage()], items.Full());
    const BackwardItem& item = shared.items[items.Stage()];
    if (ReadShared(item.kind) == BackwardItem::kEnd) return;
    work(item, items);
    device::sm90::ReleaseForWarp(shared.empty_item[items.Stage()]);
    items.Advance();
  }
}

// The loader of keys and values, which stay for all steps of an item. Each consumer warpgroup has its own barriers, so
// that one may begin an item while the other finishes the one before: it has its own rows or, split, its own operand.
template <typename Config>
__device__ __forceinline__ void LoadKeysAndValues(BackwardShared<Config>& shared, const BackwardPlan& plan) {
  Ring<1> place;
  ForEachItem(shared, [&](const BackwardItem& item, const auto& items) {
    device::sm90::Wait(shared.open_item[items.Stage()], items.Full());
    if (ReadShared(item.kind) != BackwardItem::kKeys) return;
#pragma unroll 1
    for (int group = 0; group < 2; ++group) {
      Barrier& full = shared.full_key[group];
      device::sm90::Wait(shared.empty_key[group], place.Empty());
      if (device::sm90::ElectLane()) {
        device::sm90::ArriveExpecting(full, sizeof(shared.key));
#pragma unroll 1
        for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
          const int row = Config::kSplit ? 0 : group * 64, target = (chunk * Config::kTileKv + row) * kChunk;
          if (!Config::kSplit || group == 0) {
            device::sm90::LoadBox(shared.key + target, plan.key, full, chunk * kChunk, item.start + row, item.head,
                                  item.batch);
          }
          if (!Config::kSplit || group == 1) {
            device::sm90::LoadBox(shared.value + target, plan.value, full, chunk * kChunk, item.start + row, item.head,
                                  item.batch);
          }
        }
      }
      __syncwarp();
    }
    place.Advance();
  });
}

// The loader of steps: one warp that walks the lists, 32 entries at a time.
template <typename Config>
class BackwardLoader {
 public:
  using Shared = BackwardShared<Config>;
  using Element = typename Config::Element;

  __device__ BackwardLoader(Shared& shared, const BackwardParams& params, const BackwardPlan& plan)
      : shared_(shared), params_(params), plan_(plan) {}

  __device__ __forceinline__ void Run() {
    ForEachItem(shared_, [&](const BackwardItem& item, const auto& items) {
      pending_ = false;
      if (item.kind == BackwardItem::kKeys) {
        BeginKeys();
      } else {
        BeginQueries();
      }
      __syncwarp();
      if (device::sm90::ElectLane()) device::sm90::Arrive(shared_.open_item[items.Stage()]);
      const bool sound = Walk(item);
      Emit(item, sound ? StepFlag::kLast : StepFlag::kLast | StepFlag::kInexact);
    });
  }

 private:
  __device__ __forceinline__ static int Share(int x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

  // Waits until the other kind's steps have left the memory.
  __device__ __forceinline__ void BeginKeys() {
#pragma unroll 1
    for (int i = 0; i < Config::kQueryStages; ++i) {
      WaitUntilEmpty<Config::kQueryStages>(query_step_ + i, Config::kStages);
    }
    ++key_items_;
  }
  __device__ __forceinline__ void BeginQueries() {
#pragma unroll 1
    for (int i = 0; i < Config::kStages; ++i) WaitUntilEmpty<Config::kStages>(key_step_ + i, 0);
#pragma unroll 1
    for (int group = 0; group < 2; ++group) {
      device::sm90::Wait(shared_.empty_key[group], Ring<1>{key_items_}.Empty());
    }
    device::sm90::FenceAsyncProxyGlobal();  // others wrote dS, and said so
  }
  template <int kSize>
  __device__ __forceinline__ void WaitUntilEmpty(uint32_t step, int first_place) {
    const Ring<kSize> ring{step};
    device::sm90::Wait(shared_.empty[first_place + ring.Stage()], ring.Empty());
  }

  // The steps of an item: the queries that visit a tile of keys, one query head of the group after the other; or the
  // keys that a block of queries visits. False when a list cannot be followed to its end; the other heads' lists are
  // followed all the same, since their queries read the dS that these steps write.
  __device__ __forceinline__ bool Walk(const BackwardItem& item) {
    const bool keys = item.kind == BackwardItem::kKeys;
    if (item.start >= (keys ? item.key_limit : item.query_limit)) return true;
    const int heads = keys ? plan_.group : 1;
    bool sound = true;
#pragma unroll 1
    for (int i = 0; i < heads; ++i) sound &= WalkList(item, keys, i, item.head * heads + i);
    return sound;
  }

  // Walks the list of one query head, the given one of the item. Entries are fetched 32 at a time, one a lane.
  __device__ __forceinline__ bool WalkList(const BackwardItem& item, bool keys, int head_in_item, int head) {
    const BlockList& list = keys ? params_.cols : params_.rows;
    const int block = static_cast<int>(keys ? params_.shape.block_q : params_.shape.block_kv);  // that is visited
    const lists::ListRow row = lists::FindRow(list, item.batch, head, BlockOf(list, item));
    if (row.length < 0) return false;
    // Subtiles of the item's tile within those of a block, and of the row's first entry, which for keys is its own
    // place and for queries its match's.
    int subtile = BufferBase(item, head_in_item);
    int sums = 0;  // of the first entry's gate
    if (Config::kGated && keys) {
      const int gate = lists::GateIndex(list, params_.shape.heads, item.batch, head, row.begin);
      sums =
          4 * (gate * plan_.entry_subtiles + (item.start / 64 & (static_cast<int>(params_.shape.block_kv) / 64 - 1)) *
                                                 static_cast<int>(params_.shape.block_q / 64));
    }
    if (keys) {
      const int64_t table = lists::TableIndex(list.batch, list.heads, item.batch, head);
      subtile += static_cast<int>(row.begin - table * list.capacity) * plan_.entry_subtiles +
                 (item.start / 64 & (params_.shape.block_kv / 64 - 1)) * static_cast<int>(params_.shape.block_q / 64);
    }
    int ids = 0, seconds = 0;  // of this lane's entry
#pragma unroll 1
    for (int entry = 0; entry < row.length; ++entry) {
      if (entry % 32 == 0) {
        const int lane = device::ThreadHere() % 32;
        if (entry + lane < row.length) {
          ids = __ldg(list.ids + row.begin + entry + lane);
          if (keys) {
            seconds = __ldg(list.tiles + row.begin + entry + lane);
          } else {
            // If rows of the list overlap, another row may have written its match here.
            const int2 match = __ldg(plan_.matches + row.begin + entry + lane);
            seconds = match.y == BlockOf(list, item) ? match.x : -1;
          }
        }
      }
      const int id = Share(ids, entry % 32), other = Share(seconds, entry % 32);
      const bool sound = keys ? id >= 0 && id < list.ids_end && other >= -1 && other < params_.tiles.count
                              : other >= 0;  // a match: then the entry is sound, too
      if (!sound) return false;
#pragma unroll 1
      for (int offset = 0; offset < block; offset += 64) {
        const int start = id * block + offset;
        if (start >= (keys ? item.query_limit : item.key_limit)) break;
        Emit(item, 0);
        pending_ = true;
        start_ = start;
        head_ = head;
        tile_ = other;
        const int stride = keys ? 1 : static_cast<int>(params_.shape.block_q / 64);
        subtiles_ = subtile + (keys ? entry : other) * plan_.entry_subtiles + offset / 64 * stride;
        gate_sums_ = sums + 4 * (entry * plan_.entry_subtiles + offset / 64);
        if constexpr (Config::kExtras) entry_ = row.begin + entry;
      }
    }
    return true;
  }

  // The item's row of a list.
  __device__ __forceinline__ int BlockOf(const BlockList& list, const BackwardItem& item) const {
    const int block = static_cast<int>(&list == &params_.cols ? params_.shape.block_kv : params_.shape.block_q);
    return item.start >> (block == 128 ? 7 : 6);
  }

  // First subtile of a query head of the item's slice.
  __device__ __forceinline__ int BufferBase(const BackwardItem& item, int head) const {
    return item.slice % plan_.buffers * plan_.buffer_subtiles +
           (item.table_row + head) * static_cast<int>(params_.cols.capacity) * plan_.entry_subtiles;
  }

  // The pending step, if any; a void one instead when it is to be the only one.
  __device__ __forceinline__ void Emit(const BackwardItem& item, int flags) {
    if (!pending_ && !(flags & StepFlag::kLast)) return;
    const bool keys = item.kind == BackwardItem::kKeys;
    if (!pending_) flags |= StepFlag::kVoid;
    if (keys && tile_ >= 0) flags |= StepFlag::kMasked | StepFlag::kBits;
    if (item.start + Config::kTileKv > item.key_limit) flags |= StepFlag::kMasked;
    int place;
    if (keys) {
      place = Ring<Config::kStages>{key_step_}.Stage();
      WaitUntilEmpty<Config::kStages>(key_step_, 0);
    } else {
      place = Config::kStages + Ring<Config::kQueryStages>{query_step_}.Stage();
      WaitUntilEmpty<Config::kQueryStages>(query_step_, Config::kStages);
    }
    if (device::sm90::ElectLane()) {
      if (pending_) Load(item, place);
      shared_.flags[place] = flags;
      if (keys) shared_.orders[key_step_ % Shared::kOrders] = {flags, subtiles_};
      device::sm90::Arrive(shared_.full[place]);
    }
    __syncwarp();
    if (keys) {
      ++key_step_;
    } else {
      ++query_step_;
    }
  }

  // Queries and output gradients, with their bit tile if any; or keys and dS.
  __device__ __forceinline__ void Load(const BackwardItem& item, int place) {
    const bool keys = item.kind == BackwardItem::kKeys;
    Barrier& full = shared_.full[place];
    const int block_q = static_cast<int>(params_.shape.block_q);
    if (Config::kGated && keys) {
      shared_.gates[place] = {lists::ReadGate(params_.col_gates, gate_sums_ / (4 * plan_.entry_subtiles)), gate_sums_};
    }
    if (Config::kExtras && keys) {
      const bool tiles = params_.bias.tiles != nullptr;
      shared_.pairs[place] = {start_, head_, tiles ? __ldg(params_.bias.col_tiles + entry_) : -1};
    }
    const int subtiles_bytes = block_q / 64 * kSubtileElements * 2;
    device::sm90::Expect(full, Config::kFirstBytes + (keys ? Config::kFirstBytes + kStatisticsBytes : subtiles_bytes));
    const int head = keys ? head_ : head_ / plan_.group;
#pragma unroll 1
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      const int target = chunk * 64 * kChunk;
      device::sm90::LoadBox(shared_.First(place) + target, keys ? plan_.query : plan_.key, full, chunk * kChunk, start_,
                            head, item.batch);
      if (keys) {
        device::sm90::LoadBox(shared_.Second(place) + target, plan_.dout, full, chunk * kChunk, start_, head,
                              item.batch);
      }
    }
    if (keys) {
      const int row = item.batch * static_cast<int>(params_.shape.heads) + head_;
      const float* statistics = plan_.statistics + (int64_t{row} * plan_.query_tiles + start_ / 64) * kStatisticsWords;
      device::sm90::LoadBytes(shared_.statistics[place], statistics, full, kStatisticsBytes);
    }
    if (!keys) {
      const auto* source = static_cast<const Element*>(plan_.subtiles) + int64_t{subtiles_} * kSubtileElements;
      device::sm90::LoadBytes(shared_.Second(place), source, full, subtiles_bytes);
    } else if (tile_ >= 0) {
      const int block_kv = static_cast<int>(params_.shape.block_kv);
      const uint32_t* words =
          lists::BitTileRow(params_.tiles, item.batch, head_, tile_, start_ & (block_q - 1), block_q, block_kv);
      device::sm90::Expect(full, 64 * block_kv / 8);
      device::sm90::LoadBytes(shared_.bits[place], words, full, 64 * block_kv / 8);
    }
  }

  static constexpr int kStatisticsBytes = 4 * kStatisticsWords;

  Shared& shared_;
  const BackwardParams& params_;
  const BackwardPlan& plan_;
  uint32_t key_step_ = 0, query_step_ = 0, key_items_ = 0;  // of the CTA

  // The pending step.
  bool pending_ = false;
  int start_ = 0, tile_ = -1, subtiles_ = 0, gate_sums_ = 0;
  int head_ = 0;       // query head
  int64_t entry_ = 0;  // of a list's arrays, with biases
};

// The storer of dS: one thread that hands the consumers' subtiles to the copy engine.
template <typename Config>
__device__ __forceinline__ void StoreScores(BackwardShared<Config>& shared, const BackwardParams& params,
                                            const BackwardPlan& plan) {
  using Element = typename Config::Element;
  using Shared = BackwardShared<Config>;
  uint32_t step = 0;  // of the CTA's steps of keys
  ForEachItem(shared, [&](const BackwardItem& item, const auto&) {
    if (item.kind != BackwardItem::kKeys) return;
    bool last = false;
    Barrier* reading = nullptr;  // of the buffer that was handed over last, and may still be read
    while (!last) {
      const Ring<Config::kScoreStages> place{step};
      const int stage = place.Stage();
#pragma unroll 1
      for (int group = 0; group < Config::kKeyGroups; ++group) {
        device::sm90::Wait(shared.full_scores[stage][group], place.Full());
        const StoreOrder& order = shared.orders[step % Shared::kOrders];
        const int flags = ReadShared(order.flags), subtiles = ReadShared(order.subtiles);
        last = flags & StepFlag::kLast;
        if (device::sm90::ElectLane()) {
          if (!(flags & StepFlag::kVoid)) {
            const int64_t subtile = subtiles + group * (static_cast<int>(params.shape.block_q) / 64);
            device::sm90::StoreBytes(static_cast<Element*>(plan.subtiles) + subtile * kSubtileElements,
                                     shared.scores[stage][group], kSubtileElements * 2);
          }
          device::sm90::CommitStores();
          if (Config::kScoreStages > 1) {
            device::sm90::WaitForStoresRead<1>();
            if (reading != nullptr) device::sm90::Arrive(*reading);
          } else {
            device::sm90::WaitForStoresRead<0>();
            device::sm90::Arrive(shared.empty_scores[stage][group]);
          }
        }
        reading = &shared.empty_scores[stage][group];
        __syncwarp();
      }
      ++step;
    }
    if (device::sm90::ElectLane()) {
      device::sm90::WaitForStores();
      if (Config::kScoreStages > 1) device::sm90::Arrive(*reading);
      device::sm90::FenceAsyncProxyGlobal();
      device::sm90::AddRelease(plan.done_keys + item.slice, 1);
    }
    __syncwarp();
  });
}

}  // namespace jax_bsk::attention::cuda::sm90
