// The CUDA choice of key blocks, for cuda_check: against the plainest one, repeated, between guard bytes.
#include "check_choose.h"
#include "cuda_check.h"
#include "lists/launch.h"

namespace jax_bsk::check {
namespace {

struct Named {
  const char* name;
  int64_t tables, rows, groups, group, k;
  bool plain, spoiled;
};
const Named kCases[] = {
    {"choose", 6, 37, 45, 1, 5, false, false},
    {"choose-bad", 12, 37, 45, 1, 5, false, true},
    {"choose-topk", 16, 256, 256, 1, 16, true, false},
    {"choose-one-row", 300, 1, 500, 1, 40, false, false},
    {"choose-groups", 3, 70, 33, 4, 6, false, false},
    {"choose-groups-bad", 3, 70, 33, 3, 6, false, true},
    {"choose-one-group", 2, 9, 1, 7, 3, false, false},
    {"choose-most", 2, 50, 300, 1, 1000, false, false},
    {"choose-many-groups", 2, 20, 5000, 1, 700, false, false},
    {"choose-many-groups-bad", 2, 20, 5000, 2, 700, false, true},
    {"choose-largest", 1, 5, 24000, 1, 100, false, false},  // two warps' keys fill the shared memory
    {"choose-many-rows", 2, 40000, 33, 1, 3, false, false},
    {"choose-required", 2, 9, 7, 1, 0, false, false},
    {"choose-no-groups", 3, 9, 0, 1, 2, false, false},
    {"choose-no-rows", 3, 0, 9, 1, 2, false, false},
    {"choose-no-lists", 0, 9, 7, 1, 2, false, false},
};

bool Run(const Named& named) {
  const ChooseCase c(named.tables, named.rows, named.groups, named.group, named.k, named.plain, named.spoiled, 5);
  const Exact scores(c.scores), states(c.states), candidates(c.candidates);
  const ChooseCase::Results empty = c.Empty();
  Device row_offsets(empty.row_offsets), kv_blocks(empty.kv_blocks), tiles(empty.tiles);
  const std::vector<Device*> results = {&row_offsets, &kv_blocks, &tiles};
  const auto words = [](const Device& array) { return static_cast<int32_t*>(array.data()); };
  const auto params =
      c.With(static_cast<const float*>(scores.data()), static_cast<const int8_t*>(states.data()),
             static_cast<const int32_t*>(candidates.data()), words(row_offsets), words(kv_blocks), words(tiles));
  if (const std::string refusal = lists::cuda::ChooseRefusal(params); !refusal.empty()) {
    std::printf("REFUSED: %s\n", refusal.c_str());
    std::exit(3);
  }
  const Device workspace(4 * lists::cuda::ChooseWorkspace(params), 0xFF);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const auto launch = [&] { CUDA_OK(lists::cuda::LaunchChoose(params, words(workspace), 0, stream)); };
  launch();
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto read = [](const Device& array) {
    const std::vector<uint8_t> bytes = array.Bytes();
    std::vector<int32_t> host(bytes.size() / 4);
    std::memcpy(host.data(), bytes.data(), bytes.size());
    return host;
  };
  const ChooseCase::Results got{read(row_offsets), read(kv_blocks), read(tiles)};
  bool passed = got == c.Wanted(true);
  if (!passed) std::printf("  wrong   <-- FAILED\n");
  for (const Device* array : results) passed &= array->GuardsIntact();
  passed &= workspace.GuardsIntact();
  if (named.tables > 0) passed &= Repeats(results, stream, launch);  // no graph is made of nothing
  if (named.plain || c.scores.size() > 100000) {
    const Milliseconds time = Time([&] { CUDA_OK(lists::cuda::LaunchChoose(params, words(workspace), 0, nullptr)); });
    std::printf("  %.4f ms median, %.4f ms best\n", time.median, time.best);
  }
  return passed;
}

}  // namespace

std::vector<std::string> ChooseNames() {
  std::vector<std::string> names;
  for (const Named& c : kCases) names.push_back(c.name);
  return names;
}

bool RunChoose(const std::string& name, bool& known) {
  for (const Named& c : kCases)
    if (name == c.name) return Run(c);
  return known = false;
}

}  // namespace jax_bsk::check
