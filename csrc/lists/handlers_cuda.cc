// XLA FFI handlers of the list calls on CUDA: buffers -> checked parameters -> launch. They allocate nothing and launch
// the same kernels whatever the buffers hold, so XLA may record them in a CUDA graph.
#include <cuda_runtime.h>

#include "ffi/launch.h"
#include "lists/buffers.h"
#include "lists/launch.h"
#include "registrations.h"

namespace jax_bsk::lists {
namespace {

ffi::Error TransposeHandler(cudaStream_t stream, int32_t device, Operand offsets, Operand ids, Operand tiles,
                            Output col_offsets, Output row_ids, Output col_tiles, Output entries, Output places,
                            int64_t columns, std::string_view version) {
  TransposeParams params{};
  JAX_BSK_RETURN_IF_ERROR(
      ReadTranspose(offsets, ids, tiles, col_offsets, row_ids, col_tiles, entries, places, columns, version, &params));
  if (std::string reason = cuda::TransposeRefusal(params); !reason.empty()) return Refusal(reason);
  return LaunchResult("the transpose of block lists", cuda::LaunchTranspose(params, device, stream));
}

XLA_FFI_DEFINE_HANDLER(
    kTranspose, TransposeHandler,
    BindTransposeOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>()),
    {ffi::Traits::kCmdBufferCompatible});

ffi::Error ChooseHandler(cudaStream_t stream, int32_t device, Operand scores, Operand states, Operand outline,
                         Output row_offsets, Output kv_blocks, Output tiles, int64_t k, int64_t width, int64_t unit,
                         std::string_view version, Output workspace) {
  ChooseParams params{};
  JAX_BSK_RETURN_IF_ERROR(
      ReadChoose(scores, states, outline, row_offsets, kv_blocks, tiles, k, width, unit, version, &params));
  if (std::string reason = cuda::ChooseRefusal(params); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", *workspace, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("workspace", *workspace, {{cuda::ChooseWorkspace(params)}}));
  return LaunchResult("the choice of key blocks",
                      cuda::LaunchChoose(params, workspace->typed_data<int32_t>(), device, stream));
}

// Its last result is its workspace.
XLA_FFI_DEFINE_HANDLER(
    kChoose, ChooseHandler,
    BindChooseOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>())
        .Ret<Operand>(),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kListsChoose, kChoose}, {kListsTranspose, kTranspose}}; }

Facts BuildInfo() {
  return {{"lists_max_units", cuda::Limits::kMaxUnits}, {"lists_max_words", cuda::Limits::kMaxWords}};
}

}  // namespace jax_bsk::lists
