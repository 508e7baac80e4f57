// The CUDA transpose of block lists, for cuda_check: against the plainest one, repeated, between guard bytes.
#include "check_lists.h"
#include "cuda_check.h"
#include "lists/launch.h"

namespace jax_bsk::check {
namespace {

struct Named {
  const char* name;
  int64_t tables, rows, columns, capacity;
  bool spoiled;
};
const Named kCases[] = {
    {"lists", 6, 37, 45, 300, false},
    {"lists-bad", 12, 37, 45, 300, true},
    {"lists-topk", 16, 256, 256, 4096, false},
    {"lists-one-large", 1, 1024, 1024, 200000, false},
    {"lists-many-columns", 2, 300, 5000, 9000, true},  // counters for one warp or two
    {"lists-no-columns", 3, 9, 0, 50, false},
    {"lists-no-rows", 3, 0, 9, 50, false},
    {"lists-no-entries", 3, 9, 7, 0, false},
};

bool Run(const Named& named) {
  const ListCase c(named.tables, named.rows, named.columns, named.capacity, named.spoiled, 5);
  const Exact offsets(c.offsets), ids(c.ids), tiles(c.tiles);
  const ListCase::Results empty = c.Empty();
  Device col_offsets(empty.col_offsets), row_ids(empty.row_ids), col_tiles(empty.col_tiles), entries(empty.entries),
      places(empty.places);
  const std::vector<Device*> results = {&col_offsets, &row_ids, &col_tiles, &entries, &places};
  const auto words = [](const auto& array) { return static_cast<int32_t*>(array.data()); };
  const auto params = c.With(words(offsets), words(ids), words(tiles), words(col_offsets), words(row_ids),
                             words(col_tiles), words(entries), words(places));
  if (const std::string refusal = lists::cuda::TransposeRefusal(params); !refusal.empty()) {
    std::printf("REFUSED: %s\n", refusal.c_str());
    std::exit(3);
  }
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const auto launch = [&] { CUDA_OK(lists::cuda::LaunchTranspose(params, 0, stream)); };
  launch();
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto read = [](const Device& array) {
    const std::vector<uint8_t> bytes = array.Bytes();
    std::vector<int32_t> host(bytes.size() / 4);
    std::memcpy(host.data(), bytes.data(), bytes.size());
    return host;
  };
  const ListCase::Results got{read(col_offsets), read(row_ids), read(col_tiles), read(entries), read(places)};
  bool passed = got == c.Wanted();
  if (!passed) std::printf("  wrong   <-- FAILED\n");
  for (const Device* array : results) passed &= array->GuardsIntact();
  passed &= Repeats(results, stream, launch);
  if (named.capacity >= 4096) {
    const Milliseconds time = Time([&] { CUDA_OK(lists::cuda::LaunchTranspose(params, 0, nullptr)); });
    std::printf("  %.4f ms median, %.4f ms best\n", time.median, time.best);
  }
  return passed;
}

}  // namespace

std::vector<std::string> ListsNames() {
  std::vector<std::string> names;
  for (const Named& c : kCases) names.push_back(c.name);
  return names;
}

bool RunLists(const std::string& name, bool& known) {
  for (const Named& c : kCases)
    if (name == c.name) return Run(c);
  return known = false;
}

}  // namespace jax_bsk::check
