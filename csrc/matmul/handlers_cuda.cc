// XLA FFI handlers of the block-sparse products on CUDA: buffers -> checked parameters -> launch. They allocate nothing
// and launch the same kernels whatever the buffers hold, so XLA may record them in a CUDA graph.
#include <cuda_runtime.h>

#include "ffi/launch.h"
#include "matmul/buffers.h"
#include "matmul/launch.h"
#include "registrations.h"

namespace jax_bsk::matmul {
namespace {

ffi::Error CheckWorkspace(const Operand& workspace, int64_t words) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", workspace, ffi::S32));
  if (const auto given = static_cast<int64_t>(workspace.element_count()); given < words) {
    return ffi::Error::InvalidArgument("jax_bsk: workspace has " + std::to_string(given) + " words, and at least " +
                                       std::to_string(words) + " are needed");
  }
  return ffi::Error::Success();
}

ffi::Error Product(const WithWorkspace<ProductBuffers>& call, cudaStream_t stream, int32_t device,
                   ProductAttributes attributes) {
  ProductParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadProduct(call.buffers, attributes, &params));
  if (std::string reason = cuda::ProductRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckWorkspace(call.workspace, cuda::ProductWorkspace(params)));
  return LaunchResult("the product", cuda::LaunchProduct(params, call.workspace.typed_data<int32_t>(), device, stream));
}

ffi::Error Sampled(const WithWorkspace<SampledBuffers>& call, cudaStream_t stream, int32_t device,
                   SampledAttributes attributes) {
  SampledParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadSampled(call.buffers, attributes, &params));
  if (std::string reason = cuda::SampledRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckWorkspace(call.workspace, cuda::SampledWorkspace(params)));
  return LaunchResult("the sampled product",
                      cuda::LaunchSampled(params, call.workspace.typed_data<int32_t>(), device, stream));
}

XLA_FFI_DEFINE_HANDLER(kProduct, ByName(Product), (BindCudaCall<ProductBuffers, ProductAttributes>()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kSampled, ByName(Sampled), (BindCudaCall<SampledBuffers, SampledAttributes>()),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kMatmulProduct, kProduct}, {kMatmulSampled, kSampled}}; }

CallBuffers Buffers() {
  return {{kMatmulProduct, NamesOf<ProductBuffers>(true)}, {kMatmulSampled, NamesOf<SampledBuffers>(true)}};
}

Facts BuildInfo() { return CudaLimits(); }

}  // namespace jax_bsk::matmul
