// XLA FFI handlers of the list calls on CUDA: buffers -> checked parameters -> launch. They allocate nothing and launch
// the same kernels whatever the buffers hold, so XLA may record them in a CUDA graph.
#include <cuda_runtime.h>

#include "ffi/launch.h"
#include "lists/buffers.h"
#include "lists/launch.h"
#include "registrations.h"

namespace jax_bsk::lists {
namespace {

ffi::Error Transpose(const TransposeBuffers& buffers, cudaStream_t stream, int32_t device,
                     TransposeAttributes attributes) {
  TransposeParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadTranspose(buffers, attributes, &params));
  if (std::string reason = cuda::TransposeRefusal(params); !reason.empty()) return Refusal(reason);
  return LaunchResult("the transpose of block lists", cuda::LaunchTranspose(params, device, stream));
}

ffi::Error Choose(const WithWorkspace<ChooseBuffers>& call, cudaStream_t stream, int32_t device,
                  ChooseAttributes attributes) {
  ChooseParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadChoose(call.buffers, attributes, &params));
  if (std::string reason = cuda::ChooseRefusal(params); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", call.workspace, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("workspace", call.workspace, {{cuda::ChooseWorkspace(params)}}));
  return LaunchResult("the choice of key blocks",
                      cuda::LaunchChoose(params, call.workspace.typed_data<int32_t>(), device, stream));
}

XLA_FFI_DEFINE_HANDLER(kTranspose, ByName(Transpose),
                       (BindCall<TransposeBuffers, TransposeAttributes>(BindCudaContext())),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kChoose, ByName(Choose), (BindCudaCall<ChooseBuffers, ChooseAttributes>()),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kListsChoose, kChoose}, {kListsTranspose, kTranspose}}; }

CallBuffers Buffers() {
  return {{kListsChoose, NamesOf<ChooseBuffers>(true)}, {kListsTranspose, NamesOf<TransposeBuffers>()}};
}

Facts BuildInfo() {
  return {{"lists_max_groups", cuda::Limits::kMaxGroups}, {"lists_max_words", cuda::Limits::kMaxWords}};
}

}  // namespace jax_bsk::lists
