// XLA FFI handler of the decoding call on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include "decode/buffers.h"
#include "decode/cpu.h"
#include "ffi/pool.h"
#include "registrations.h"

namespace jax_bsk::decode {
namespace {

ffi::Future Forward(const ForwardBuffers& buffers, ffi::ThreadPool pool, Attributes attributes) {
  ForwardParams params{};
  ffi::Error error = ReadForward(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params));
  if (error.failure()) return Completed(error);
  cpu::Call call;
  if (!cpu::Plan(params, pool.num_threads(), &call)) {
    return Completed(ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_bsk: no memory for a decoding call's tasks"));
  }
  return RunOnPool(pool, call, cpu::TaskCount(call), &cpu::RunTasks);
}

XLA_FFI_DEFINE_HANDLER(kForward, ByName(Forward),
                       (BindCall<ForwardBuffers, Attributes>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())));

}  // namespace

Handlers Registrations() { return {{kDecodeForward, kForward}}; }

CallBuffers Buffers() { return {{kDecodeForward, NamesOf<ForwardBuffers>()}}; }

Facts BuildInfo() {
  return {{"decode_dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"decode_max_head_dim", cpu::kMaxHeadDim}};
}

}  // namespace jax_bsk::decode
