// A limit on the CTAs of persistent kernels, for tests alone. Small problems then walk long sequences of tiles, fill
// every ring and wrap it, and meet what otherwise takes more tiles than there are multiprocessors.
#pragma once

#include <atomic>

namespace jax_bsk {

// Multiprocessors that launches pretend the device has at most; 0 for no limit. Of the whole process: set it while
// nothing is launched.
inline std::atomic<int> grid_limit{0};

// Sets the limit for a scope.
class GridLimit {
 public:
  explicit GridLimit(int ctas) : previous_(grid_limit.exchange(ctas)) {}
  ~GridLimit() { grid_limit = previous_; }
  GridLimit(const GridLimit&) = delete;
  GridLimit& operator=(const GridLimit&) = delete;

 private:
  int previous_;
};

}  // namespace jax_bsk
