// Backward attention over block lists, sm_80 and newer, in two kernels without atomics, so that results are bit-equal
// from run to run: dQ walks the query-major list, dK and dV walk the key-major one. With x = scale q.k and
//   P = exp(cap(x) - lse),  dP = dO V^T,  dS = P (gate dP - delta) cap'(x):
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = gate P^T dO,  dgate = the sum of P o dP.
#pragma once

#include "attention/sm80/bwd_key.cuh"
#include "attention/sm80/bwd_query.cuh"
#include "attention/sm80/config.h"
#include "device/ptx/thread.cuh"

namespace jax_bsk::attention::cuda::sm80 {

// The tiles of a launch: all of them, one a CTA; or those of a list of marks, of which each CTA looks at `span`.
struct Selection {
  const int32_t* marks;  // null: all; else [tiles], not 0 = to be done
  int tiles;
  int span;  // 1 without marks
};

// Calls work(tile) for the selected tiles of this CTA. `next` is a word of shared memory: the loop's state, which would
// cost the work registers that it does not have.
template <typename Work>
__device__ __forceinline__ void ForSelected(const Selection& selection, int threads, int& next, Work work) {
#if __CUDA_ARCH__ < 900
  work(static_cast<int>(blockIdx.x));  // only Hopper's kernels mark tiles, and the loop would spill here
#else
  const int first = static_cast<int>(blockIdx.x) * selection.span;
  if (selection.marks != nullptr) {
    const int last = min(first + selection.span, selection.tiles);
    bool any = false;
    for (int tile = first + static_cast<int>(threadIdx.x); tile < last; tile += threads) {
      any |= selection.marks[tile] != 0;
    }
    if (!__syncthreads_or(any)) return;
  }
  if (device::ThreadHere() == 0) next = first - 1;
  while (true) {
    if (device::ThreadHere() == 0) {
      const int end = min(static_cast<int>(blockIdx.x + 1) * selection.span, selection.tiles);
      do ++next;
      while (next < end && selection.marks != nullptr && selection.marks[next] == 0);
      if (next == end) next = -1;
    }
    __syncthreads();
    const int tile = next;
    if (tile < 0) return;
    work(tile);
    __syncthreads();
  }
#endif
}

template <typename Config>
__global__ void __launch_bounds__(Config::kQueryThreads, 2)
    QueryGradientKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ Selection selection) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<QueryShared<Config>*>(shared_bytes);
  ForSelected(selection, Config::kQueryThreads, shared.next_tile,
              [&](int tile) { QueryGradientTile<Config>(shared, params, tile); });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kKeyThreads, 256 / Config::kKeyThreads)
    KeyGradientKernel(const __grid_constant__ BackwardParams params, const __grid_constant__ Selection selection,
                      float* gate_sums) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<KeyShared<Config>*>(shared_bytes);
  ForSelected(selection, Config::kKeyThreads, shared.next_tile,
              [&](int tile) { KeyGradientTile<Config>(shared, params, gate_sums, tile); });
}

template <typename Config>
cudaError_t LaunchBackward(const BackwardParams& params, const BackwardMarks& marks, float* gate_sums,
                           cudaStream_t stream) {
  constexpr int kQueryBytes = static_cast<int>(sizeof(QueryShared<Config>));
  constexpr int kKeyBytes = static_cast<int>(sizeof(KeyShared<Config>));
  static_assert(kQueryBytes <= BackwardSharedBytes<Config>() && kKeyBytes <= BackwardSharedBytes<Config>());
  const Shape& shape = params.shape;
  const auto launch = [&](auto kernel, int threads, int bytes, int64_t length, int64_t heads, const int32_t* marked,
                          auto... more) -> cudaError_t {
    const int tiles = static_cast<int>((length + kTile - 1) / kTile * heads * shape.batch);
    if (tiles == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const int span = marked == nullptr ? 1 : (tiles + marks.ctas - 1) / marks.ctas;
    kernel<<<(tiles + span - 1) / span, threads, bytes, stream>>>(params, Selection{marked, tiles, span}, more...);
    return cudaGetLastError();
  };
  const cudaError_t error =
      launch(QueryGradientKernel<Config>, Config::kQueryThreads, kQueryBytes, shape.q_len, shape.heads, marks.queries);
  if (error != cudaSuccess) return error;
  return launch(KeyGradientKernel<Config>, Config::kKeyThreads, kKeyBytes, shape.kv_len, shape.kv_heads, marks.keys,
                gate_sums);
}

}  // namespace jax_bsk::attention::cuda::sm80
