// XLA FFI handlers of the attention calls on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include "attention/buffers.h"
#include "attention/cpu.h"
#include "ffi/pool.h"
#include "registrations.h"

namespace jax_bsk::attention {
namespace {

ffi::Future Forward(const ForwardBuffers& buffers, ffi::ThreadPool pool, Attributes attributes) {
  ForwardParams params{};
  ffi::Error error = ReadForward(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params.shape));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::ForwardTasks(params), &cpu::RunForwardTasks);
}

ffi::Future Delta(const DeltaBuffers& buffers, ffi::ThreadPool pool, DeltaAttributes attributes) {
  DeltaParams params{};
  if (ffi::Error error = ReadDelta(buffers, attributes, &params); error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::DeltaTasks(params), &cpu::RunDeltaTasks);
}

ffi::Future Backward(const BackwardBuffers& buffers, ffi::ThreadPool pool, Attributes attributes) {
  BackwardParams params{};
  ffi::Error error = ReadBackward(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params.shape));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::BackwardTasks(params), &cpu::RunBackwardTasks);
}

ffi::Future BiasGradient(const BiasGradientBuffers& buffers, ffi::ThreadPool pool, BiasGradientAttributes attributes) {
  BiasGradientParams params{};
  ffi::Error error = ReadBiasGradient(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params.shape));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::BiasGradientTasks(params), &cpu::RunBiasGradientTasks);
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER(kForward, ByName(Forward), (BindCall<ForwardBuffers, Attributes>(Bind())));
XLA_FFI_DEFINE_HANDLER(kDelta, ByName(Delta), (BindCall<DeltaBuffers, DeltaAttributes>(Bind())));
XLA_FFI_DEFINE_HANDLER(kBackward, ByName(Backward), (BindCall<BackwardBuffers, Attributes>(Bind())));
XLA_FFI_DEFINE_HANDLER(kBiasGradient, ByName(BiasGradient),
                       (BindCall<BiasGradientBuffers, BiasGradientAttributes>(Bind())));

}  // namespace

Handlers Registrations() {
  return {{kAttentionForward, kForward},
          {kAttentionDelta, kDelta},
          {kAttentionBackward, kBackward},
          {kAttentionBiasGradient, kBiasGradient}};
}

CallBuffers Buffers() {
  return {{kAttentionForward, NamesOf<ForwardBuffers>()},
          {kAttentionDelta, NamesOf<DeltaBuffers>()},
          {kAttentionBackward, NamesOf<BackwardBuffers>()},
          {kAttentionBiasGradient, NamesOf<BiasGradientBuffers>()}};
}

Facts BuildInfo() {
  return {{"instruction_set", std::string(cpu::InstructionSet())},
          {"dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"max_head_dim", cpu::kMaxHeadDim},
          {"max_block", cpu::kMaxBlock}};
}

}  // namespace jax_bsk::attention
