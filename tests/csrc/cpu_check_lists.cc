// The CPU's transpose of random block lists, against the plainest one.
#include <atomic>
#include <cstdio>
#include <thread>

#include "check_lists.h"
#include "cpu_check.h"
#include "lists/cpu.h"

namespace jax_bsk::check {

bool CheckLists(uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto pick = [&](int64_t high) { return std::uniform_int_distribution<int64_t>(0, high)(rng); };
  const ListCase c(1 + pick(3), pick(40), pick(50), pick(400), seed % 3 == 0, seed);
  ListCase::Results got = c.Empty();
  const auto params = c.With(c.offsets.data(), c.ids.data(), c.tiles.data(), got.col_offsets.data(), got.row_ids.data(),
                             got.col_tiles.data(), got.entries.data(), got.places.data());
  std::atomic<int64_t> next{0};
  std::thread other([&] { lists::cpu::RunTransposeTasks(params, next); });
  const bool ran = lists::cpu::RunTransposeTasks(params, next);
  other.join();
  if (ran && got == c.Wanted()) return true;
  std::printf("seed %lu: transpose of %ld lists of %ld rows, %ld columns, %ld entries is wrong\n", seed,
              c.params.tables, c.params.rows, c.params.columns, c.params.capacity);
  return false;
}

}  // namespace jax_bsk::check
