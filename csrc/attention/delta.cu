#include <algorithm>

#include "attention/delta.h"
#include "device/element.h"
#include "device/host.h"
#include "device/ptx/convert.cuh"

namespace jax_bsk::attention::cuda {
namespace {

using device::BFloat16;
using device::CeilDiv;
using device::Float16;

constexpr int kThreads = 256;
// A group of 4 to 16 lanes sums the rows of four neighbouring queries of a head: 8 loads of 16 bytes a lane are under
// way at a time, and the results are written 16 bytes together.
constexpr int kQueries = 4, kLeastLanes = kQueries, kMostLanes = 16;

template <typename Element>
constexpr int kPerChunk = 16 / sizeof(Element);

__device__ __forceinline__ float ToFloat(float x) { return x; }
template <typename Element>
__device__ __forceinline__ float ToFloat(Element x) {
  return device::ToFloat(x);
}

// 16 bytes of a row, by one load.
template <typename Element>
class AlignedChunk {
 public:
  __device__ __forceinline__ void Load(const Element* row, int first, int) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(row + first));
    words_[0] = words.x, words_[1] = words.y, words_[2] = words.z, words_[3] = words.w;
  }
  __device__ __forceinline__ float Get(int i) const {
    if constexpr (sizeof(Element) == 4) {
      return __uint_as_float(words_[i]);
    } else {
      return device::ToFloat(Element{static_cast<uint16_t>(words_[i / 2] >> (i % 2 * 16))});
    }
  }

 private:
  uint32_t words_[4];
};

// The same by elements, for rows that are not aligned; 0 past the row's end.
template <typename Element>
class AnyChunk {
 public:
  __device__ __forceinline__ void Load(const Element* row, int first, int end) {
#pragma unroll
    for (int i = 0; i < kPerChunk<Element>; ++i) values_[i] = i < end - first ? ToFloat(row[first + i]) : 0.f;
  }
  __device__ __forceinline__ float Get(int i) const { return values_[i]; }

 private:
  float values_[kPerChunk<Element>];
};

// Lane l of a row has the chunks l, l + lanes, ..., whose products it adds one by one, and the sums of lanes are added
// in pairs: an order that depends on the head size and the type alone, whichever Chunk loads. Products and sums are
// rounded once, as fmaf says, in every variant.
template <typename Element, template <typename> class Chunk>
__global__ void __launch_bounds__(kThreads)
    DeltaKernel(const __grid_constant__ DeltaParams params, int lanes_log2, int64_t groups) {
  const auto* const dout = static_cast<const Element*>(params.dout);
  const auto* const out = static_cast<const Element*>(params.out);
  const auto* const dlse = static_cast<const float*>(params.dlse);
  const int dim = static_cast<int>(params.value_dim), lanes = 1 << lanes_log2;
  const int chunks = dim / kPerChunk<Element> + (dim % kPerChunk<Element> != 0);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int own = static_cast<int>(threadIdx.x) >> lanes_log2, groups_of_cta = kThreads >> lanes_log2;
  const auto heads = static_cast<uint64_t>(params.heads);
  const auto fours = static_cast<uint64_t>((params.q_len + kQueries - 1) / kQueries);  // of an example
  // All threads of a warp make the same number of rounds; those past the last group load and write nothing.
  for (int64_t first = int64_t{blockIdx.x} * groups_of_cta; first < groups;
       first += int64_t{gridDim.x} * groups_of_cta) {
    const auto group = static_cast<uint64_t>(first + own);
    const uint64_t four = group / heads;
    const auto head = static_cast<int64_t>(group - four * heads);
    const auto batch = static_cast<int64_t>(four / fours);
    const int64_t query = static_cast<int64_t>(four - static_cast<uint64_t>(batch) * fours) * kQueries;
    const int64_t queries = first + own < groups ? params.q_len - query : 0;  // from this one on

    float sums[kQueries] = {};
    for (int chunk = lane; chunk < chunks; chunk += lanes) {
      Chunk<Element> of_dout[kQueries], of_out[kQueries];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        // Past the last query its row is read once more, for no use.
        const int64_t t = query + (i < queries ? i : queries > 0 ? queries - 1 : 0);
        const int64_t row = queries > 0 ? (batch * params.q_len + t) * params.heads + head : 0;
        of_dout[i].Load(dout + row * dim, chunk * kPerChunk<Element>, dim);
        of_out[i].Load(out + row * dim, chunk * kPerChunk<Element>, dim);
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (int e = 0; e < kPerChunk<Element>; ++e) sums[i] = fmaf(of_dout[i].Get(e), of_out[i].Get(e), sums[i]);
      }
    }
    for (int other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], other);
    }
    // Lane i writes query i.
    float sum = sums[0];
#pragma unroll
    for (int i = 1; i < kQueries; ++i) sum = lane == i ? sums[i] : sum;
    if (lane < kQueries && lane < queries) {
      const int64_t at = (batch * params.heads + head) * params.q_len + query + lane;
      static_cast<float*>(params.delta)[at] = dlse == nullptr ? sum : sum - __ldg(dlse + at);
    }
  }
}

template <typename Element>
cudaError_t Launch(const DeltaParams& params, cudaStream_t stream) {
  const int64_t chunks = CeilDiv(params.value_dim, kPerChunk<Element>);
  int lanes_log2 = 0;
  while (1 << lanes_log2 < kLeastLanes || (1 << lanes_log2 < kMostLanes && 1 << lanes_log2 < chunks)) ++lanes_log2;
  const int64_t groups = params.batch * params.heads * CeilDiv(params.q_len, kQueries);
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(CeilDiv(groups, kThreads >> lanes_log2), device::kMaxInt));
  bool aligned = params.value_dim % kPerChunk<Element> == 0;
  for (const void* pointer : {params.dout, params.out}) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (aligned) {
    DeltaKernel<Element, AlignedChunk><<<ctas, kThreads, 0, stream>>>(params, lanes_log2, groups);
  } else {
    DeltaKernel<Element, AnyChunk><<<ctas, kThreads, 0, stream>>>(params, lanes_log2, groups);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDeltaKernel(const DeltaParams& params, cudaStream_t stream) {
  if (params.batch * params.heads * params.q_len == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kF16:
      return Launch<Float16>(params, stream);
    case DType::kBF16:
      return Launch<BFloat16>(params, stream);
    case DType::kF32:
      return Launch<float>(params, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorNotSupported;
}

}  // namespace jax_bsk::attention::cuda
