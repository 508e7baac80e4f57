// The table of the decoding kernels, and which of them a call takes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "decode/cuda/config.h"
#include "dtype.h"

namespace jax_bsk::decode::cuda {

struct Variant {
  Keys keys;
  DType dtype;
  CacheType cache;
  int dim;           // the largest head size
  int shared_bytes;  // per CTA, less a word for each sequence
  cudaError_t (*launch)(const KernelParams&, const device::DeviceFacts&, cudaStream_t);
};

// The smallest variant that takes a head size; null where there is none.
const Variant* Choose(Keys keys, DType dtype, CacheType cache, int64_t dim);

}  // namespace jax_bsk::decode::cuda
