// XLA FFI handlers of the block-sparse products on CUDA: buffers -> checked parameters -> launch. They allocate nothing
// and launch the same kernels whatever the buffers hold, so XLA may record them in a CUDA graph.
#include <cuda_runtime.h>

#include "ffi/launch.h"
#include "matmul/buffers.h"
#include "matmul/launch.h"
#include "registrations.h"

namespace jax_bsk::matmul {
namespace {

ffi::Error CheckWorkspace(Output& workspace, int64_t words) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", *workspace, ffi::S32));
  if (const auto given = static_cast<int64_t>(workspace->element_count()); given < words) {
    return ffi::Error::InvalidArgument("jax_bsk: workspace has " + std::to_string(given) + " words, and at least " +
                                       std::to_string(words) + " are needed");
  }
  return ffi::Error::Success();
}

ffi::Error ProductHandler(cudaStream_t stream, int32_t device, Operand data, Operand offsets, Operand ids,
                          Operand places, Operand dense, Output out, int64_t rows, int64_t columns, bool transposed,
                          bool dense_left, std::string_view version, Output workspace) {
  ProductParams params{};
  JAX_BSK_RETURN_IF_ERROR(
      ReadProduct(data, offsets, ids, places, dense, out, {rows, columns, transposed, dense_left, version}, &params));
  if (std::string reason = cuda::ProductRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckWorkspace(workspace, cuda::ProductWorkspace(params)));
  return LaunchResult("the product", cuda::LaunchProduct(params, workspace->typed_data<int32_t>(), device, stream));
}

ffi::Error SampledHandler(cudaStream_t stream, int32_t device, Operand left, Operand right, Operand row_ids,
                          Operand column_ids, Output blocks, bool left_transposed, bool right_transposed,
                          std::string_view version, Output workspace) {
  SampledParams params{};
  JAX_BSK_RETURN_IF_ERROR(
      ReadSampled(left, right, row_ids, column_ids, blocks, {left_transposed, right_transposed, version}, &params));
  if (std::string reason = cuda::SampledRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckWorkspace(workspace, cuda::SampledWorkspace(params)));
  return LaunchResult("the sampled product",
                      cuda::LaunchSampled(params, workspace->typed_data<int32_t>(), device, stream));
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>(); }

// Both have one result of their own, after those of every platform: their workspace.
XLA_FFI_DEFINE_HANDLER(kProduct, ProductHandler, BindProductOperands(Bind()).Ret<Operand>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kSampled, SampledHandler, BindSampledOperands(Bind()).Ret<Operand>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kMatmulProduct, kProduct}, {kMatmulSampled, kSampled}}; }

Facts BuildInfo() { return CudaLimits(); }

}  // namespace jax_bsk::matmul
