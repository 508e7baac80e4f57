// The parameters of the decoding kernels, as plain data: no XLA, Python or CUDA header. Attention of few queries, or of
// many sequences of queries in a row, over a cache of keys and values in pages; a contiguous cache is one page per
// sequence.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "logits.h"

namespace jax_bsk::decode {

// A group is a problem of its own, with tokens, sequences and pages of its own; a call has G of the same sizes.
struct Shape {
  int64_t groups;     // G
  int64_t tokens;     // T, queries of all sequences of a group, and padding behind them
  int64_t heads;      // N, query heads; heads % kv_heads == 0
  int64_t kv_heads;   // K
  int64_t head_dim;   // H of queries and keys
  int64_t value_dim;  // H of values and output
  int64_t seqs;       // Q, sequences at most
  int64_t pages;      // P of the cache
  int64_t page_size;  // Z, positions of a page
  int64_t max_pages;  // M, pages of a sequence at most
  int64_t selected;   // pages listed for a sequence and key/value head, 0 where all are visited
};

// What the cache holds: elements of the queries' type, or such of one byte, which are widened exactly. Their scales are
// part of `scale` and `value_scale`.
enum class CacheType : int32_t { kSame, kE4M3, kInt8 };

// Where the rows of keys or values lie: head k of position r of page p of group g at
//   first + ((g * pages + p) * page_size + r) * stride + k * head_stride     elements.
struct Rows {
  const void* first;
  int64_t stride;
  int64_t head_stride;
};

// Sequence s of a group has the tokens cu_q_lens[s] .. cu_q_lens[s + 1] - 1; they are the last q_len of its kv_len
// positions. Token t of them has the position p = kv_len - q_len + (t - cu_q_lens[s]), and attends to the keys k with
//   0 <= k < kv_len, k <= p where `causal`, and k > p - window or k < sink_tokens where `window` > 0;
//   of the last q_len positions, where there is a `tree` and the sequence has at most 64 tokens: those whose bit
//   k - (kv_len - q_len) is set in the token's word, in place of k <= p;
//   where pages are selected: those in a listed page. Numbers below 0, and pages past the length, list nothing; a page
//   that is listed twice counts twice.
//
// The integers come from device memory and are not trusted. A sequence whose kv_len is negative or beyond max_pages *
// page_size, or one of whose visited pages lies outside [0, pages), yields NaN for each query that would read there.
// Offsets cu_q_lens that begin below 0, decrease, or end past `tokens`, and a num_seqs outside [0, seqs], yield NaN for
// all tokens of the group. Tokens of no sequence, and such that attend to nothing, give 0 (log-sum-exp
// kNoLogSumExp, or the sink where there is one and the token has a sequence). What lies in pages, or positions of
// pages, that a query does not attend to does not reach it, NaN or not.
struct ForwardParams {
  Shape shape;
  DType dtype;
  CacheType cache;
  const void* query;            // [G, T, N, H]
  Rows key;                     // [G, P, Z, K, H], or the even heads of [G, P, Z, 2 K, H]
  Rows value;                   // [G, P, Z, K, Hv], or the odd heads of the same
  const int32_t* kv_lens;       // [G, Q]
  const int32_t* page_indices;  // [G, Q, M]
  const int32_t* cu_q_lens;     // [G, Q + 1]
  const int32_t* num_seqs;      // [G]
  const int32_t* selection;     // [G, Q, K, selected]: pages, counted within the sequence; null: all
  const uint32_t* tree;         // [G, T, 2]: words of 32 bits, the lower ones first; null: none
  const float* sinks;           // [N]: logits that join each denominator; null: none
  bool causal;
  int64_t window;       // 0: none
  int64_t sink_tokens;  // first positions that a window leaves visible
  float scale;          // logits = scale * q.k, before the soft cap
  float soft_cap;       // 0: none
  float value_scale;    // factor of the output
  // Keys of a part: a row's keys are summed in parts of so many positions (of visited ones, see the splits of a
  // kernel), which are merged in their order. For sequences of few queries, and for others. A multiple of 64.
  int64_t short_part;
  int64_t long_part;
  void* out;   // [G, T, N, Hv], dtype
  float* lse;  // [G, T, N]
};

}  // namespace jax_bsk::decode
