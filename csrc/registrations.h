// What a native library offers to Python: filled by its handlers, read by bindings.cc.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_bsk {

// Names of the custom calls, on every platform; jax_bsk/_ffi.py has them too and compares when it loads a library.
inline constexpr const char* kAttentionForward = "jax_bsk_attention_forward";
inline constexpr const char* kAttentionBackward = "jax_bsk_attention_backward";

// Custom-call target -> handler.
std::map<std::string, XLA_FFI_Handler*> Registrations();

// Facts of the build that Python must know: versions, architectures and kernel limits have no second copy there.
using Fact = std::variant<int64_t, std::string, std::vector<int64_t>, std::vector<std::string>>;
std::map<std::string, Fact> BuildInfo();

}  // namespace jax_bsk
