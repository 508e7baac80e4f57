// A native library's offer to Python: it is filled by the handlers of its operations, put together by registrations.cc,
// read by bindings.cc.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_bsk {

// Names of the custom calls, on every platform; the ffi.py of each operation has them too, and jax_bsk/core/library.py
// compares when it loads a library.
inline constexpr const char* kAttentionForward = "jax_bsk_attention_forward";
inline constexpr const char* kAttentionBackward = "jax_bsk_attention_backward";
inline constexpr const char* kAttentionDelta = "jax_bsk_attention_delta";
inline constexpr const char* kAttentionBiasGradient = "jax_bsk_attention_bias_gradient";
inline constexpr const char* kDecodeForward = "jax_bsk_decode_forward";
inline constexpr const char* kListsChoose = "jax_bsk_lists_choose";
inline constexpr const char* kListsTranspose = "jax_bsk_lists_transpose";
inline constexpr const char* kMatmulProduct = "jax_bsk_matmul_product";
inline constexpr const char* kMatmulSampled = "jax_bsk_matmul_sampled";

// Custom-call target -> handler.
using Handlers = std::map<std::string, XLA_FFI_Handler*>;

// The names of a call's buffers: "operands" and "results" in their order, and which of these are "optional".
using BufferNames = std::map<std::string, std::vector<std::string>>;
// Custom-call target -> its buffers.
using CallBuffers = std::map<std::string, BufferNames>;

// Facts of the build that Python must know: versions, architectures and kernel limits have no second copy there.
using Fact = std::variant<int64_t, std::string, std::vector<int64_t>, std::vector<std::string>>;
using Facts = std::map<std::string, Fact>;

namespace attention {
Handlers Registrations();
CallBuffers Buffers();
Facts BuildInfo();
Facts CudaLimits();  // what the CUDA kernels can take, in every library
}  // namespace attention

namespace decode {
Handlers Registrations();
CallBuffers Buffers();
Facts BuildInfo();  // names begin with "decode_"
Facts CudaLimits();
}  // namespace decode

namespace lists {
Handlers Registrations();
CallBuffers Buffers();
Facts BuildInfo();  // names begin with "lists_"
}  // namespace lists

namespace matmul {
Handlers Registrations();
CallBuffers Buffers();
Facts BuildInfo();  // names begin with "matmul_"
Facts CudaLimits();
}  // namespace matmul

// The same for all operations together.
Handlers Registrations();
CallBuffers Buffers();
Facts BuildInfo();  // those whose names begin with "cuda_" are the CUDA kernels' limits

}  // namespace jax_bsk
