// Divides a call into tasks, and hands them out. Compiled for the plainest machine; the kernels are in cpu/.
#include "decode/cpu.h"

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

#include "cpu/choose.h"
#include "cpu/worker.h"
#include "decode/cpu/kernels.h"
#include "sizes.h"

namespace jax_bsk::decode::cpu {

// A tile that several workers compute.
struct Split {
  int64_t tile;
  int64_t parts;
  size_t partial_bytes;
  size_t offset;              // of its partial results in the call's
  std::atomic<int64_t> left;  // parts that are not computed yet

  Split(int64_t tile, int64_t parts, size_t partial_bytes, size_t offset)
      : tile(tile), parts(parts), partial_bytes(partial_bytes), offset(offset), left(parts) {}
};

// A part of a split tile, a whole tile, or a rest: `index` counts among those of its kind.
struct Task {
  enum Kind : int32_t { kPart, kWhole, kRest } kind;
  int64_t index;
  int64_t part;
};

struct Tasks {
  std::vector<Tile> tiles;
  std::vector<Rest> rests;
  std::vector<std::unique_ptr<Split>> splits;
  std::vector<Task> tasks;
  std::unique_ptr<jax_bsk::cpu::Scratch> partials;
};

namespace {

// Partial results take no more memory than this: tiles beyond are not split.
constexpr size_t kMostPartialBytes = size_t{256} << 20;

const Kernels& Chosen() {
  static const Kernels* const kernels =
      jax_bsk::cpu::Choose<Kernels>({Avx512Kernels(), Avx2Kernels(), BaselineKernels()});
  return *kernels;
}

// Whether the number of sequences and their offsets are as they should be; past the sequences they are not looked at.
bool Sound(const Shape& s, const int32_t* offsets, int64_t seqs) {
  if (seqs < 0 || seqs > s.seqs || offsets[0] < 0 || offsets[seqs] > s.tokens) return false;
  for (int64_t i = 0; i < seqs; ++i) {
    if (offsets[i + 1] < offsets[i]) return false;
  }
  return true;
}

void AddSequence(const ForwardParams& p, int64_t group, int64_t seq, int64_t first, int64_t q_len, Tasks& tasks) {
  const Shape& s = p.shape;
  int64_t kv_len = p.kv_lens[group * s.seqs + seq];
  if (kv_len > s.max_pages * s.page_size) kv_len = -1;
  const int64_t rows = q_len * (s.heads / s.kv_heads);
  const int64_t part = rows <= kTileRows ? p.short_part : p.long_part;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t head = 0; head < s.kv_heads; ++head) {
      tasks.tiles.push_back({group, seq, head, first, q_len, kv_len, row, std::min(kTileRows, rows - row), part});
    }
  }
}

void AddGroup(const ForwardParams& p, int64_t group, Tasks& tasks) {
  const Shape& s = p.shape;
  const int32_t* const offsets = p.cu_q_lens + group * (s.seqs + 1);
  const int64_t seqs = p.num_seqs[group];
  if (!Sound(s, offsets, seqs)) {
    tasks.rests.push_back({group, 0, s.tokens, true});
    return;
  }
  for (int64_t i = 0; i < seqs; ++i) AddSequence(p, group, i, offsets[i], offsets[i + 1] - offsets[i], tasks);
  if (offsets[0] > 0) tasks.rests.push_back({group, 0, offsets[0], false});
  if (offsets[seqs] < s.tokens) tasks.rests.push_back({group, offsets[seqs], s.tokens - offsets[seqs], false});
}

// Splits tiles that are long against all of the work, and those of few rows, for the order of their parts: what the
// heads of a sequence have at the same positions lies side by side, often in one page of the machine's memory. Measured
// at 4 sequences of 16384 positions with 8 heads of 128 float32 and 4 rows: 71 ms of processor time head by head, 53
// part by part. Whole tiles follow, the longest first.
void Divide(const ForwardParams& p, int64_t workers, Tasks& tasks) {
  const Kernels& kernels = Chosen();
  const int64_t tiles = static_cast<int64_t>(tasks.tiles.size());
  std::vector<int64_t> visited(tiles);
  double all = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    visited[i] = kernels.visited(p, tasks.tiles[i]);
    all += static_cast<double>(visited[i]);
  }
  std::vector<int64_t> whole;
  size_t bytes = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t parts = BlocksOf(visited[i], tasks.tiles[i].part);
    const size_t partial = kernels.partial(p, tasks.tiles[i]);
    const bool is_long = workers > 1 && static_cast<double>(visited[i]) * 4 * workers > all;
    const bool split = parts > 1 && (is_long || tasks.tiles[i].rows <= kFewRows) &&
                       static_cast<size_t>(parts) <= (kMostPartialBytes - bytes) / partial;
    if (!split) {
      whole.push_back(i);
      continue;
    }
    tasks.splits.push_back(std::make_unique<Split>(i, parts, partial, bytes));
    bytes += static_cast<size_t>(parts) * partial;
  }
  // The parts of a sequence, those of the same number together.
  for (size_t first = 0, last = 0; first < tasks.splits.size(); first = last) {
    int64_t most = 0;
    const Tile& tile = tasks.tiles[tasks.splits[first]->tile];
    for (; last < tasks.splits.size(); ++last) {
      const Tile& other = tasks.tiles[tasks.splits[last]->tile];
      if (other.group != tile.group || other.seq != tile.seq) break;
      most = std::max(most, tasks.splits[last]->parts);
    }
    for (int64_t part = 0; part < most; ++part) {
      for (size_t i = first; i < last; ++i) {
        if (part < tasks.splits[i]->parts) tasks.tasks.push_back({Task::kPart, static_cast<int64_t>(i), part});
      }
    }
  }
  std::stable_sort(whole.begin(), whole.end(), [&](int64_t a, int64_t b) { return visited[a] > visited[b]; });
  for (const int64_t i : whole) tasks.tasks.push_back({Task::kWhole, i, 0});
  for (size_t i = 0; i < tasks.rests.size(); ++i) tasks.tasks.push_back({Task::kRest, static_cast<int64_t>(i), 0});
  if (bytes > 0) {
    tasks.partials = std::make_unique<jax_bsk::cpu::Scratch>(bytes);
    if (tasks.partials->get() == nullptr) throw std::bad_alloc();
  }
}

void RunTask(const ForwardParams& p, Tasks& tasks, const Task& task, void* scratch) {
  const Kernels& kernels = Chosen();
  if (task.kind == Task::kRest) return kernels.rest(p, tasks.rests[task.index]);
  if (task.kind == Task::kWhole) return kernels.whole(p, tasks.tiles[task.index], scratch);
  Split& split = *tasks.splits[task.index];
  const Tile& tile = tasks.tiles[split.tile];
  char* const partials = static_cast<char*>(tasks.partials->get()) + split.offset;
  kernels.part(p, tile, task.part, partials + task.part * split.partial_bytes, scratch);
  // Who computes the last part puts all of them together.
  if (split.left.fetch_sub(1, std::memory_order_acq_rel) == 1) kernels.merge(p, tile, split.parts, partials, scratch);
}

}  // namespace

std::string Refusal(const ForwardParams& params) {
  if (params.cache != CacheType::kSame) return "the CPU decoding kernels take a cache of the query's type";
  const Shape& shape = params.shape;
  for (const int64_t dim : {shape.head_dim, shape.value_dim}) {
    if (dim > kMaxHeadDim) {
      return "the CPU kernels take head sizes up to " + std::to_string(kMaxHeadDim) + ", not " + std::to_string(dim);
    }
  }
  return "";
}

bool Plan(const ForwardParams& params, int64_t workers, Call* call) noexcept {
  try {
    call->params = params;
    call->tasks = std::make_shared<Tasks>();
    if (params.shape.heads == 0 || params.shape.tokens == 0) return true;
    for (int64_t group = 0; group < params.shape.groups; ++group) AddGroup(params, group, *call->tasks);
    Divide(params, workers, *call->tasks);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

int64_t TaskCount(const Call& call) { return static_cast<int64_t>(call.tasks->tasks.size()); }

bool RunTasks(const Call& call, std::atomic<int64_t>& next) noexcept {
  return jax_bsk::cpu::TakeTasks(
      Chosen().scratch(call.params), TaskCount(call), next,
      [&](int64_t task, void* scratch) { RunTask(call.params, *call.tasks, call.tasks->tasks[task], scratch); });
}

}  // namespace jax_bsk::decode::cpu
