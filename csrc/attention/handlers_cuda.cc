// XLA FFI handlers of the attention calls on CUDA: buffers -> checked parameters -> launch. They allocate nothing and
// launch the same kernels whatever the buffers hold, so XLA may record them in a CUDA graph (kCmdBufferCompatible: 0.9
// us against 3.8 us a call in one jit, measured on an H200 with an empty kernel).
#include <cuda_runtime.h>

#include "attention/buffers.h"
#include "attention/launch.h"
#include "ffi/launch.h"
#include "registrations.h"

namespace jax_bsk::attention {
namespace {

ffi::Error ForwardHandler(cudaStream_t stream, int32_t device, Operand query, Operand key, Operand value,
                          Operand row_offsets, Operand kv_blocks, Operand tiles, Operand bit_tiles, Operand lengths,
                          Operand sinks, Operand gates, Output out, Output lse, Output lse_rest, int64_t block_q,
                          int64_t block_kv, double scale, double soft_cap, std::string_view version, Output workspace) {
  ForwardParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadForward(query, key, value, {row_offsets, kv_blocks, tiles}, bit_tiles, lengths, sinks,
                                      gates, out, lse, lse_rest, {block_q, block_kv, scale, soft_cap, version},
                                      &params));
  if (std::string reason = cuda::ForwardRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", *workspace, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("workspace", *workspace, {{cuda::ForwardWorkspace(params.shape)}}));
  return LaunchResult("the forward", cuda::LaunchForward(params, workspace->typed_data<int32_t>(), device, stream));
}

ffi::Error BackwardHandler(cudaStream_t stream, int32_t device, Operand dout, Operand query, Operand key, Operand value,
                           Operand lse, Operand lse_rest, Operand delta, Operand row_offsets, Operand kv_blocks,
                           Operand tiles, Operand col_offsets, Operand q_blocks, Operand col_tiles, Operand bit_tiles,
                           Operand lengths, Operand row_gates, Operand col_gates, Output dquery, Output dkey,
                           Output dvalue, Output dgates, int64_t block_q, int64_t block_kv, double scale,
                           double soft_cap, std::string_view version, Output workspace) {
  BackwardParams params{};
  JAX_BSK_RETURN_IF_ERROR(ReadBackward(dout, query, key, value, lse, lse_rest, delta, {row_offsets, kv_blocks, tiles},
                                       {col_offsets, q_blocks, col_tiles}, bit_tiles, lengths, row_gates, col_gates,
                                       dquery, dkey, dvalue, dgates, {block_q, block_kv, scale, soft_cap, version},
                                       &params));
  if (std::string reason = cuda::BackwardRefusal(params, device); !reason.empty()) return Refusal(reason);
  JAX_BSK_RETURN_IF_ERROR(CheckType("workspace", *workspace, ffi::U8));
  const auto bytes = static_cast<int64_t>(workspace->size_bytes());
  if (const int64_t least = cuda::BackwardWorkspace(params); bytes < least) {
    return ffi::Error::InvalidArgument("jax_bsk: workspace has " + std::to_string(bytes) + " bytes, and at least " +
                                       std::to_string(least) + " are needed");
  }
  return LaunchResult("the backward", cuda::LaunchBackward(params, workspace->untyped_data(), bytes, device, stream));
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>(); }

// Both have one result of their own, after those of every platform: their workspace.
XLA_FFI_DEFINE_HANDLER(kForward, ForwardHandler, BindForwardOperands(Bind()).Ret<Operand>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kBackward, BackwardHandler, BindBackwardOperands(Bind()).Ret<Operand>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Handlers Registrations() { return {{kAttentionForward, kForward}, {kAttentionBackward, kBackward}}; }

Facts BuildInfo() {
  Facts facts = CudaLimits();
  facts["architectures"] = std::string(JAX_BSK_CUDA_ARCHITECTURES);
  return facts;
}

}  // namespace jax_bsk::attention
