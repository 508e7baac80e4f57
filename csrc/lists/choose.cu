// Lists of the best blocks in two launches. In the first a warp chooses for a row: it finds the k-th greatest key bit
// by bit and writes the chosen blocks into the row's part of the workspace. In the second the rows' counts become
// offsets and their blocks go to their places. Nothing is sorted, and no bit depends on which warp comes first.
#include <algorithm>

#include "device/host.h"
#include "device/ptx/thread.cuh"
#include "lists/launch.h"
#include "lists/score_key.h"

namespace jax_bsk::lists::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ int Lane() { return static_cast<int>(threadIdx.x) % 32; }
// The part of a ballot that lower lanes voted.
__device__ unsigned Below(unsigned ballot) { return ballot & ((1u << Lane()) - 1); }

__device__ int InclusiveSum(int x) {
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAll, x, step);
    if (Lane() >= step) x += before;
  }
  return x;
}

// The workspace: for each row its blocks, those with a bit tile from the front and full ones from the back, and counts.
struct alignas(8) Entry {
  int block, tile;
};
struct alignas(8) Counts {
  int partial, all;
};

struct Workspace {
  int room;
  Entry* entries;  // [tables, rows, room]
  Counts* counts;  // [tables, rows]

  Workspace(const ChooseParams& p, int32_t* words)
      : room(static_cast<int>(RowCapacity(p))),
        entries(reinterpret_cast<Entry*>(words)),
        counts(reinterpret_cast<Counts*>(entries + p.tables * p.rows * room)) {}
};

// ---- Choosing

constexpr int kChooseWarps = 4;

// The groups that a row chooses from.
struct Row {
  int groups;
  const float* scores;
  const int8_t* states;

  // Keys of the groups first + lane, first + lane + 32 and so on, 0 past the last group. All loads are on their way
  // before the first is waited for.
  template <int kValues>
  __device__ void Read(int first, uint32_t (&keys)[kValues]) const {
    const int at = first + Lane(), left = groups - at;
    int states_of[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = 32 * i < left ? __float_as_uint(__ldg(scores + at + 32 * i)) : 0;
      states_of[i] = 32 * i < left ? __ldg(states + at + 32 * i) : kClosed;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t key = ScoreKey(keys[i], 1);  // 1: subnormal numbers are what they are
      keys[i] = max(states_of[i] == kOpen ? key : 0, states_of[i] == kRequired ? kRequiredKey : 0);
    }
  }
};

// A row's keys. ForEach calls visit(group, key) in the order of groups, for 32 neighbours at a time; all lanes come
// along, with a key of 0 past the last group.
template <int kValues>
class KeysInRegisters {
 public:
  static constexpr int kMaxGroups = 32 * kValues;

  __device__ KeysInRegisters(const Row& row, uint32_t*) { row.Read(0, keys_); }
  template <class Visit>
  __device__ void ForEach(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) visit(32 * i + Lane(), keys_[i]);
  }

 private:
  uint32_t keys_[kValues];
};

// The same in a warp's words of shared memory. Visitors may write to those of groups that have been visited.
class KeysInSharedMemory {
 public:
  __device__ KeysInSharedMemory(const Row& row, uint32_t* words) : groups_(row.groups), words_(words) {
    constexpr int kValues = 8;
    for (int first = 0; first < groups_; first += 32 * kValues) {
      uint32_t keys[kValues];
      row.Read(first, keys);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (first + 32 * i < groups_) words[first + 32 * i + Lane()] = keys[i];
      }
    }
  }
  template <class Visit>
  __device__ void ForEach(const Visit& visit) const {
#pragma unroll 4
    for (int first = 0; first < groups_; first += 32) visit(first + Lane(), words_[first + Lane()]);
  }

 private:
  int groups_;
  const uint32_t* words_;
};

// Words of shared memory for a row: of whole warps.
__host__ __device__ constexpr int64_t RowWords(int64_t groups) { return (groups + 31) / 32 * 32; }

// Keys from `least` upwards are chosen, of those equal to it the first `ties`.
struct Choice {
  uint32_t least;
  int ties;
};

template <class Keys>
__device__ Choice FindLeast(const Keys& keys, int k, int width) {
  int required = 0, open = 0;
  uint32_t greatest = 0, smallest = kRequiredKey;  // of the open ones that are not required
  keys.ForEach([&](int, uint32_t key) {
    device::CountAtLeast(required, key, kRequiredKey);
    device::CountAtLeast(open, key, 1);
    if (key != kRequiredKey) greatest = max(greatest, key);
    if (key != 0) smallest = min(smallest, key);
  });
  required = __reduce_add_sync(kAll, required);
  open = __reduce_add_sync(kAll, open);
  const int limit = min(max(k, required), width);
  if (open <= limit) return {1, open};
  if (limit <= required) return {kRequiredKey, limit};

  // The limit-th greatest key is one of these; the bits that they all have are known.
  greatest = __reduce_max_sync(kAll, greatest);
  smallest = __reduce_min_sync(kAll, smallest);
  int bit = 32 - __clz(greatest ^ smallest);
  uint32_t least = bit == 32 ? 0 : greatest >> bit << bit;
  int above = required;  // keys above `least` once its last bit is known: those of the last try that were too few
  while (bit > 0) {
    const uint32_t next = least | 1u << --bit;
    int count = 0;
    keys.ForEach([&](int, uint32_t key) { device::CountAtLeast(count, key, next); });
    count = __reduce_add_sync(kAll, count);
    if (count == limit) return {next, limit};  // most rows have no tie there and end early
    if (count > limit) {
      least = next;
    } else {
      above = count;
    }
  }
  return {least, limit - above};
}

template <class Keys>
__global__ void __launch_bounds__(32 * kChooseWarps)
    ChooseKernel(const __grid_constant__ ChooseParams params, const Workspace workspace) {
  extern __shared__ uint32_t words[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned number = blockIdx.x * (blockDim.x / 32) + warp, rows = static_cast<unsigned>(params.rows);
  if (number >= params.tables * rows) return;
  const int64_t of_table = number % rows;
  const int groups = static_cast<int>(params.groups), blocks = static_cast<int>(params.blocks);
  const Row row{groups, params.scores + number * params.groups, params.states + of_table * params.groups};
  uint32_t* const chosen = words + warp * static_cast<int>(RowWords(groups));

  // ---- The chosen groups, ascending; they may take the place of keys.
  const Keys keys(row, chosen);
  const Choice choice = FindLeast(keys, static_cast<int>(params.k), static_cast<int>(params.width));
  int count = 0, ties = 0;
  keys.ForEach([&](int group, uint32_t key) {
    const unsigned equal = __ballot_sync(kAll, key == choice.least);
    const bool early = ties + __popc(Below(equal)) < choice.ties;
    const bool take = key > choice.least || (key == choice.least && early);
    const unsigned taken = __ballot_sync(kAll, take);
    __syncwarp();  // all have read their keys
    if (take) chosen[count + __popc(Below(taken))] = static_cast<uint32_t>(group);
    count += __popc(taken);
    ties += __popc(equal);
  });
  __syncwarp();

  // ---- Their blocks.
  const int32_t* const candidates = params.candidates + of_table * params.blocks;
  Entry* const entries = workspace.entries + static_cast<int64_t>(number) * workspace.room;
  const auto group_blocks = static_cast<unsigned>(min(params.group, max(params.blocks, int64_t{1})));
  const unsigned all = count * group_blocks;
  int partial = 0, full = 0;
  for (unsigned first = 0; first < all; first += 32) {
    const unsigned i = first + Lane();
    int block = blocks, tile = -2;
    if (i < all) block = static_cast<int>(chosen[i / group_blocks] * group_blocks + i % group_blocks);
    if (block < blocks) tile = __ldg(candidates + block);
    const unsigned tiled = __ballot_sync(kAll, tile >= 0), untiled = __ballot_sync(kAll, tile == -1);
    const int front = partial + __popc(Below(tiled)), back = full + __popc(Below(untiled));
    if (tile >= -1) entries[tile >= 0 ? front : workspace.room - 1 - back] = {block, tile};
    partial += __popc(tiled);
    full += __popc(untiled);
  }
  if (Lane() == 0) workspace.counts[number] = {partial, partial + full};
}

// ---- Placing

constexpr int kPlaceThreads = 256;

// CTAs of a table, each with up to `part` rows: a thread a row, then a thread an entry.
__global__ void __launch_bounds__(kPlaceThreads)
    PlaceKernel(const __grid_constant__ ChooseParams params, const Workspace workspace, int parts, int part) {
  __shared__ int2 sums[kPlaceThreads / 32];  // warps' sums: of the rows before this part's, and of all
  __shared__ int warp_ends[kPlaceThreads / 32];
  __shared__ int ends[kPlaceThreads], partials[kPlaceThreads];  // of a row: entries up to its last; those with a tile
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int rows = static_cast<int>(params.rows), capacity = static_cast<int>(params.capacity);
  const int64_t table = blockIdx.x / parts;
  const int number = static_cast<int>(blockIdx.x) % parts, first = number * part, last = min(rows, first + part);
  const Counts* const counts = workspace.counts + table * rows;

  // ---- Entries before this part's rows, and in all.
  int before = 0, all = 0;
  for (int row = thread; row < rows; row += kPlaceThreads) {
    const int count = counts[row].all;
    all += count;
    if (row < first) before += count;
  }
  before = __reduce_add_sync(kAll, before);
  all = __reduce_add_sync(kAll, all);
  if (Lane() == 0) sums[warp] = {before, all};

  // ---- Where the part's rows end.
  const int row = first + thread;
  const Counts own = row < last ? counts[row] : Counts{0, 0};
  int end = InclusiveSum(own.all);
  if (Lane() == 31) warp_ends[warp] = end;
  __syncthreads();
  before = all = 0;
  for (int i = 0; i < kPlaceThreads / 32; ++i) {
    before += sums[i].x;
    all += sums[i].y;
    if (i < warp) end += warp_ends[i];
  }
  ends[thread] = end;
  partials[thread] = own.partial;
  __syncthreads();
  int32_t* const row_offsets = params.row_offsets + table * (rows + 1);
  if (number == 0 && thread == 0) row_offsets[0] = 0;
  if (row < last) row_offsets[row + 1] = min(before + end, capacity);

  // ---- The entries to their places.
  const int room = workspace.room;
  const Entry* const entries = workspace.entries + (table * rows + first) * room;
  int32_t* const kv_blocks = params.kv_blocks + table * capacity;
  int32_t* const tiles = params.tiles + table * capacity;
  const int listed = min(ends[kPlaceThreads - 1], capacity - min(before, capacity));
  for (int i = thread; i < listed; i += kPlaceThreads) {
    int of = 0;  // rows of the part that end at or before entry i
#pragma unroll
    for (int step = kPlaceThreads / 2; step > 0; step /= 2) {
      if (ends[of + step - 1] <= i) of += step;
    }
    const int at = i - (of > 0 ? ends[of - 1] : 0);
    const int place = at < partials[of] ? at : room - 1 - (at - partials[of]);
    const Entry entry = entries[static_cast<int64_t>(of) * room + place];
    kv_blocks[before + i] = entry.block;
    tiles[before + i] = entry.tile;
  }

  // ---- This part's share of what is past the lists' end.
  for (int i = min(all, capacity) + number * kPlaceThreads + thread; i < capacity; i += parts * kPlaceThreads) {
    kv_blocks[i] = -1;
    tiles[i] = -1;
  }
}

// ---- Launching

template <class Keys>
cudaError_t LaunchChooseKernel(const ChooseParams& params, const Workspace& workspace, int shared_bytes,
                               cudaStream_t stream) {
  const int64_t warp_bytes = 4 * std::max<int64_t>(RowWords(params.groups), 32);
  const int64_t warps = std::min<int64_t>(shared_bytes / warp_bytes, kChooseWarps), bytes = warps * warp_bytes;
  if (bytes > 48 * 1024) {
    // The most there is, whatever this call takes: the attribute is the kernel's, and other threads launch it, too.
    const cudaError_t error =
        cudaFuncSetAttribute(ChooseKernel<Keys>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const auto grid = static_cast<unsigned>(device::CeilDiv(params.tables * params.rows, warps));
  ChooseKernel<Keys>
      <<<grid, static_cast<unsigned>(32 * warps), static_cast<size_t>(bytes), stream>>>(params, workspace);
  return cudaGetLastError();
}

}  // namespace

std::string ChooseRefusal(const ChooseParams& params) {
  if (params.groups > Limits::kMaxGroups) {
    return "the CUDA kernels choose among up to " + std::to_string(Limits::kMaxGroups) + " groups of key blocks, not " +
           std::to_string(params.groups);
  }
  constexpr int64_t kMost = device::kMaxInt / 4;
  const int64_t room = std::max<int64_t>(RowCapacity(params), 1);
  if (params.blocks > kMost || params.capacity > kMost || params.rows > kMost / room ||
      params.tables > kMost / std::max<int64_t>(params.rows, 1)) {
    return "the CUDA kernels choose for fewer than 2^29 rows, with fewer than 2^29 entries a list";
  }
  return "";
}

cudaError_t LaunchChoose(const ChooseParams& params, int32_t* words, int device, cudaStream_t stream) {
  if (params.tables == 0) return cudaSuccess;
  const device::DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  device::DeviceFacts facts;
  if (const cudaError_t error = ReadDevice(device, &facts); error != cudaSuccess) return error;
  const Workspace workspace(params, words);

  // As few registers as hold the row.
  if (params.rows > 0) {
    using Launch = cudaError_t (*)(const ChooseParams&, const Workspace&, int, cudaStream_t);
    const auto launch = [&]() -> Launch {
      if (params.groups <= KeysInRegisters<8>::kMaxGroups) return LaunchChooseKernel<KeysInRegisters<8>>;
      if (params.groups <= KeysInRegisters<16>::kMaxGroups) return LaunchChooseKernel<KeysInRegisters<16>>;
      return LaunchChooseKernel<KeysInSharedMemory>;
    }();
    if (const cudaError_t error = launch(params, workspace, facts.shared_bytes, stream); error != cudaSuccess) {
      return error;
    }
  }

  // Parts of few rows where the tables are too few for the chip; each reads the counts of all rows of its table.
  const int64_t wanted = device::CeilDiv(params.tables * params.rows, 2 * facts.multiprocessors);
  const int64_t part = std::clamp<int64_t>(wanted, 32, kPlaceThreads);
  const int64_t parts = std::max<int64_t>(1, device::CeilDiv(params.rows, part));
  PlaceKernel<<<static_cast<unsigned>(params.tables * parts), kPlaceThreads, 0, stream>>>(
      params, workspace, static_cast<int>(parts), static_cast<int>(part));
  return cudaGetLastError();
}

}  // namespace jax_bsk::lists::cuda
