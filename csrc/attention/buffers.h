// XLA buffers -> checked kernel parameters of the attention custom calls, shared by the CPU and the CUDA handlers. The
// order of the buffers is that of the tables below (`jax_bsk/attention/ffi.py` is the one place where it is written).
// Operands may carry leading dimensions in front of the ones named here; they count as part of the batch.
#pragma once

#include <string>
#include <string_view>

#include "attention/params.h"
#include "ffi/buffers.h"
#include "ffi/checks.h"

namespace jax_bsk::attention {

// Attributes of the forward and the backward; their names are at the end of this file.
struct Attributes {
  int64_t block_q;
  int64_t block_kv;
  double scale;
  double soft_cap;
  int64_t dropout;  // threshold in 256ths; 0: none
  std::string_view version;
};
struct BiasGradientAttributes {
  int64_t block_q;
  int64_t block_kv;
  double scale;
  double soft_cap;
  int64_t dropout;
  int64_t term;  // a BiasTerm
  std::string_view version;
};
struct DeltaAttributes {
  std::string_view version;
};

#define JAX_BSK_ATTENTION_FORWARD_BUFFERS(X)                                             \
  X(kOperand, query)                  /* [B, T, N, H] */                                 \
  X(kOperand, key)                    /* [B, S, K, H] */                                 \
  X(kOperand, value)                  /* [B, S, K, Hv] */                                \
  X(kOperand, row_offsets)            /* [B|1, N|1, q_blocks + 1] */                     \
  X(kOperand, kv_blocks)              /* [B|1, N|1, capacity] */                         \
  X(kOperand, tiles)                  /* [B|1, N|1, capacity] */                         \
  X(kOperand, bit_tiles)              /* [B|1, N|1, count, block_q, block_kv / 32] */    \
  X(kOperand, lengths)                /* [B|1, 2] */                                     \
  X(kOptionalOperand, sinks)          /* [B|1, N|1]: a logit per head */                 \
  X(kOptionalOperand, gates)          /* [B, N, capacity]: a number per entry */         \
  X(kOptionalOperand, dense_bias)     /* [B|1, N|1, T|1, S|1], query's type or stats */  \
  X(kOptionalOperand, distance_bias)  /* [B|1, N|1, T + S - 1] */                        \
  X(kOptionalOperand, bias_tiles)     /* [B|1, N|1, count, block_q|1, block_kv|1] */     \
  X(kOptionalOperand, row_bias_tiles) /* as kv_blocks: a tile of bias_tiles per entry */ \
  X(kOptionalOperand, dropout_keys)   /* [B, N]: a word per head */                      \
  X(kResult, out)                     /* [B, T, N, Hv] */                                \
  X(kResult, lse)                     /* [B, N, T] */                                    \
  X(kResult, lse_rest)                /* [B, N, T] */
JAX_BSK_BUFFERS(ForwardBuffers, JAX_BSK_ATTENTION_FORWARD_BUFFERS);

#define JAX_BSK_ATTENTION_DELTA_BUFFERS(X)      \
  X(kOperand, dout)         /* [B, T, N, Hv] */ \
  X(kOperand, out)          /* [B, T, N, Hv] */ \
  X(kOptionalOperand, dlse) /* [B, N, T] */     \
  X(kResult, delta)         /* [B, N, T] */
JAX_BSK_BUFFERS(DeltaBuffers, JAX_BSK_ATTENTION_DELTA_BUFFERS);

#define JAX_BSK_ATTENTION_BACKWARD_BUFFERS(X)                                           \
  X(kOperand, dout)                   /* [B, T, N, Hv] */                               \
  X(kOperand, query)                  /* [B, T, N, H] */                                \
  X(kOperand, key)                    /* [B, S, K, H] */                                \
  X(kOperand, value)                  /* [B, S, K, Hv] */                               \
  X(kOperand, lse)                    /* [B, N, T] */                                   \
  X(kOperand, lse_rest)               /* [B, N, T] */                                   \
  X(kOperand, delta)                  /* [B, N, T] */                                   \
  X(kOperand, row_offsets)            /* [B|1, N|1, q_blocks + 1] */                    \
  X(kOperand, kv_blocks)              /* [B|1, N|1, capacity] */                        \
  X(kOperand, tiles)                  /* [B|1, N|1, capacity] */                        \
  X(kOperand, col_offsets)            /* [B|1, N|1, kv_blocks + 1] */                   \
  X(kOperand, q_blocks)               /* [B|1, N|1, capacity] */                        \
  X(kOperand, col_tiles)              /* [B|1, N|1, capacity] */                        \
  X(kOperand, bit_tiles)              /* [B|1, N|1, count, block_q, block_kv / 32] */   \
  X(kOperand, lengths)                /* [B|1, 2] */                                    \
  X(kOptionalOperand, row_gates)      /* [B, N, capacity of the rows] */                \
  X(kOptionalOperand, col_gates)      /* [B, N, capacity of the columns] */             \
  X(kOptionalOperand, dense_bias)     /* [B|1, N|1, T|1, S|1], query's type or stats */ \
  X(kOptionalOperand, distance_bias)  /* [B|1, N|1, T + S - 1] */                       \
  X(kOptionalOperand, bias_tiles)     /* [B|1, N|1, count, block_q|1, block_kv|1] */    \
  X(kOptionalOperand, row_bias_tiles) /* as kv_blocks */                                \
  X(kOptionalOperand, col_bias_tiles) /* as q_blocks */                                 \
  X(kOptionalOperand, dropout_keys)   /* [B, N] */                                      \
  X(kResult, dquery)                  /* [B, T, N, H] */                                \
  X(kResult, dkey)                    /* [B, S, K, H] */                                \
  X(kResult, dvalue)                  /* [B, S, K, Hv] */                               \
  X(kOptionalResult, dgates)          /* as col_gates */
JAX_BSK_BUFFERS(BackwardBuffers, JAX_BSK_ATTENTION_BACKWARD_BUFFERS);

#define JAX_BSK_ATTENTION_BIAS_GRADIENT_BUFFERS(X)                                      \
  X(kOperand, dout)                   /* [B, T, N, Hv] */                               \
  X(kOperand, query)                  /* [B, T, N, H] */                                \
  X(kOperand, key)                    /* [B, S, K, H] */                                \
  X(kOperand, value)                  /* [B, S, K, Hv] */                               \
  X(kOperand, lse)                    /* [B, N, T] */                                   \
  X(kOperand, lse_rest)               /* [B, N, T] */                                   \
  X(kOperand, delta)                  /* [B, N, T] */                                   \
  X(kOperand, row_offsets)            /* [B|1, N|1, q_blocks + 1] */                    \
  X(kOperand, kv_blocks)              /* [B|1, N|1, capacity] */                        \
  X(kOperand, tiles)                  /* [B|1, N|1, capacity] */                        \
  X(kOperand, bit_tiles)              /* [B|1, N|1, count, block_q, block_kv / 32] */   \
  X(kOperand, lengths)                /* [B|1, 2] */                                    \
  X(kOptionalOperand, gates)          /* [B, N, capacity] */                            \
  X(kOptionalOperand, dense_bias)     /* [B|1, N|1, T|1, S|1], query's type or stats */ \
  X(kOptionalOperand, distance_bias)  /* [B|1, N|1, T + S - 1] */                       \
  X(kOptionalOperand, bias_tiles)     /* [B|1, N|1, count, block_q|1, block_kv|1] */    \
  X(kOptionalOperand, row_bias_tiles) /* as kv_blocks */                                \
  X(kOptionalOperand, dropout_keys)   /* [B, N] */                                      \
  X(kResult, dbias)                   /* as the term; distances: [B|1, N|1, 2, T + S - 1] */
JAX_BSK_BUFFERS(BiasGradientBuffers, JAX_BSK_ATTENTION_BIAS_GRADIENT_BUFFERS);

struct ListOperands {
  const Operand& offsets;
  const Operand& ids;
  const Operand& tiles;
};

template <typename Attributes, typename Params>
ffi::Error ReadAttributes(const Attributes& attributes, Params* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  if (attributes.dropout < 0 || attributes.dropout > 255) {
    return Refusal("dropout is in 256ths, 0 to 255, got " + std::to_string(attributes.dropout));
  }
  params->dropout.threshold = static_cast<int>(attributes.dropout);
  for (int64_t block : {attributes.block_q, attributes.block_kv}) {
    if (block <= 0 || block % 32 != 0) {
      return ffi::Error::InvalidArgument("jax_bsk: block sizes are positive multiples of 32, got " +
                                         std::to_string(block));
    }
  }
  params->shape.block_q = attributes.block_q;
  params->shape.block_kv = attributes.block_kv;
  params->scale = static_cast<float>(attributes.scale);
  params->soft_cap = static_cast<float>(attributes.soft_cap);
  params->scale_f64 = attributes.scale;
  params->soft_cap_f64 = attributes.soft_cap;
  return ffi::Error::Success();
}

inline ffi::Error ReadDType(const char* name, const Operand& buffer, DType* dtype, ffi::DataType* stats) {
  JAX_BSK_RETURN_IF_ERROR(jax_bsk::ReadDType(name, buffer, dtype));
  *stats = *dtype == DType::kF64 ? ffi::F64 : ffi::F32;
  return ffi::Error::Success();
}

// query BTNH, key and value BSKH: ranks, agreement and the sizes derived from them.
inline ffi::Error ReadShape(const Operand& query, const Operand& key, const Operand& value, Shape* shape) {
  JAX_BSK_RETURN_IF_ERROR(CheckRank("query", query, 4));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("key", key, 4));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("value", value, 4));
  auto q = MergeLeading(query, 3), k = MergeLeading(key, 3), v = MergeLeading(value, 3);
  shape->batch = q[0];
  shape->q_len = q[1];
  shape->heads = q[2];
  shape->head_dim = q[3];
  shape->kv_len = k[1];
  shape->kv_heads = k[2];
  shape->value_dim = v[3];
  JAX_BSK_RETURN_IF_ERROR(CheckShape("key", key, {{q[0]}, {k[1]}, {k[2]}, {q[3]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("value", value, {{q[0]}, {k[1]}, {k[2]}, {v[3]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckType("key", key, query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(CheckType("value", value, query.element_type()));
  if (shape->heads != 0 && (shape->kv_heads == 0 || shape->heads % shape->kv_heads != 0)) {
    return ffi::Error::InvalidArgument("jax_bsk: " + std::to_string(shape->heads) + " query heads are no multiple of " +
                                       std::to_string(shape->kv_heads) + " key/value heads");
  }
  shape->q_blocks = BlocksOf(shape->q_len, shape->block_q);
  shape->kv_blocks = BlocksOf(shape->kv_len, shape->block_kv);
  return ffi::Error::Success();
}

inline ffi::Error ReadList(const ListOperands& operands, const Shape& shape, int64_t rows, int64_t ids_end,
                           BlockList* list) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("block list offsets", operands.offsets, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckType("block list ids", operands.ids, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckType("block list tiles", operands.tiles, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("block list ids", operands.ids, 3));
  auto dims = MergeLeading(operands.ids, 2);
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("block list ids", operands.ids, {{shape.batch, true}, {shape.heads, true}, {dims[2]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("block list tiles", operands.tiles, {{dims[0]}, {dims[1]}, {dims[2]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("block list offsets", operands.offsets, {{dims[0]}, {dims[1]}, {rows + 1}}));
  list->offsets = operands.offsets.typed_data<int32_t>();
  list->ids = operands.ids.typed_data<int32_t>();
  list->tiles = operands.tiles.typed_data<int32_t>();
  list->batch = dims[0];
  list->heads = dims[1];
  list->capacity = dims[2];
  list->rows = rows;
  list->ids_end = ids_end;
  return ffi::Error::Success();
}

// The two lists of a backward are tables of the same examples and heads. The Hopper kernels depend on it: they look up
// an entry of a row in the column's table once for each table of the rows, and read dS there. Nothing else makes sense
// to the others, either: lists that share a table for some examples are shared for all of them, in both orders.
inline ffi::Error CheckSameTables(const ListOperands& row_operands, const BlockList& rows,
                                  const ListOperands& col_operands, const BlockList& cols) {
  if (rows.batch == cols.batch && rows.heads == cols.heads) return ffi::Error::Success();
  return Refusal("the query-major block list ids have shape " + ShapeString(row_operands.ids.dimensions()) +
                 " and the key-major ones " + ShapeString(col_operands.ids.dimensions()) +
                 ", but both are shared by examples (and by heads) or neither is; broadcast the shared ones");
}

inline ffi::Error ReadTiles(const Operand& bit_tiles, const Shape& shape, BitTiles* tiles) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("bit_tiles", bit_tiles, ffi::U32));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("bit_tiles", bit_tiles, 5));
  auto dims = MergeLeading(bit_tiles, 4);
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("bit_tiles", bit_tiles,
                 {{shape.batch, true}, {shape.heads, true}, {dims[2]}, {shape.block_q}, {shape.block_kv / 32}}));
  *tiles = BitTiles{bit_tiles.typed_data<uint32_t>(), dims[0], dims[1], dims[2]};
  return ffi::Error::Success();
}

inline ffi::Error ReadLengths(const Operand& lengths, const Shape& shape, Lengths* result) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("lengths", lengths, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("lengths", lengths, {{shape.batch, true}, {2}}));
  *result = Lengths{lengths.typed_data<int32_t>(), MergeLeading(lengths, 1)[0]};
  return ffi::Error::Success();
}

// [B|1, N|1], a logit per head; or without numbers, for none.
inline ffi::Error ReadSinks(const Operand& sinks, const Shape& shape, ffi::DataType stats, ForwardParams* params) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("sinks", sinks, stats));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("sinks", sinks, 2));
  params->sinks = nullptr;
  if (!IsGiven(sinks)) return ffi::Error::Success();
  JAX_BSK_RETURN_IF_ERROR(CheckShape("sinks", sinks, {{shape.batch, true}, {shape.heads, true}}));
  params->sinks = sinks.untyped_data();
  params->sinks_batch = MergeLeading(sinks, 1)[0];
  params->sinks_heads = sinks.dimensions().back();
  return ffi::Error::Success();
}

// [B, N, capacity], a number an entry of `list`; or without numbers, for none.
inline ffi::Error ReadGates(const char* name, const Operand& gates, const Shape& shape, const BlockList& list,
                            ffi::DataType stats, void** data) {
  JAX_BSK_RETURN_IF_ERROR(CheckType(name, gates, stats));
  JAX_BSK_RETURN_IF_ERROR(CheckRank(name, gates, 3));
  *data = nullptr;
  if (!IsGiven(gates)) return ffi::Error::Success();
  JAX_BSK_RETURN_IF_ERROR(CheckShape(name, gates, {{shape.batch}, {shape.heads}, {list.capacity}}));
  *data = gates.untyped_data();
  return ffi::Error::Success();
}

struct BiasOperands {
  const Operand& dense;
  const Operand& distances;
  const Operand& tiles;
  const Operand& row_tiles;
  const Operand* col_tiles;  // null: the call has no key-major lists
};

inline ffi::Error ReadBiasTileNumbers(const char* name, const Operand& numbers, const BlockList& list,
                                      const int32_t** data) {
  JAX_BSK_RETURN_IF_ERROR(CheckType(name, numbers, ffi::S32));
  JAX_BSK_RETURN_IF_ERROR(CheckShape(name, numbers, {{list.batch}, {list.heads}, {list.capacity}}));
  *data = numbers.typed_data<int32_t>();
  return ffi::Error::Success();
}

// The terms of the bias that are given; `rows` and `cols` (or null) are the call's lists.
inline ffi::Error ReadBias(const BiasOperands& operands, const Shape& shape, ffi::DataType element, ffi::DataType stats,
                           const BlockList& rows, const BlockList* cols, Bias* bias) {
  *bias = Bias{};
  JAX_BSK_RETURN_IF_ERROR(CheckRank("dense_bias", operands.dense, 4));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("distance_bias", operands.distances, 3));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("bias_tiles", operands.tiles, 5));
  const Extent batch{shape.batch, true}, heads{shape.heads, true};
  if (IsGiven(operands.dense)) {
    JAX_BSK_RETURN_IF_ERROR(
        CheckShape("dense_bias", operands.dense, {batch, heads, {shape.q_len, true}, {shape.kv_len, true}}));
    bias->dense_wide = operands.dense.element_type() == stats;
    if (!bias->dense_wide) JAX_BSK_RETURN_IF_ERROR(CheckType("dense_bias", operands.dense, element));
    const auto dims = MergeLeading(operands.dense, 3);
    bias->dense_batch = dims[0], bias->dense_heads = dims[1], bias->dense_q = dims[2], bias->dense_kv = dims[3];
    bias->dense = operands.dense.untyped_data();
  }
  if (IsGiven(operands.distances)) {
    JAX_BSK_RETURN_IF_ERROR(CheckType("distance_bias", operands.distances, stats));
    JAX_BSK_RETURN_IF_ERROR(
        CheckShape("distance_bias", operands.distances, {batch, heads, {shape.q_len + shape.kv_len - 1}}));
    const auto dims = MergeLeading(operands.distances, 2);
    bias->distances_batch = dims[0], bias->distances_heads = dims[1];
    bias->distances = operands.distances.untyped_data();
  }
  if (IsGiven(operands.tiles)) {
    JAX_BSK_RETURN_IF_ERROR(CheckType("bias_tiles", operands.tiles, stats));
    const auto dims = MergeLeading(operands.tiles, 4);
    JAX_BSK_RETURN_IF_ERROR(CheckShape("bias_tiles", operands.tiles,
                                       {batch, heads, {dims[2]}, {shape.block_q, true}, {shape.block_kv, true}}));
    bias->tiles_batch = dims[0], bias->tiles_heads = dims[1], bias->tiles_count = dims[2];
    bias->tiles_q = dims[3], bias->tiles_kv = dims[4];
    JAX_BSK_RETURN_IF_ERROR(ReadBiasTileNumbers("row_bias_tiles", operands.row_tiles, rows, &bias->row_tiles));
    if (cols != nullptr) {
      JAX_BSK_RETURN_IF_ERROR(ReadBiasTileNumbers("col_bias_tiles", *operands.col_tiles, *cols, &bias->col_tiles));
    }
    if (bias->tiles_count > 0) bias->tiles = operands.tiles.untyped_data();
  }
  return ffi::Error::Success();
}

// [B, N] words, which come with a threshold or not at all.
inline ffi::Error ReadDropout(const Operand& keys, const Shape& shape, Dropout* dropout) {
  JAX_BSK_RETURN_IF_ERROR(CheckType("dropout_keys", keys, ffi::U32));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("dropout_keys", keys, 2));
  dropout->keys = nullptr;
  if (!IsGiven(keys) || dropout->threshold == 0) return ffi::Error::Success();
  JAX_BSK_RETURN_IF_ERROR(CheckShape("dropout_keys", keys, {{shape.batch}, {shape.heads}}));
  dropout->keys = keys.typed_data<uint32_t>();
  return ffi::Error::Success();
}

inline ffi::Error ReadForward(const ForwardBuffers& buffers, const Attributes& attributes, ForwardParams* params) {
  Shape& shape = params->shape;
  ffi::DataType stats;
  JAX_BSK_RETURN_IF_ERROR(ReadAttributes(attributes, params));
  JAX_BSK_RETURN_IF_ERROR(ReadDType("query", buffers.query, &params->dtype, &stats));
  JAX_BSK_RETURN_IF_ERROR(ReadShape(buffers.query, buffers.key, buffers.value, &shape));
  JAX_BSK_RETURN_IF_ERROR(ReadList({buffers.row_offsets, buffers.kv_blocks, buffers.tiles}, shape, shape.q_blocks,
                                   shape.kv_blocks, &params->rows));
  JAX_BSK_RETURN_IF_ERROR(ReadTiles(buffers.bit_tiles, shape, &params->tiles));
  JAX_BSK_RETURN_IF_ERROR(ReadLengths(buffers.lengths, shape, &params->lengths));
  JAX_BSK_RETURN_IF_ERROR(ReadSinks(buffers.sinks, shape, stats, params));
  void* gate_values;
  JAX_BSK_RETURN_IF_ERROR(ReadGates("gates", buffers.gates, shape, params->rows, stats, &gate_values));
  JAX_BSK_RETURN_IF_ERROR(
      ReadBias({buffers.dense_bias, buffers.distance_bias, buffers.bias_tiles, buffers.row_bias_tiles, nullptr}, shape,
               buffers.query.element_type(), stats, params->rows, nullptr, &params->bias));
  JAX_BSK_RETURN_IF_ERROR(ReadDropout(buffers.dropout_keys, shape, &params->dropout));
  JAX_BSK_RETURN_IF_ERROR(CheckType("out", buffers.out, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("out", buffers.out, {{shape.batch}, {shape.q_len}, {shape.heads}, {shape.value_dim}}));
  for (const auto& [name, buffer] :
       {std::pair<const char*, const Operand*>{"lse", &buffers.lse}, {"lse_rest", &buffers.lse_rest}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *buffer, stats));
    JAX_BSK_RETURN_IF_ERROR(CheckShape(name, *buffer, {{shape.batch}, {shape.heads}, {shape.q_len}}));
  }
  params->query = buffers.query.untyped_data();
  params->key = buffers.key.untyped_data();
  params->value = buffers.value.untyped_data();
  params->gates = gate_values;
  params->out = buffers.out.untyped_data();
  params->lse = buffers.lse.untyped_data();
  params->lse_rest = buffers.lse_rest.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error ReadDelta(const DeltaBuffers& buffers, const DeltaAttributes& attributes, DeltaParams* params) {
  ffi::DataType stats;
  JAX_BSK_RETURN_IF_ERROR(CheckVersion(attributes.version));
  JAX_BSK_RETURN_IF_ERROR(ReadDType("out", buffers.out, &params->dtype, &stats));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("out", buffers.out, 4));
  const auto dims = MergeLeading(buffers.out, 3);
  params->batch = dims[0], params->q_len = dims[1], params->heads = dims[2], params->value_dim = dims[3];
  JAX_BSK_RETURN_IF_ERROR(CheckType("dout", buffers.dout, buffers.out.element_type()));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("dout", buffers.dout, {{dims[0]}, {dims[1]}, {dims[2]}, {dims[3]}}));
  JAX_BSK_RETURN_IF_ERROR(CheckType("dlse", buffers.dlse, stats));
  JAX_BSK_RETURN_IF_ERROR(CheckRank("dlse", buffers.dlse, 3));
  params->dlse = nullptr;
  if (IsGiven(buffers.dlse)) {
    JAX_BSK_RETURN_IF_ERROR(CheckShape("dlse", buffers.dlse, {{dims[0]}, {dims[2]}, {dims[1]}}));
    params->dlse = buffers.dlse.untyped_data();
  }
  JAX_BSK_RETURN_IF_ERROR(CheckType("delta", buffers.delta, stats));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("delta", buffers.delta, {{dims[0]}, {dims[2]}, {dims[1]}}));
  params->dout = buffers.dout.untyped_data();
  params->out = buffers.out.untyped_data();
  params->delta = buffers.delta.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error ReadBackward(const BackwardBuffers& buffers, const Attributes& attributes, BackwardParams* params) {
  const ListOperands rows{buffers.row_offsets, buffers.kv_blocks, buffers.tiles};
  const ListOperands cols{buffers.col_offsets, buffers.q_blocks, buffers.col_tiles};
  Shape& shape = params->shape;
  ffi::DataType stats;
  JAX_BSK_RETURN_IF_ERROR(ReadAttributes(attributes, params));
  JAX_BSK_RETURN_IF_ERROR(ReadDType("query", buffers.query, &params->dtype, &stats));
  JAX_BSK_RETURN_IF_ERROR(ReadShape(buffers.query, buffers.key, buffers.value, &shape));
  JAX_BSK_RETURN_IF_ERROR(ReadList(rows, shape, shape.q_blocks, shape.kv_blocks, &params->rows));
  JAX_BSK_RETURN_IF_ERROR(ReadList(cols, shape, shape.kv_blocks, shape.q_blocks, &params->cols));
  JAX_BSK_RETURN_IF_ERROR(CheckSameTables(rows, params->rows, cols, params->cols));
  JAX_BSK_RETURN_IF_ERROR(ReadTiles(buffers.bit_tiles, shape, &params->tiles));
  JAX_BSK_RETURN_IF_ERROR(ReadLengths(buffers.lengths, shape, &params->lengths));
  for (const auto& [name, buffer] : {std::pair<const char*, const Operand*>{"lse", &buffers.lse},
                                     {"lse_rest", &buffers.lse_rest},
                                     {"delta", &buffers.delta}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *buffer, stats));
    JAX_BSK_RETURN_IF_ERROR(CheckShape(name, *buffer, {{shape.batch}, {shape.heads}, {shape.q_len}}));
  }
  JAX_BSK_RETURN_IF_ERROR(CheckType("dout", buffers.dout, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("dout", buffers.dout, {{shape.batch}, {shape.q_len}, {shape.heads}, {shape.value_dim}}));
  const int64_t k_dims[] = {shape.batch, shape.kv_len, shape.kv_heads};
  JAX_BSK_RETURN_IF_ERROR(CheckType("dquery", buffers.dquery, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("dquery", buffers.dquery, {{shape.batch}, {shape.q_len}, {shape.heads}, {shape.head_dim}}));
  JAX_BSK_RETURN_IF_ERROR(CheckType("dkey", buffers.dkey, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(CheckShape("dkey", buffers.dkey, {{k_dims[0]}, {k_dims[1]}, {k_dims[2]}, {shape.head_dim}}));
  JAX_BSK_RETURN_IF_ERROR(CheckType("dvalue", buffers.dvalue, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("dvalue", buffers.dvalue, {{k_dims[0]}, {k_dims[1]}, {k_dims[2]}, {shape.value_dim}}));
  void *row_values, *col_values;
  JAX_BSK_RETURN_IF_ERROR(ReadGates("row_gates", buffers.row_gates, shape, params->rows, stats, &row_values));
  JAX_BSK_RETURN_IF_ERROR(ReadGates("col_gates", buffers.col_gates, shape, params->cols, stats, &col_values));
  JAX_BSK_RETURN_IF_ERROR(ReadGates("dgates", buffers.dgates, shape, params->cols, stats, &params->dgates));
  JAX_BSK_RETURN_IF_ERROR(ReadBias(
      {buffers.dense_bias, buffers.distance_bias, buffers.bias_tiles, buffers.row_bias_tiles, &buffers.col_bias_tiles},
      shape, buffers.query.element_type(), stats, params->rows, &params->cols, &params->bias));
  JAX_BSK_RETURN_IF_ERROR(ReadDropout(buffers.dropout_keys, shape, &params->dropout));
  const bool gated = IsGiven(buffers.row_gates);
  if (IsGiven(buffers.col_gates) != gated || IsGiven(buffers.dgates) != gated) {
    return ffi::Error::InvalidArgument("jax_bsk: row_gates, col_gates and dgates come together or not at all");
  }
  params->row_gates = row_values;
  params->col_gates = col_values;
  params->dout = buffers.dout.untyped_data();
  params->query = buffers.query.untyped_data();
  params->key = buffers.key.untyped_data();
  params->value = buffers.value.untyped_data();
  params->lse = buffers.lse.untyped_data();
  params->lse_rest = buffers.lse_rest.untyped_data();
  params->delta = buffers.delta.untyped_data();
  params->dquery = buffers.dquery.untyped_data();
  params->dkey = buffers.dkey.untyped_data();
  params->dvalue = buffers.dvalue.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error ReadBiasGradient(const BiasGradientBuffers& buffers, const BiasGradientAttributes& attributes,
                                   BiasGradientParams* params) {
  Shape& shape = params->shape;
  ffi::DataType stats;
  JAX_BSK_RETURN_IF_ERROR(ReadAttributes(attributes, params));
  JAX_BSK_RETURN_IF_ERROR(ReadDType("query", buffers.query, &params->dtype, &stats));
  JAX_BSK_RETURN_IF_ERROR(ReadShape(buffers.query, buffers.key, buffers.value, &shape));
  JAX_BSK_RETURN_IF_ERROR(ReadList({buffers.row_offsets, buffers.kv_blocks, buffers.tiles}, shape, shape.q_blocks,
                                   shape.kv_blocks, &params->rows));
  JAX_BSK_RETURN_IF_ERROR(ReadTiles(buffers.bit_tiles, shape, &params->tiles));
  JAX_BSK_RETURN_IF_ERROR(ReadLengths(buffers.lengths, shape, &params->lengths));
  for (const auto& [name, buffer] : {std::pair<const char*, const Operand*>{"lse", &buffers.lse},
                                     {"lse_rest", &buffers.lse_rest},
                                     {"delta", &buffers.delta}}) {
    JAX_BSK_RETURN_IF_ERROR(CheckType(name, *buffer, stats));
    JAX_BSK_RETURN_IF_ERROR(CheckShape(name, *buffer, {{shape.batch}, {shape.heads}, {shape.q_len}}));
  }
  JAX_BSK_RETURN_IF_ERROR(CheckType("dout", buffers.dout, buffers.query.element_type()));
  JAX_BSK_RETURN_IF_ERROR(
      CheckShape("dout", buffers.dout, {{shape.batch}, {shape.q_len}, {shape.heads}, {shape.value_dim}}));
  void* gate_values;
  JAX_BSK_RETURN_IF_ERROR(ReadGates("gates", buffers.gates, shape, params->rows, stats, &gate_values));
  JAX_BSK_RETURN_IF_ERROR(
      ReadBias({buffers.dense_bias, buffers.distance_bias, buffers.bias_tiles, buffers.row_bias_tiles, nullptr}, shape,
               buffers.query.element_type(), stats, params->rows, nullptr, &params->bias));
  JAX_BSK_RETURN_IF_ERROR(ReadDropout(buffers.dropout_keys, shape, &params->dropout));
  const Bias& bias = params->bias;
  ffi::Error shaped = jax_bsk::Refusal("term is 0, 1 or 2, got " + std::to_string(attributes.term));
  ffi::DataType type = stats;
  bool given = false;
  params->term = static_cast<BiasTerm>(attributes.term);
  if (params->term == BiasTerm::kDense) {
    given = bias.dense != nullptr;
    type = buffers.dense_bias.element_type();
    shaped =
        CheckShape("dbias", buffers.dbias, {{bias.dense_batch}, {bias.dense_heads}, {bias.dense_q}, {bias.dense_kv}});
  } else if (params->term == BiasTerm::kDistances) {
    given = bias.distances != nullptr;
    shaped = CheckShape("dbias", buffers.dbias,
                        {{bias.distances_batch}, {bias.distances_heads}, {2}, {shape.q_len + shape.kv_len - 1}});
  } else if (params->term == BiasTerm::kTiles) {
    given = bias.tiles != nullptr;
    shaped = CheckShape("dbias", buffers.dbias,
                        {{bias.tiles_batch}, {bias.tiles_heads}, {bias.tiles_count}, {bias.tiles_q}, {bias.tiles_kv}});
  }
  if (!given) return jax_bsk::Refusal("the gradient of a term of the bias needs that term");
  if (shaped.failure()) return shaped;
  JAX_BSK_RETURN_IF_ERROR(CheckType("dbias", buffers.dbias, type));
  params->gates = gate_values;
  params->dout = buffers.dout.untyped_data();
  params->query = buffers.query.untyped_data();
  params->key = buffers.key.untyped_data();
  params->value = buffers.value.untyped_data();
  params->lse = buffers.lse.untyped_data();
  params->lse_rest = buffers.lse_rest.untyped_data();
  params->delta = buffers.delta.untyped_data();
  params->dbias = buffers.dbias.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_bsk::attention

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::attention::Attributes, StructMember<int64_t>("block_q"),
                                      StructMember<int64_t>("block_kv"), StructMember<double>("scale"),
                                      StructMember<double>("soft_cap"), StructMember<int64_t>("dropout"),
                                      StructMember<std::string_view>("version"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::attention::DeltaAttributes, StructMember<std::string_view>("version"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_bsk::attention::BiasGradientAttributes, StructMember<int64_t>("block_q"),
                                      StructMember<int64_t>("block_kv"), StructMember<double>("scale"),
                                      StructMember<double>("soft_cap"), StructMember<int64_t>("dropout"),
                                      StructMember<int64_t>("term"), StructMember<std::string_view>("version"));
