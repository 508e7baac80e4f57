#include "attention/few_queries.h"

#include <algorithm>

#include "decode/cuda_limits.h"
#include "decode/variants.h"
#include "device/divisor.h"

namespace jax_bsk::attention::cuda {
namespace {

using decode::cuda::KernelParams;
using decode::cuda::Keys;
using decode::cuda::Variant;
using device::Divisor;

const Variant* Choose(const ForwardParams& params) {
  return decode::cuda::Choose(Keys::kListed, params.dtype, decode::CacheType::kSame,
                              std::max(params.shape.head_dim, params.shape.value_dim));
}

// As decode/cuda/config.h has them: an example is a group of one sequence, whose keys are one page.
KernelParams ForKernels(const ForwardParams& params, char* workspace) {
  const Shape& shape = params.shape;
  const auto number = [](int64_t size) { return static_cast<int>(size); };
  const FewQueriesLayout layout(shape);
  KernelParams result{};
  result.shape = {
      shape.batch, shape.q_len, shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim, 1, 1, shape.kv_len, 1, 0};
  result.dtype = params.dtype;
  result.query = params.query;
  result.key = {params.key, shape.kv_heads * shape.head_dim, shape.head_dim};
  result.value = {params.value, shape.kv_heads * shape.value_dim, shape.value_dim};
  result.sinks = static_cast<const float*>(params.sinks);
  result.sink_group_stride = params.sinks_batch == 1 ? 0 : number(params.sinks_heads);
  result.sink_head_stride = params.sinks_heads == 1 ? 0 : 1;
  result.scale = params.scale, result.soft_cap = params.soft_cap, result.value_scale = 1.f;
  result.out = params.out;
  result.lse = static_cast<float*>(params.lse), result.lse_rest = static_cast<float*>(params.lse_rest);
  result.tokens = number(shape.q_len), result.seqs = 1, result.sequences = number(shape.batch);
  result.pages = 1, result.max_pages = 1;
  result.kv_heads = number(shape.kv_heads), result.group_heads = number(shape.heads / shape.kv_heads);
  result.dim = number(shape.head_dim), result.value_dim = number(shape.value_dim);
  result.partial_dim = number(layout.dim);
  result.by_seqs = Divisor(1), result.by_page_size = Divisor(std::max<int64_t>(shape.kv_len, 1));
  result.by_kv_heads = Divisor(shape.kv_heads), result.by_group_heads = Divisor(result.group_heads);
  result.short_parts = number(layout.parts), result.short_places = number(shape.q_len);
  result.short_stats = reinterpret_cast<float2*>(workspace);
  result.short_out = reinterpret_cast<float*>(workspace + layout.out);
  result.rows = params.rows, result.bit_tiles = params.tiles, result.lengths = params.lengths;
  result.block_q = number(shape.block_q), result.block_kv = number(shape.block_kv);
  result.block_steps = number(shape.block_kv / 64);
  return result;
}

}  // namespace

bool TakesFewQueries(const ForwardParams& params, const device::DeviceFacts& facts) {
  const Shape& shape = params.shape;
  if (!FewQueries(shape) || params.rows.heads != 1 || (params.tiles.heads != 1 && params.tiles.count != 0) ||
      params.gates != nullptr || HasBias(params.bias) || Drops(params.dropout) ||
      shape.batch > decode::cuda::Limits::kMaxSequences || Product({shape.batch, shape.kv_len}) >= device::kMaxInt) {
    return false;
  }
  const Variant* variant = Choose(params);
  return variant != nullptr && variant->shared_bytes + 4 * shape.batch <= facts.shared_bytes;
}

cudaError_t LaunchFewQueries(const ForwardParams& params, void* workspace, const device::DeviceFacts& facts,
                             cudaStream_t stream) {
  return Choose(params)->launch(ForKernels(params, static_cast<char*>(workspace)), facts, stream);
}

}  // namespace jax_bsk::attention::cuda
