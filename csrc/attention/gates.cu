#include "attention/gates.h"

namespace jax_bsk::attention::cuda {
namespace {

constexpr int kThreads = 256;

// A thread a gate; `vectors` of four words each.
__global__ void __launch_bounds__(kThreads)
    SumGatesKernel(const float4* sums, float* dgates, int64_t gates, int vectors) {
  const int64_t gate = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (gate >= gates) return;
  float total = 0.f;
  for (int i = 0; i < vectors; ++i) {
    const float4 four = __ldg(sums + gate * vectors + i);
    total += (four.x + four.y) + (four.z + four.w);
  }
  dgates[gate] = total;
}

}  // namespace

cudaError_t ClearGateSums(const BackwardParams& params, float* sums, cudaStream_t stream) {
  const int64_t count = GateSumCount(params);
  return count == 0 ? cudaSuccess : cudaMemsetAsync(sums, 0, count * sizeof(float), stream);
}

cudaError_t LaunchSumGates(const BackwardParams& params, const float* sums, cudaStream_t stream) {
  const Shape& shape = params.shape;
  const int64_t gates = shape.batch * shape.heads * params.cols.capacity;
  if (params.dgates == nullptr || gates == 0) return cudaSuccess;
  const auto vectors = static_cast<int>(GateSumCount(params) / gates / 4);
  SumGatesKernel<<<static_cast<unsigned>((gates + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<const float4*>(sums), static_cast<float*>(params.dgates), gates, vectors);
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda
