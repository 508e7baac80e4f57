// XLA buffers -> checked kernel parameters of the product calls, shared by the CPU and the CUDA handlers. The order of
// the buffers is that of the tables below (`jax_bsk/matmul/ffi.py` is the one place where it is written). Operands may
// carry leading dimensions in front of the ones named here; they are the batch, of which an operand has all or one.
#pragma once

#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "ffi/buffers.h"
#include "ffi/checks.h"
#include "matmul/params.h"

namespace jax_bsk::matmul {

// Attributes of the calls; their names are at the end of this file.
struct ProductAttributes {
  int64_t rows;     // M
  int64_t columns;  // K
  bool transposed;
  bool dense_left;
  std::string_view version;
};

struct SampledAttributes {
  bool left_transposed;
  bool right_transposed;
  std::string_view version;
};

#define JAX_BSK_MATMUL_PRODUCT_BUFFERS(X)                         \
  X(kOperand, data)    /* [batch|1, capacity, bm, bk] */          \
  X(kOperand, offsets) /* [batch|1, out blocks + 1] */            \
  X(kOperand, ids)     /* [batch|1, capacity] */                  \
  X(kOperand, places)  /* [batch|1, capacity] */                  \
  X(kOperand, dense)   /* [batch|1, in, N] or [batch|1, N, in] */ \
  X(kResult, out)      /* [batch, out, N] or [batch, N, out] */
JAX_BSK_BUFFERS(ProductBuffers, JAX_BSK_MATMUL_PRODUCT_BUFFERS);

#define JAX_BSK_MATMUL_SAMPLED_BUFFERS(X)                          \
  X(kOperand, left)       /* [batch|1, M, L] or [batch|1, L, M] */ \
  X(kOperand, right)      /* [batch|1, L, K] or [batch|1, K, L] */ \
  X(kOperand, row_ids)    /* [batch|1, capacity] */                \
  X(kOperand, column_ids) /* [batch|1, capacity] */                \
  X(kResult, blocks)      /* [batch, capacity, bm, bk] */
JAX_BSK_BUFFERS(SampledBuffers, JAX_BSK_MATMUL_SAMPLED_BUFFERS);

inline ffi::Error ReadOutType(const char* name, const Operand& out, DType dtype, DType* out_dtype) {
  JAX_BSK_RETURN_IF_ERROR(ReadDType(name, out, out_dtype));
  if (*out_dtype == dtype || *out_dtype == DType::kF32) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_bsk: " + std::string(name) + " has the type of the operands, or is float32");
}

inline ffi::Error CheckBlock(int64_t rows, int64_t columns) {
  if (rows > 0 && columns > 0) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_bsk: blocks are of one row and column at least");
}

inline ffi::Error ReadProduct(const ProductBuffers& buffers, const ProductAttributes& attributes,
                              ProductParams* params) {
  const auto& [data, offsets, ids, places, dense, out] = buffers;
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("data", data, 3));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("dense", dense, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("out", out, 2));
  const auto d = WithBatch(data, 3), b = WithBatch(dense, 2), y = WithBatch(out, 2);
  JAX_BSK_RETURN_IF_ERROR(CheckBlock(d[2], d[3]));
  if (attributes.rows < 0 || attributes.columns < 0) {
    return Refusal("a matrix has no fewer than 0 rows and columns, not " + std::to_string(attributes.rows) + " and " +
                   std::to_string(attributes.columns));
  }
  const bool transposed = attributes.transposed, left = attributes.dense_left;
  params->transposed = transposed;
  params->dense_left = left;
  params->batch = y[0];
  params->matrix_batch = d[0];
  params->dense_batch = b[0];
  params->capacity = d[1];
  params->out_length = transposed ? attributes.columns : attributes.rows;
  params->in_length = transposed ? attributes.rows : attributes.columns;
  params->out_block = transposed ? d[3] : d[2];
  params->in_block = transposed ? d[2] : d[3];
  params->out_blocks = BlocksOf(params->out_length, params->out_block);
  params->in_blocks = BlocksOf(params->in_length, params->in_block);
  params->width = left ? b[1] : b[2];
  JAX_BSK_RETURN_IF_ERROR(ReadDType("data", data, &params->dtype));
  JAX_BSK_RETURN_IF_ERROR(CheckType("dense", dense, data.element_type()));
  JAX_BSK_RETURN_IF_ERROR(ReadOutType("out", out, params->dtype, &params->out_dtype));
  const int64_t batch = params->batch, width = params->width;
  const auto shape = [&](int64_t length) {
    return left ? std::pair<int64_t, int64_t>(width, length) : std::pair<int64_t, int64_t>(length, width);
  };
  const auto in = shape(params->in_length), result = shape(params->out_length);
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("data", data, {{batch, true}, {d[1]}, {d[2]}, {d[3]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("dense", dense, {{batch, true}, {in.first}, {in.second}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("out", out, {{batch}, {result.first}, {result.second}}));
  for (const auto& [name, list, size] :
       {std::tuple<const char*, const Operand*, int64_t>{"offsets", &offsets, params->out_blocks + 1},
        {"ids", &ids, d[1]},
        {"places", &places, d[1]}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *list, ffi::S32));
    JAX_BSK_RETURN_IF_ERROR(CheckBatched(name, *list, {{d[0]}, {size}}));
  }
  params->data = data.untyped_data();
  params->lists = {offsets.typed_data<int32_t>(), ids.typed_data<int32_t>(), places.typed_data<int32_t>()};
  params->dense = dense.untyped_data();
  params->out = out.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error ReadSampled(const SampledBuffers& buffers, const SampledAttributes& attributes,
                              SampledParams* params) {
  const auto& [left, right, row_ids, column_ids, blocks] = buffers;
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("left", left, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("right", right, 2));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("row_ids", row_ids, 1));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("blocks", blocks, 3));
  const auto a = WithBatch(left, 2), b = WithBatch(right, 2), rows = WithBatch(row_ids, 1), c = WithBatch(blocks, 3);
  JAX_BSK_RETURN_IF_ERROR(CheckBlock(c[2], c[3]));
  params->left_transposed = attributes.left_transposed;
  params->right_transposed = attributes.right_transposed;
  params->batch = c[0];
  params->left_batch = a[0];
  params->right_batch = b[0];
  params->list_batch = rows[0];
  params->rows = params->left_transposed ? a[2] : a[1];
  params->depth = params->left_transposed ? a[1] : a[2];
  params->columns = params->right_transposed ? b[1] : b[2];
  params->block_rows = c[2];
  params->block_columns = c[3];
  params->row_blocks = BlocksOf(params->rows, c[2]);
  params->column_blocks = BlocksOf(params->columns, c[3]);
  params->capacity = c[1];
  JAX_BSK_RETURN_IF_ERROR(ReadDType("left", left, &params->dtype));
  JAX_BSK_RETURN_IF_ERROR(CheckType("right", right, left.element_type()));
  JAX_BSK_RETURN_IF_ERROR(ReadOutType("blocks", blocks, params->dtype, &params->out_dtype));
  const int64_t batch = params->batch, depth = params->depth, columns = params->columns;
  const int64_t right_rows = params->right_transposed ? columns : depth;
  const int64_t right_columns = params->right_transposed ? depth : columns;
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("left", left, {{batch, true}, {a[1]}, {a[2]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("right", right, {{batch, true}, {right_rows}, {right_columns}}));
  for (const auto& [name, list] :
       {std::pair<const char*, const Operand*>{"row_ids", &row_ids}, {"column_ids", &column_ids}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *list, ffi::S32));
    JAX_BSK_RETURN_IF_ERROR(CheckBatched(name, *list, {{batch, true}, {c[1]}}));
  }
  JAX_BSK_RETURN_IF_ERROR(CheckBatched("column_ids", column_ids, {{rows[0]}, {c[1]}}));
  params->left = left.untyped_data();
  params->right = right.untyped_data();
  params->row_ids = row_ids.typed_data<int32_t>();
  params->column_ids = column_ids.typed_data<int32_t>();
  params->out = blocks.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_bsk::matmul

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::matmul::ProductAttributes, StructMember<int64_t>("rows"),
                                      StructMember<int64_t>("columns"), StructMember<bool>("transposed"),
                                      StructMember<bool>("dense_left"), StructMember<std::string_view>("version"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::matmul::SampledAttributes, StructMember<bool>("left_transposed"),
                                      StructMember<bool>("right_transposed"),
                                      StructMember<std::string_view>("version"));
