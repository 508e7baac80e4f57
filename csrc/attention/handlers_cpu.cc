// XLA FFI handlers of the attention calls on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include <algorithm>
#include <atomic>
#include <memory>

#include "attention/buffers.h"
#include "attention/cpu.h"
#include "registrations.h"

namespace jax_bsk::attention {
namespace {

ffi::Future Completed(const ffi::Error& error) {
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

ffi::Future ForwardHandler(ffi::ThreadPool pool, Operand query, Operand key, Operand value, Operand row_offsets,
                           Operand kv_blocks, Operand tiles, Operand bit_tiles, Operand lengths, Operand sinks,
                           Output out, Output lse, int64_t block_q, int64_t block_kv, float scale, float soft_cap,
                           std::string_view version) {
  ForwardParams params{};
  ffi::Error error = ReadForward(query, key, value, {row_offsets, kv_blocks, tiles}, bit_tiles, lengths, sinks, out,
                                 lse, {block_q, block_kv, scale, soft_cap, version}, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::ForwardTasks(params), &cpu::RunForwardTasks);
}

ffi::Future BackwardHandler(ffi::ThreadPool pool, Operand dout, Operand query, Operand key, Operand value, Operand lse,
                            Operand delta, Operand row_offsets, Operand kv_blocks, Operand tiles, Operand col_offsets,
                            Operand q_blocks, Operand col_tiles, Operand bit_tiles, Operand lengths, Output dquery,
                            Output dkey, Output dvalue, int64_t block_q, int64_t block_kv, float scale, float soft_cap,
                            std::string_view version) {
  BackwardParams params{};
  ffi::Error error = ReadBackward(dout, query, key, value, lse, delta, {row_offsets, kv_blocks, tiles},
                                  {col_offsets, q_blocks, col_tiles}, bit_tiles, lengths, dquery, dkey, dvalue,
                                  {block_q, block_kv, scale, soft_cap, version}, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::BackwardTasks(params), &cpu::RunBackwardTasks);
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardHandler, BindForwardOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardHandler, BindBackwardOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace
}  // namespace jax_bsk::attention

namespace jax_bsk {

std::map<std::string, XLA_FFI_Handler*> Registrations() {
  return {{kAttentionForward, attention::kForward}, {kAttentionBackward, attention::kBackward}};
}

std::map<std::string, Fact> BuildInfo() {
  return {{"instruction_set", std::string(attention::cpu::InstructionSet())},
          {"dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"max_head_dim", attention::cpu::kMaxHeadDim},
          {"max_block", attention::cpu::kMaxBlock}};
}

}  // namespace jax_bsk
