// XLA buffers -> checked parameters of the decoding call, shared by the CPU and the CUDA handlers. The order of the
// buffers is that of the table below (`jax_bsk/decode/ffi.py` is the one place where it is written). All leading
// dimensions count as groups.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "decode/params.h"
#include "ffi/buffers.h"
#include "ffi/checks.h"

namespace jax_bsk::decode {

// Attributes of the call; their names are at the end of this file.
struct Attributes {
  int64_t causal;
  int64_t window;
  int64_t sink_tokens;
  double scale;
  double soft_cap;
  double value_scale;
  int64_t short_part;
  int64_t long_part;
  std::string_view version;
};

#define JAX_BSK_DECODE_FORWARD_BUFFERS(X)                                 \
  X(kOperand, query)             /* [G, T, N, H] */                       \
  X(kOperand, key)               /* [G, P, Z, K, H], or with 2 K: both */ \
  X(kOptionalOperand, value)     /* [G, P, Z, K, Hv] */                   \
  X(kOperand, kv_lens)           /* [G, Q] */                             \
  X(kOperand, page_indices)      /* [G, Q, M] */                          \
  X(kOperand, cu_q_lens)         /* [G, Q + 1] */                         \
  X(kOperand, num_seqs)          /* [G, 1] */                             \
  X(kOptionalOperand, selection) /* [G, Q, K, selected] */                \
  X(kOptionalOperand, tree)      /* [G, T, 2] */                          \
  X(kOptionalOperand, sinks)     /* [N] */                                \
  X(kResult, out)                /* [G, T, N, Hv] */                      \
  X(kResult, lse)                /* [G, T, N] */
JAX_BSK_BUFFERS(ForwardBuffers, JAX_BSK_DECODE_FORWARD_BUFFERS);

inline ffi::Error ReadAttributes(const Attributes& attributes, ForwardParams* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  for (const int64_t part : {attributes.short_part, attributes.long_part}) {
    if (part <= 0 || part % 64 != 0)
      return Refusal("parts are positive multiples of 64 keys, not " + std::to_string(part));
  }
  if (attributes.window < 0 || attributes.sink_tokens < 0) return Refusal("window and sink_tokens are not negative");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  params->causal = attributes.causal != 0;
  params->window = std::min(attributes.window, kMost);
  params->sink_tokens = std::min(attributes.sink_tokens, kMost);
  params->scale = static_cast<float>(attributes.scale);
  params->soft_cap = static_cast<float>(attributes.soft_cap);
  params->value_scale = static_cast<float>(attributes.value_scale);
  params->short_part = std::min(attributes.short_part, kMost / 64 * 64);
  params->long_part = std::min(attributes.long_part, kMost / 64 * 64);
  return ffi::Error::Success();
}

// The sizes, from the shapes of those arrays that have them.
inline ffi::Error ReadShape(const ForwardBuffers& b, Shape* shape) {
  JAX_BSK_RETURN_IF_ERROR(CheckRank("query", b.query, 3));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("key", b.key, 4));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("page_indices", b.page_indices, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("selection", b.selection, 3));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("out", b.out, 3));
  const std::vector<int64_t> query = WithBatch(b.query, 3), key = WithBatch(b.key, 4), out = WithBatch(b.out, 3),
                             table = WithBatch(b.page_indices, 2);
  const int64_t heads = key[3];
  *shape = {query[0],
            query[1],
            query[2],
            IsGiven(b.value) ? heads : heads / 2,
            query[3],
            out[3],
            table[1],
            key[1],
            key[2],
            table[2],
            IsGiven(b.selection) ? b.selection.dimensions().back() : 0};
  if (!IsGiven(b.value) && heads % 2 != 0) return Refusal("keys and values in one array have an even number of heads");
  if (shape->kv_heads == 0 ? shape->heads != 0 : shape->heads % shape->kv_heads != 0) {
    return Refusal(std::to_string(shape->heads) + " query heads do not divide by " + std::to_string(shape->kv_heads) +
                   " key/value heads");
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 128;
  if (Product({shape->max_pages, shape->page_size}) > kMost || Product({shape->selected, shape->page_size}) > kMost ||
      shape->tokens > kMost || shape->pages > kMost || shape->page_size < 1) {
    return Refusal(
        "a cache has pages of one position or more, and fewer than 2^31 positions of a sequence, tokens, and "
        "pages");
  }
  return ffi::Error::Success();
}

inline ffi::Error CheckBuffers(const ForwardBuffers& b, const Shape& shape, ffi::DataType element,
                               ffi::DataType cache) {
  const bool both = !IsGiven(b.value);
  const int64_t g = shape.groups, t = shape.tokens, n = shape.heads, k = shape.kv_heads, q = shape.seqs;
  JAX_BSK_RETURN_IF_ERROR(
      CheckBatched("key", b.key, {{g}, {shape.pages}, {shape.page_size}, {both ? 2 * k : k}, {shape.head_dim}}));
  if (both) {
    if (shape.value_dim != shape.head_dim) return Refusal("keys and values in one array have the same head size");
  } else {
    JAX_BSK_RETURN_IF_ERROR(
        CheckBatched("value", b.value, {{g}, {shape.pages}, {shape.page_size}, {k}, {shape.value_dim}}));
    JAX_BSK_RETURN_IF_ERROR(CheckType("value", b.value, cache));
  }
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("kv_lens", b.kv_lens, {{g}, {q}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("page_indices", b.page_indices, {{g}, {q}, {shape.max_pages}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("cu_q_lens", b.cu_q_lens, {{g}, {q + 1}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("num_seqs", b.num_seqs, {{g}, {1}}));
  if (IsGiven(b.selection)) {
    JAX_BSK_RETURN_IF_ERROR(CheckBatched("selection", b.selection, {{g}, {q}, {k}, {shape.selected}}));
  }
  if (IsGiven(b.tree)) {
    JAX_BSK_RETURN_IF_ERROR(CheckBatched("tree", b.tree, {{g}, {t}, {2}}));
    JAX_BSK_RETURN_IF_ERROR(CheckType("tree", b.tree, ffi::U32));
  }
  if (IsGiven(b.sinks)) {
    JAX_BSK_RETURN_IF_ERROR(CheckShape("sinks", b.sinks, {{n}}));
    JAX_BSK_RETURN_IF_ERROR(CheckType("sinks", b.sinks, ffi::F32));
  }
  for (const auto& [name, array] : {std::pair<const char*, const Operand*>{"kv_lens", &b.kv_lens},
                                    {"page_indices", &b.page_indices},
                                    {"cu_q_lens", &b.cu_q_lens},
                                    {"num_seqs", &b.num_seqs}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *array, ffi::S32));
  }
  if (IsGiven(b.selection)) JAX_BSK_RETURN_IF_ERROR(CheckType("selection", b.selection, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckType("key", b.key, cache));
  JAX_BSK_RETURN_IF_ERROR(CheckType("out", b.out, element));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("out", b.out, {{g}, {t}, {n}, {shape.value_dim}}));
  JAX_BSK_RETURN_IF_ERROR(CheckType("lse", b.lse, ffi::F32));
  return CheckBatched("lse", b.lse, {{g}, {t}, {n}});
}

inline ffi::Error ReadForward(const ForwardBuffers& b, const Attributes& attributes, ForwardParams* params) {
  JAX_BSK_RETURN_IF_ERROR(ReadAttributes(attributes, params));
  JAX_BSK_RETURN_IF_ERROR(ReadShape(b, &params->shape));
  JAX_BSK_RETURN_IF_ERROR(ReadDType("query", b.query, &params->dtype));
  const ffi::DataType element = b.query.element_type(), found = b.key.element_type();
  params->cache = found == ffi::F8E4M3FN ? CacheType::kE4M3 : found == ffi::S8 ? CacheType::kInt8 : CacheType::kSame;
  const bool same = params->cache == CacheType::kSame;
  JAX_BSK_RETURN_IF_ERROR(CheckBuffers(b, params->shape, element, same ? element : found));
  const Shape& shape = params->shape;
  const int64_t bytes = !same ? 1 : params->dtype == DType::kF64 ? 8 : params->dtype == DType::kF32 ? 4 : 2;
  params->query = b.query.untyped_data();
  if (IsGiven(b.value)) {
    params->key = {b.key.untyped_data(), shape.kv_heads * shape.head_dim, shape.head_dim};
    params->value = {b.value.untyped_data(), shape.kv_heads * shape.value_dim, shape.value_dim};
  } else {
    const auto* first = static_cast<const char*>(b.key.untyped_data());
    params->key = {first, 2 * shape.kv_heads * shape.head_dim, 2 * shape.head_dim};
    params->value = {first + shape.head_dim * bytes, params->key.stride, params->key.head_stride};
  }
  params->kv_lens = b.kv_lens.typed_data<int32_t>();
  params->page_indices = b.page_indices.typed_data<int32_t>();
  params->cu_q_lens = b.cu_q_lens.typed_data<int32_t>();
  params->num_seqs = b.num_seqs.typed_data<int32_t>();
  params->selection = IsGiven(b.selection) ? b.selection.typed_data<int32_t>() : nullptr;
  params->tree = IsGiven(b.tree) ? b.tree.typed_data<uint32_t>() : nullptr;
  params->sinks = IsGiven(b.sinks) ? b.sinks.typed_data<float>() : nullptr;
  params->out = b.out.untyped_data();
  params->lse = b.lse.typed_data<float>();
  return ffi::Error::Success();
}

}  // namespace jax_bsk::decode

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::decode::Attributes, StructMember<int64_t>("causal"),
                                      StructMember<int64_t>("window"), StructMember<int64_t>("sink_tokens"),
                                      StructMember<double>("scale"), StructMember<double>("soft_cap"),
                                      StructMember<double>("value_scale"), StructMember<int64_t>("short_part"),
                                      StructMember<int64_t>("long_part"), StructMember<std::string_view>("version"));
