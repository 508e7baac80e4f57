// Forward of few queries: decoding's kernel, which cuts a row's keys into parts for as many CTAs as there are, and has
// the query heads that share a key/value head in one tile. Host code, free of XLA.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"
#include "attention/workspace.h"
#include "device/host.h"

namespace jax_bsk::attention::cuda {

// Whether it takes the problem: its queries are few (FewQueries), heads share their lists, there are neither gates nor
// biases nor dropout, and the device has the shared memory that the kernel needs.
bool TakesFewQueries(const ForwardParams& params, const device::DeviceFacts& facts);

// Launches it, for params that it takes. `workspace` is ForwardWorkspace's.
cudaError_t LaunchFewQueries(const ForwardParams& params, void* workspace, const device::DeviceFacts& facts,
                             cudaStream_t stream);

}  // namespace jax_bsk::attention::cuda
