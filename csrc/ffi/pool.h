// Work of a CPU handler on XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "ffi/checks.h"

namespace jax_bsk {

inline ffi::Future Completed(const ffi::Error& error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.failure()) {
    promise.SetError(error);
  } else {
    promise.SetAvailable();
  }
  return future;
}

// Starts one worker a thread; each takes task numbers from a shared counter, so uneven rows balance by themselves.
// Workers own a copy of the parameters: an ffi::Buffer points into the call frame, which is gone when they run.
template <typename Params>
ffi::Future RunOnPool(ffi::ThreadPool pool, const Params& params, int64_t tasks,
                      bool (*run)(const Params&, std::atomic<int64_t>&) noexcept) {
  if (tasks == 0) return Completed(ffi::Error::Success());
  const int64_t workers = std::clamp<int64_t>(pool.num_threads(), 1, tasks);
  auto next = std::make_shared<std::atomic<int64_t>>(0);
  ffi::CountDownPromise done(workers);
  ffi::Future future(done);
  for (int64_t i = 0; i < workers; ++i) {
    pool.Schedule([params, next, done, run]() mutable {
      const bool ok = run(params, *next);
      done.CountDown(ok ? ffi::Error::Success()
                        : ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_bsk: no memory for a worker's scratch"));
    });
  }
  return future;
}

}  // namespace jax_bsk
