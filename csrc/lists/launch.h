// Host interface of the CUDA kernels of block lists, free of XLA: what they can take, and how to launch them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "lists/params.h"
#include "lists/workspace.h"

namespace jax_bsk::lists::cuda {

// For build_info(): a table's offsets and counters, and the groups that a row chooses from, are kept in shared memory,
// of which every device since sm_80 gives a CTA this much.
struct Limits {
  static constexpr int64_t kMaxWords = 24000;  // rows + 4 columns + 3
  static constexpr int64_t kMaxGroups = 24000;
};

// Why the kernels cannot take this problem, in one sentence; empty when they can.
std::string TransposeRefusal(const TransposeParams& params);

// Launches on a stream of `device`, for params that are not refused; nothing is allocated and nothing waits.
cudaError_t LaunchTranspose(const TransposeParams& params, int device, cudaStream_t stream);

// The same for the choice of key blocks.
std::string ChooseRefusal(const ChooseParams& params);

// As LaunchTranspose; `workspace` is ChooseWorkspace(params) words of device memory.
cudaError_t LaunchChoose(const ChooseParams& params, int32_t* workspace, int device, cudaStream_t stream);

}  // namespace jax_bsk::lists::cuda
