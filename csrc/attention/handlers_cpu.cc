// XLA FFI handlers of the attention calls on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include "attention/buffers.h"
#include "attention/cpu.h"
#include "ffi/pool.h"
#include "registrations.h"

namespace jax_bsk::attention {
namespace {

ffi::Future ForwardHandler(ffi::ThreadPool pool, Operand query, Operand key, Operand value, Operand row_offsets,
                           Operand kv_blocks, Operand tiles, Operand bit_tiles, Operand lengths, Operand sinks,
                           Operand gates, Output out, Output lse, Output lse_rest, int64_t block_q, int64_t block_kv,
                           double scale, double soft_cap, std::string_view version) {
  ForwardParams params{};
  ffi::Error error = ReadForward(query, key, value, {row_offsets, kv_blocks, tiles}, bit_tiles, lengths, sinks, gates,
                                 out, lse, lse_rest, {block_q, block_kv, scale, soft_cap, version}, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params.shape));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::ForwardTasks(params), &cpu::RunForwardTasks);
}

ffi::Future BackwardHandler(ffi::ThreadPool pool, Operand dout, Operand query, Operand key, Operand value, Operand lse,
                            Operand lse_rest, Operand delta, Operand row_offsets, Operand kv_blocks, Operand tiles,
                            Operand col_offsets, Operand q_blocks, Operand col_tiles, Operand bit_tiles,
                            Operand lengths, Operand row_gates, Operand col_gates, Output dquery, Output dkey,
                            Output dvalue, Output dgates, int64_t block_q, int64_t block_kv, double scale,
                            double soft_cap, std::string_view version) {
  BackwardParams params{};
  ffi::Error error = ReadBackward(dout, query, key, value, lse, lse_rest, delta, {row_offsets, kv_blocks, tiles},
                                  {col_offsets, q_blocks, col_tiles}, bit_tiles, lengths, row_gates, col_gates, dquery,
                                  dkey, dvalue, dgates, {block_q, block_kv, scale, soft_cap, version}, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params.shape));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::BackwardTasks(params), &cpu::RunBackwardTasks);
}

XLA_FFI_DEFINE_HANDLER(kForward, ForwardHandler, BindForwardOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardHandler, BindBackwardOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Handlers Registrations() { return {{kAttentionForward, kForward}, {kAttentionBackward, kBackward}}; }

Facts BuildInfo() {
  return {{"instruction_set", std::string(cpu::InstructionSet())},
          {"dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"max_head_dim", cpu::kMaxHeadDim},
          {"max_block", cpu::kMaxBlock}};
}

}  // namespace jax_bsk::attention
