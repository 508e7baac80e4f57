// XLA buffers -> checked parameters: the one place where the operand order of the list calls is read (`jax_bsk/_ffi.py`
// is the one place where it is written). All leading dimensions count as tables.
#pragma once

#include <initializer_list>
#include <string_view>
#include <utility>

#include "ffi/checks.h"
#include "lists/params.h"

namespace jax_bsk::lists {

inline ffi::Error ReadTranspose(const Operand& offsets, const Operand& ids, const Operand& tiles, Output& col_offsets,
                                Output& row_ids, Output& col_tiles, Output& entries, Output& places, int64_t columns,
                                std::string_view version, TransposeParams* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("offsets", offsets, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("ids", ids, 2));
  const auto rows = MergeLeading(offsets, 1), capacity = MergeLeading(ids, 1);
  if (rows[1] < 1 || columns < 0) return ffi::Error::InvalidArgument("jax_bsk: lists have rows + 1 offsets");
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

}  // namespace jax_bsk::lists
