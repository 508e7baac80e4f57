// Sizes of workspaces for Python, which allocates them as results of the CUDA calls.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace jax_bsk {

// Bytes of the workspace of a CUDA call for sizes given by name (workspace.cc says which); 0 for calls without one.
// Throws std::invalid_argument where a size is missing or superfluous.
int64_t WorkspaceBytes(const std::string& target, const std::map<std::string, int64_t>& sizes);

}  // namespace jax_bsk
