// XLA FFI handler of the decoding call on CUDA: buffers -> checked parameters -> launch. It allocates nothing and
// launches the same kernels whatever the buffers hold, so XLA may record it in a CUDA graph.
#include <cuda_runtime.h>

#include "decode/buffers.h"
#include "decode/launch.h"
#include "ffi/launch.h"
#include "registrations.h"

namespace jax_bsk::decode {
namespace {

ffi::Error Forward(const WithWorkspace<ForwardBuffers>& call, cudaStream_t stream, int32_t device,
                   Attributes attributes) {
  ForwardParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadForward(call.buffers, attributes, &params));
  if (std::string reason = cuda::ForwardRefusal(params, device); !reason.empty()) return Refusal(reason);
  const PartialLayout layout(params.shape, params.short_part, params.long_part);
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", call.workspace, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("workspace", call.workspace, {{layout.bytes / 4}}));
  return LaunchResult("decoding", cuda::LaunchForward(params, call.workspace.untyped_data(), device, stream));
}

XLA_FFI_DEFINE_HANDLER(kForward, ByName(Forward), (BindCudaCall<ForwardBuffers, Attributes>()),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kDecodeForward, kForward}}; }

CallBuffers Buffers() { return {{kDecodeForward, NamesOf<ForwardBuffers>(true)}}; }

Facts BuildInfo() { return CudaLimits(); }

}  // namespace jax_bsk::decode
