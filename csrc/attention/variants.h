// The table of the attention kernels, and which of them a call takes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/launch.h"
#include "attention/params.h"
#include "attention/sm80/config.h"
#include "attention/sm90/bwd_plan.h"
#include "attention/variant.h"
#include "device/host.h"

namespace jax_bsk::attention::cuda {

enum class Target { kPortable, kHopper };  // namespaces sm80 and sm90

// What the launchers take besides params. A kernel reads what its config.h says of these.
struct ForwardResources {
  int32_t* workspace;
  int multiprocessors;
  cudaStream_t stream;
};
struct BackwardResources {
  const sm90::BackwardLayout& layout;
  int32_t* workspace;
  sm80::BackwardMarks marks;
  int multiprocessors;
  cudaStream_t stream;
};

template <typename Params, typename Resources>
struct Variant {
  Target target;
  DType dtype;
  int dim;  // the largest head size
  Tile tile;
  Features features;
  int shared_bytes;  // dynamic shared memory per block
  cudaError_t (*launch)(const Params&, const Resources&);
};
using ForwardVariant = Variant<ForwardParams, ForwardResources>;
using BackwardVariant = Variant<BackwardParams, BackwardResources>;

// The kernel for a call that names one, or leaves the choice to speed (kAutomatic). Where that kernel has no variant
// with a call's features, it is the portable one. Null where there is no variant at all.
const ForwardVariant* Choose(const ForwardParams& params, const device::DeviceFacts& facts, ForwardKernel kernel);
const BackwardVariant* Choose(const BackwardParams& params, const device::DeviceFacts& facts, BackwardKernel kernel);

inline bool HasGates(const ForwardParams& params) { return params.gates != nullptr; }
inline bool HasGates(const BackwardParams& params) { return params.dgates != nullptr; }
template <typename Params>
bool HasExtras(const Params& params) {  // as attention/variant.h has the word
  return HasBias(params.bias) || Drops(params.dropout);
}

}  // namespace jax_bsk::attention::cuda
