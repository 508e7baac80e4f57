#include "attention/gates.h"
#include "attention/softmax.cuh"
#include "device/numbers.cuh"
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda {
namespace {

constexpr int kThreads = 256;

// How many columns have an entry of a table.
__device__ int CountOwners(const BlockList& cols, int64_t table, int entry) {
  int owners = 0;
  for (int col = 0; col < cols.rows; ++col) {
    const lists::ListRow row = lists::FindRow(cols, table, col);
    const int64_t at = table * cols.capacity + entry - row.begin;
    owners += at >= 0 && at < row.length;
  }
  return owners;
}

// A thread a gate; `vectors` of four words each. What two columns have, both have written, in any order: NaN. Columns
// have entries in common only where offsets decrease, so that honest lists cost no more than a look at their offsets.
__global__ void __launch_bounds__(kThreads)
    SumGatesKernel(const __grid_constant__ BackwardParams params, const float4* sums, int64_t gates, int vectors) {
  const BlockList& cols = params.cols;
  const int heads = static_cast<int>(params.shape.heads);
  const int64_t first = blockIdx.x * int64_t{kThreads}, last = min(first + kThreads, gates) - 1;
  const auto table_of = [&](int64_t row) {  // of a (batch, head)
    return lists::TableIndex(cols.batch, cols.heads, static_cast<int>(row / heads), static_cast<int>(row % heads));
  };
  bool in_order = true;
  for (int64_t row = first / cols.capacity; row <= last / cols.capacity; ++row) {
    in_order &= lists::InOrder<kThreads>(cols, table_of(row));
  }
  const bool exclusive = !__syncthreads_or(!in_order);

  const int64_t gate = first + threadIdx.x;
  if (gate >= gates) return;
  float total = 0.f;
  for (int i = 0; i < vectors; ++i) {
    const float4 four = __ldg(sums + gate * vectors + i);
    total += (four.x + four.y) + (four.z + four.w);
  }
  if (!exclusive && CountOwners(cols, table_of(gate / cols.capacity), static_cast<int>(gate % cols.capacity)) > 1) {
    total = device::QuietNan();
  }
  static_cast<float*>(params.dgates)[gate] = total;
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
      params, reinterpret_cast<const float4*>(sums), gates, vectors);
  return cudaGetLastError();
}

bool HoldsCodeForDevice() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, SumGatesKernel) == cudaSuccess) return true;
  cudaGetLastError();  // not an error of the caller's
  return false;
}

}  // namespace jax_bsk::attention::cuda
