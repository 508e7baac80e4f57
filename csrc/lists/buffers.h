// XLA buffers -> checked parameters: the one place where the operand order of the list calls is read (`jax_bsk/_ffi.py`
// is the one place where it is written). All leading dimensions count as tables.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "ffi/checks.h"
#include "lists/params.h"

namespace jax_bsk::lists {

// Rows, columns and entries are numbered in 32 bits.
inline ffi::Error CheckCounts(std::initializer_list<int64_t> counts) {
  for (const int64_t count : counts) {
    if (count < 0 || count >= std::numeric_limits<int32_t>::max()) {
      return Refusal("lists have from 0 to 2^31 - 2 rows, columns, units and entries, not " + std::to_string(count));
    }
  }
  return ffi::Error::Success();
}

inline ffi::Error ReadTranspose(const Operand& offsets, const Operand& ids, const Operand& tiles, Output& col_offsets,
                                Output& row_ids, Output& col_tiles, Output& entries, Output& places, int64_t columns,
                                std::string_view version, TransposeParams* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("offsets", offsets, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("ids", ids, 2));
  const auto rows = MergeLeading(offsets, 1), capacity = MergeLeading(ids, 1);
  if (rows[1] < 1) return Refusal("lists have rows + 1 offsets");
  JAX_BSK_RETURN_IF_ERROR(CheckCounts({rows[1] - 1, columns, capacity[1]}));
  const std::pair<const char*, const Operand*> arrays[] = {{"offsets", &offsets},  {"ids", &ids},
                                                           {"tiles", &tiles},      {"col_offsets", &*col_offsets},
                                                           {"row_ids", &*row_ids}, {"col_tiles", &*col_tiles},
                                                           {"entries", &*entries}, {"places", &*places}};
  for (const auto& [name, array] : arrays) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *array, ffi::S32));
    const int64_t length = array == &offsets ? rows[1] : array == &*col_offsets ? columns + 1 : capacity[1];
    JAX_BSK_RETURN_IF_ERROR(CheckShape(name, *array, {{rows[0]}, {length}}));
  }
  const auto result = [](Output& array) { return array->typed_data<int32_t>(); };
  *params = {rows[0],
             rows[1] - 1,
             columns,
             capacity[1],
             offsets.typed_data<int32_t>(),
             ids.typed_data<int32_t>(),
             tiles.typed_data<int32_t>(),
             result(col_offsets),
             result(row_ids),
             result(col_tiles),
             result(entries),
             result(places)};
  return ffi::Error::Success();
}

inline ffi::Error ReadChoose(const Operand& scores, const Operand& states, const Operand& outline, Output& row_offsets,
                             Output& kv_blocks, Output& tiles, int64_t k, int64_t width, int64_t unit,
                             std::string_view version, ChooseParams* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("scores", scores, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("outline", outline, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("kv_blocks", *kv_blocks, 1));
  const std::vector<int64_t> sizes = WithBatch(scores, 2);
  const int64_t tables = sizes[0], rows = sizes[1], units = sizes[2];
  const int64_t blocks = outline.dimensions().back(), capacity = kv_blocks->dimensions().back();
  JAX_BSK_RETURN_IF_ERROR(CheckCounts({rows, units, blocks, capacity}));
  if (unit < 1 || blocks / unit + (blocks % unit != 0) != units) {
    return ffi::Error::InvalidArgument("jax_bsk: " + std::to_string(units) + " units of " + std::to_string(unit) +
                                       " blocks do not hold " + std::to_string(blocks));
  }
  if (k < 0 || width < 0 || width > units) {
    return ffi::Error::InvalidArgument("jax_bsk: k and width are counts of units, the latter of those there are");
  }
  JAX_BSK_RETURN_IF_ERROR(CheckType("scores", scores, ffi::F32));
  JAX_BSK_RETURN_IF_ERROR(CheckType("states", states, ffi::S8));
  JAX_BSK_RETURN_IF_ERROR(CheckType("outline", outline, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("states", states, {{rows}, {units}}));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("outline", outline, {{rows}, {blocks}}));
  const std::tuple<const char*, const Operand*, int64_t> results[] = {
      {"row_offsets", &*row_offsets, rows + 1}, {"kv_blocks", &*kv_blocks, capacity}, {"tiles", &*tiles, capacity}};
  for (const auto& [name, array, length] : results) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *array, ffi::S32));
    JAX_BSK_RETURN_IF_ERROR(CheckBatched(name, *array, {{tables}, {length}}));
  }
  *params = {tables,
             rows,
             units,
             blocks,
             unit,
             std::min(k, units),
             width,
             capacity,
             scores.typed_data<float>(),
             states.typed_data<int8_t>(),
             outline.typed_data<int32_t>(),
             row_offsets->typed_data<int32_t>(),
             kv_blocks->typed_data<int32_t>(),
             tiles->typed_data<int32_t>()};
  return ffi::Error::Success();
}

// Operand and attribute order, after the context arguments of a platform.
template <typename Binding>
auto BindTransposeOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Operand>()  // row_offsets [.., rows + 1]
      .template Arg<Operand>()  // kv_blocks [.., capacity]
      .template Arg<Operand>()  // tiles [.., capacity]
      .template Ret<Operand>()  // col_offsets [.., columns + 1]
      .template Ret<Operand>()  // q_blocks [.., capacity]
      .template Ret<Operand>()  // col_tiles [.., capacity]
      .template Ret<Operand>()  // entries [.., capacity]
      .template Ret<Operand>()  // places [.., capacity]
      .template Attr<int64_t>("columns")
      .template Attr<std::string_view>("version");
}

template <typename Binding>
auto BindChooseOperands(Binding binding) {
  return std::move(binding)
      .template Arg<Operand>()  // scores [.., rows, units]
      .template Arg<Operand>()  // states [rows, units]
      .template Arg<Operand>()  // outline [rows, blocks]
      .template Ret<Operand>()  // row_offsets [.., rows + 1]
      .template Ret<Operand>()  // kv_blocks [.., capacity]
      .template Ret<Operand>()  // tiles [.., capacity]
      .template Attr<int64_t>("k")
      .template Attr<int64_t>("width")
      .template Attr<int64_t>("unit")
      .template Attr<std::string_view>("version");
}

}  // namespace jax_bsk::lists
