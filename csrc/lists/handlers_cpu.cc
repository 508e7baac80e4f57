// XLA FFI handlers of the list calls on the CPU: buffers -> checked parameters -> workers on XLA's thread pool.
#include "ffi/pool.h"
#include "lists/buffers.h"
#include "lists/cpu.h"
#include "registrations.h"

namespace jax_bsk::lists {
namespace {

ffi::Future Transpose(const TransposeBuffers& buffers, ffi::ThreadPool pool, TransposeAttributes attributes) {
  TransposeParams params{};
  ffi::Error error = ReadTranspose(buffers, attributes, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, params.tables, &cpu::RunTransposeTasks);
}

ffi::Future Choose(const ChooseBuffers& buffers, ffi::ThreadPool pool, ChooseAttributes attributes) {
  ChooseParams params{};
  ffi::Error error = ReadChoose(buffers, attributes, &params);
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, params.tables, &cpu::RunChooseTasks);
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER(kTranspose, ByName(Transpose), (BindCall<TransposeBuffers, TransposeAttributes>(Bind())));
XLA_FFI_DEFINE_HANDLER(kChoose, ByName(Choose), (BindCall<ChooseBuffers, ChooseAttributes>(Bind())));

}  // namespace

Handlers Registrations() { return {{kListsChoose, kChoose}, {kListsTranspose, kTranspose}}; }

CallBuffers Buffers() {
  return {{kListsChoose, NamesOf<ChooseBuffers>()}, {kListsTranspose, NamesOf<TransposeBuffers>()}};
}

Facts BuildInfo() { return {}; }

}  // namespace jax_bsk::lists
