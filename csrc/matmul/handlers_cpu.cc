// XLA FFI handlers of the block-sparse products on the CPU: buffers -> checked parameters -> workers on XLA's thread
// pool.
#include "ffi/pool.h"
#include "matmul/buffers.h"
#include "matmul/cpu.h"
#include "registrations.h"

namespace jax_bsk::matmul {
namespace {

ffi::Future ProductHandler(ffi::ThreadPool pool, Operand data, Operand offsets, Operand ids, Operand places,
                           Operand dense, Output out, int64_t rows, int64_t columns, bool transposed, bool dense_left,
                           std::string_view version) {
  ProductParams params{};
  ffi::Error error =
      ReadProduct(data, offsets, ids, places, dense, out, {rows, columns, transposed, dense_left, version}, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::ProductTasks(params), &cpu::RunProductTasks);
}

ffi::Future SampledHandler(ffi::ThreadPool pool, Operand left, Operand right, Operand row_ids, Operand column_ids,
                           Output blocks, bool left_transposed, bool right_transposed, std::string_view version) {
  SampledParams params{};
  ffi::Error error =
      ReadSampled(left, right, row_ids, column_ids, blocks, {left_transposed, right_transposed, version}, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::SampledTasks(params), &cpu::RunSampledTasks);
}

XLA_FFI_DEFINE_HANDLER(kProduct, ProductHandler, BindProductOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kSampled, SampledHandler, BindSampledOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Handlers Registrations() { return {{kMatmulProduct, kProduct}, {kMatmulSampled, kSampled}}; }

Facts BuildInfo() {
  return {{"matmul_dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"matmul_max_block", cpu::kMaxBlock}};
}

}  // namespace jax_bsk::matmul
