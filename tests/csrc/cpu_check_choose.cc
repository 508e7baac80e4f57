// The CPU's choice of key blocks by random scores, against the plainest one.
#include <atomic>
#include <cstdio>
#include <thread>

#include "check_choose.h"
#include "cpu_check.h"
#include "lists/cpu.h"

namespace jax_bsk::check {

bool CheckChoose(uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  const ChooseCase c(pick(0, 3), pick(0, 20), pick(0, 60), pick(1, 4), pick(0, 12), seed % 7 == 0, seed % 3 == 0, seed);
  ChooseCase::Results got = c.Empty();
  const auto scores = Exact(c.scores);
  const auto states = Exact(c.states);
  const auto candidates = Exact(c.candidates);
  const auto params = c.With(scores.get(), states.get(), candidates.get(), got.row_offsets.data(), got.kv_blocks.data(),
                             got.tiles.data());
  std::atomic<int64_t> next{0};
  std::thread other([&] { lists::cpu::RunChooseTasks(params, next); });
  const bool ran = lists::cpu::RunChooseTasks(params, next);
  other.join();
  if (ran && got == c.Wanted(false)) return true;
  std::printf("seed %lu: choice for %ld lists of %ld rows, %ld groups of %ld, %ld a row is wrong\n", seed,
              c.params.tables, c.params.rows, c.params.groups, c.params.group, c.params.k);
  return false;
}

}  // namespace jax_bsk::check
