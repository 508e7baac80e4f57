// The parameters of attention kernels, as plain data. No XLA, Python or CUDA header: the handlers fill these structs
// after checking every shape, and the CPU and CUDA kernels read nothing else.
#pragma once

#include <cstdint>

#include "attention/bias.h"
#include "attention/dropout.h"
#include "dtype.h"
#include "lists/block_list.h"
#include "logits.h"

namespace jax_bsk::attention {

using jax_bsk::DType;
using jax_bsk::kLeastPlainScale;
using jax_bsk::kNoLogSumExp;
using lists::BitTiles;
using lists::BlockList;
using lists::Lengths;

// Sizes shared by forward and backward. Names follow jax.nn.dot_product_attention: query is BTNH, key and value BSKH.
struct Shape {
  int64_t batch;      // B
  int64_t q_len;      // T
  int64_t kv_len;     // S
  int64_t heads;      // N, query heads; heads % kv_heads == 0
  int64_t kv_heads;   // K
  int64_t head_dim;   // H of query and key
  int64_t value_dim;  // H of value and output
  int64_t block_q;
  int64_t block_kv;
  int64_t q_blocks;   // ceil(q_len / block_q)
  int64_t kv_blocks;  // ceil(kv_len / block_kv)
};

// The statistics type ("stats"): float64 when the inputs are float64, float32 otherwise.
struct ForwardParams {
  Shape shape;
  DType dtype;
  const void* query;  // [B, T, N, head_dim]
  const void* key;    // [B, S, K, head_dim]
  const void* value;  // [B, S, K, value_dim]
  BlockList rows;     // query-major
  BitTiles tiles;
  Lengths lengths;
  // stats [sinks_batch, sinks_heads], each 1 or B / N; -inf = no sink; +inf: the row attends to its sink alone (out 0,
  // log-sum-exp +inf); NaN: the row is NaN. Null: no sinks.
  const void* sinks;
  int64_t sinks_batch;
  int64_t sinks_heads;
  const void* gates;  // stats [B, N, rows.capacity]: factor of each visited block's normalised probabilities; null: 1
  Bias bias;
  Dropout dropout;  // of the probabilities, after the softmax; the log-sum-exp does not depend on it
  float scale;      // logits = scale * q.k, before the soft cap
  float soft_cap;   // 0 = none; else logits = soft_cap * tanh(logits / soft_cap)
  void* out;        // [B, T, N, value_dim], dtype
  // stats [B, N, T]: natural-log log-sum-exp of the masked logits and the sink, without the gates; kNoLogSumExp where
  // there is neither.
  void* lse;
  // stats [B, N, T]: what rounding took from lse. The backward forms exp(logit - lse): with logits of 10^6 the last bit
  // of lse alone would change its probabilities by 3 %, and gradients with them.
  void* lse_rest;
  double scale_f64;  // scale and soft_cap before they were rounded to float32, for kernels that compute in float64
  double soft_cap_f64;
};

// delta = rowsum(dO o O) - dlse, which the backward is given: a row's products are added up in an order that depends on
// value_dim and the type alone, so that gradients have the same bits whatever else is in the call or around it.
struct DeltaParams {
  int64_t batch;
  int64_t q_len;
  int64_t heads;
  int64_t value_dim;
  DType dtype;
  const void* dout;  // [B, T, N, value_dim], dtype
  const void* out;   // [B, T, N, value_dim], dtype
  const void* dlse;  // stats [B, N, T]; null: 0
  void* delta;       // stats [B, N, T]
};

struct BackwardParams {
  Shape shape;
  DType dtype;
  const void* dout;   // [B, T, N, value_dim]
  const void* query;  // as in ForwardParams
  const void* key;
  const void* value;
  const void* lse;  // stats [B, N, T], as the forward wrote it
  const void* lse_rest;
  const void* delta;  // stats [B, N, T]: sum(dout * out, -1) - dlse
  BlockList rows;     // query-major, for dQ
  BlockList cols;     // key-major, for dK and dV; its batch and heads are those of `rows`
  BitTiles tiles;
  Lengths lengths;
  // Gates, or null, all three of them: with g a block's gate, dS = P (g dO V^T - delta), dV += g P^T dO, and the gate's
  // own gradient is the sum of P o (dO V^T) over the block.
  const void* row_gates;  // stats [B, N, rows.capacity]
  const void* col_gates;  // stats [B, N, cols.capacity]: the same numbers in the key-major lists' order
  // stats [B, N, cols.capacity], in that order. 0 for an entry that no column has (with no columns: left as it was),
  // and where the keys are past the length; NaN for one that several columns have, and for those of a column that lists
  // an id or a tile out of range. A column that cannot be followed may make NaN of the gradients of its group's other
  // heads for the same keys.
  void* dgates;
  Bias bias;
  // With m being 0 for a dropped pair and Dropout's scale for others: dS = P (m dO V^T - delta), dV += m P^T dO. With
  // gates, m g in place of m.
  Dropout dropout;
  float scale;
  float soft_cap;
  void* dquery;      // [B, T, N, head_dim], dtype
  void* dkey;        // [B, S, K, head_dim], dtype; summed over the group's query heads
  void* dvalue;      // [B, S, K, value_dim], dtype
  double scale_f64;  // as in ForwardParams
  double soft_cap_f64;
};

// The gradient of one term of the bias, from the query-major lists: the sum of dS = P (m g dO V^T - delta), without the
// soft cap's slope, over the pairs that the term's element was added to, in a fixed order.
struct BiasGradientParams {
  Shape shape;
  DType dtype;
  const void* dout;  // as in BackwardParams
  const void* query;
  const void* key;
  const void* value;
  const void* lse;
  const void* lse_rest;
  const void* delta;
  BlockList rows;
  BitTiles tiles;
  Lengths lengths;
  const void* gates;  // stats [B, N, rows.capacity] or null
  Bias bias;          // without col_tiles
  Dropout dropout;
  BiasTerm term;
  float scale;
  float soft_cap;
  // The term's shape and type: elements that no listed pair has are 0. Of the distances stats [distances_batch,
  // distances_heads, 2, T + S - 1], whose two halves are still to be added up.
  void* dbias;
  double scale_f64;
  double soft_cap_f64;
};

}  // namespace jax_bsk::attention
