// XLA buffers -> checked parameters of the list calls, shared by the CPU and the CUDA handlers. The order of the
// buffers is that of the tables below (`jax_bsk/lists/ffi.py` is the one place where it is written). All leading
// dimensions count as tables.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "ffi/buffers.h"
#include "ffi/checks.h"
#include "lists/params.h"

namespace jax_bsk::lists {

// Attributes of the calls; their names are at the end of this file.
struct TransposeAttributes {
  int64_t columns;
  std::string_view version;
};

struct ChooseAttributes {
  int64_t k;
  int64_t width;
  int64_t group;
  std::string_view version;
};

#define JAX_BSK_LISTS_TRANSPOSE_BUFFERS(X)         \
  X(kOperand, row_offsets) /* [.., rows + 1] */    \
  X(kOperand, kv_blocks)   /* [.., capacity] */    \
  X(kOperand, tiles)       /* [.., capacity] */    \
  X(kResult, col_offsets)  /* [.., columns + 1] */ \
  X(kResult, q_blocks)     /* [.., capacity] */    \
  X(kResult, col_tiles)    /* [.., capacity] */    \
  X(kResult, to_columns)   /* [.., capacity] */    \
  X(kResult, to_rows)      /* [.., capacity] */
JAX_BSK_BUFFERS(TransposeBuffers, JAX_BSK_LISTS_TRANSPOSE_BUFFERS);

#define JAX_BSK_LISTS_CHOOSE_BUFFERS(X)            \
  X(kOperand, scores)     /* [.., rows, groups] */ \
  X(kOperand, states)     /* [rows, groups] */     \
  X(kOperand, candidates) /* [rows, blocks] */     \
  X(kResult, row_offsets) /* [.., rows + 1] */     \
  X(kResult, kv_blocks)   /* [.., capacity] */     \
  X(kResult, tiles)       /* [.., capacity] */
JAX_BSK_BUFFERS(ChooseBuffers, JAX_BSK_LISTS_CHOOSE_BUFFERS);

// Rows, columns and entries are numbered in 32 bits.
inline ffi::Error CheckCounts(std::initializer_list<int64_t> counts) {
  for (const int64_t count : counts) {
    if (count < 0 || count >= std::numeric_limits<int32_t>::max()) {
      return Refusal("lists have from 0 to 2^31 - 2 rows, columns, groups and entries, not " + std::to_string(count));
    }
  }
  return ffi::Error::Success();
}

inline ffi::Error ReadTranspose(const TransposeBuffers& buffers, const TransposeAttributes& attributes,
                                TransposeParams* params) {
  const auto& [offsets, ids, tiles, col_offsets, row_ids, col_tiles, to_columns, to_rows] = buffers;
  const int64_t columns = attributes.columns;
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("row_offsets", offsets, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("kv_blocks", ids, 2));
  const auto rows = MergeLeading(offsets, 1), capacity = MergeLeading(ids, 1);
  if (rows[1] < 1) return Refusal("lists have rows + 1 offsets");
  JAX_BSK_RETURN_IF_ERROR(CheckCounts({rows[1] - 1, columns, capacity[1]}));
  const std::tuple<const char*, const Operand*, int64_t> arrays[] = {
      {"row_offsets", &offsets, rows[1]},       {"kv_blocks", &ids, capacity[1]},
      {"tiles", &tiles, capacity[1]},           {"col_offsets", &col_offsets, columns + 1},
      {"q_blocks", &row_ids, capacity[1]},      {"col_tiles", &col_tiles, capacity[1]},
      {"to_columns", &to_columns, capacity[1]}, {"to_rows", &to_rows, capacity[1]}};
  for (const auto& [name, array, length] : arrays) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *array, ffi::S32));
    JAX_BSK_RETURN_IF_ERROR(CheckShape(name, *array, {{rows[0]}, {length}}));
  }
  *params = {rows[0],
             rows[1] - 1,
             columns,
             capacity[1],
             offsets.typed_data<int32_t>(),
             ids.typed_data<int32_t>(),
             tiles.typed_data<int32_t>(),
             col_offsets.typed_data<int32_t>(),
             row_ids.typed_data<int32_t>(),
             col_tiles.typed_data<int32_t>(),
             to_columns.typed_data<int32_t>(),
             to_rows.typed_data<int32_t>()};
  return ffi::Error::Success();
}

inline ffi::Error ReadChoose(const ChooseBuffers& buffers, const ChooseAttributes& attributes, ChooseParams* params) {
  const auto& [scores, states, candidates, row_offsets, kv_blocks, tiles] = buffers;
  const auto [k, width, group, version] = attributes;
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("scores", scores, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("candidates", candidates, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("kv_blocks", kv_blocks, 1));
  const std::vector<int64_t> sizes = WithBatch(scores, 2);
  const int64_t tables = sizes[0], rows = sizes[1], groups = sizes[2];
  const int64_t blocks = candidates.dimensions().back(), capacity = kv_blocks.dimensions().back();
  JAX_BSK_RETURN_IF_ERROR(CheckCounts({rows, groups, blocks, capacity}));
  if (group < 1 || blocks / group + (blocks % group != 0) != groups) {
    return ffi::Error::InvalidArgument("jax_bsk: " + std::to_string(groups) + " groups of " + std::to_string(group) +
                                       " blocks do not hold " + std::to_string(blocks));
  }
  if (k < 0 || width < 0 || width > groups) {
    return ffi::Error::InvalidArgument("jax_bsk: k and width are counts of groups, the latter of those there are");
  }
  JAX_BSK_RETURN_IF_ERROR(CheckType("scores", scores, ffi::F32));
  JAX_BSK_RETURN_IF_ERROR(CheckType("states", states, ffi::S8));
  JAX_BSK_RETURN_IF_ERROR(CheckType("candidates", candidates, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("states", states, {{rows}, {groups}}));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("candidates", candidates, {{rows}, {blocks}}));
  const std::tuple<const char*, const Operand*, int64_t> results[] = {
      {"row_offsets", &row_offsets, rows + 1}, {"kv_blocks", &kv_blocks, capacity}, {"tiles", &tiles, capacity}};
  for (const auto& [name, array, length] : results) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *array, ffi::S32));
    JAX_BSK_RETURN_IF_ERROR(CheckBatched(name, *array, {{tables}, {length}}));
  }
  *params = {tables,
             rows,
             groups,
             blocks,
             group,
             std::min(k, groups),
             width,
             capacity,
             scores.typed_data<float>(),
             states.typed_data<int8_t>(),
             candidates.typed_data<int32_t>(),
             row_offsets.typed_data<int32_t>(),
             kv_blocks.typed_data<int32_t>(),
             tiles.typed_data<int32_t>()};
  return ffi::Error::Success();
}

}  // namespace jax_bsk::lists

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::lists::TransposeAttributes, StructMember<int64_t>("columns"),
                                      StructMember<std::string_view>("version"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::lists::ChooseAttributes, StructMember<int64_t>("k"),
                                      StructMember<int64_t>("width"), StructMember<int64_t>("group"),
                                      StructMember<std::string_view>("version"));
