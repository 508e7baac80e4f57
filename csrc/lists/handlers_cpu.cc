// XLA FFI handlers of the list calls on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include "ffi/pool.h"
#include "lists/buffers.h"
#include "lists/cpu.h"
#include "registrations.h"

namespace jax_bsk::lists {
namespace {

ffi::Future TransposeHandler(ffi::ThreadPool pool, Operand offsets, Operand ids, Operand tiles, Output col_offsets,
                             Output row_ids, Output col_tiles, Output entries, Output places, int64_t columns,
                             std::string_view version) {
  TransposeParams params{};
  ffi::Error error =
      ReadTranspose(offsets, ids, tiles, col_offsets, row_ids, col_tiles, entries, places, columns, version, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, params.tables, &cpu::RunTransposeTasks);
}

XLA_FFI_DEFINE_HANDLER(kTranspose, TransposeHandler, BindTransposeOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

ffi::Future ChooseHandler(ffi::ThreadPool pool, Operand scores, Operand states, Operand outline, Output row_offsets,
                          Output kv_blocks, Output tiles, int64_t k, int64_t width, int64_t unit,
                          std::string_view version) {
  ChooseParams params{};
  ffi::Error error =
      ReadChoose(scores, states, outline, row_offsets, kv_blocks, tiles, k, width, unit, version, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, params.tables, &cpu::RunChooseTasks);
}

XLA_FFI_DEFINE_HANDLER(kChoose, ChooseHandler, BindChooseOperands(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Handlers Registrations() { return {{kListsChoose, kChoose}, {kListsTranspose, kTranspose}}; }

Facts BuildInfo() { return {}; }

}  // namespace jax_bsk::lists
