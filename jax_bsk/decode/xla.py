"""The decoding call in plain JAX: the `"xla"` implementation, and what a call falls back to that no kernel can take.

`csrc/decode/params.h` says what it computes. Each token has a list of the positions it may attend to: all up to its
own, or those of the window and the sink tokens, or those of the selected pages. The lists are walked in steps of a few
positions with a running maximum (online softmax), for a block of tokens at a time, so that memory does not grow with
the cache. The number of steps follows the longest list.

It gathers a row of the cache per token and position, also where tokens of one sequence share it, so a long prefill
through this implementation is slow.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_bsk.core import compat
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.decode.ffi import DecodeAttributes
from jax_bsk.decode.tokens import sequences

# The log-sum-exp of a token that attends to nothing: `kNoLogSumExp` in C++.
NO_LOG_SUM_EXP = float(jnp.finfo(jnp.float32).min)

_STEP = 128  # positions of a step
_BLOCK_BYTES = 32 << 20  # of the keys and values that a step gathers, in the type of the sums
_IN_BOUNDS: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class _Tokens(NamedTuple):
    """What is known of each token; arrays [T, ..]."""

    query: Array  # [T, K, G, H], in the type of the sums
    seq: Array  # sequence, or any where it has none
    position: Array
    kv_len: Array  # 0 where the token has no sequence, or one of a wrong length
    base: Array  # first of the sequence's last q_len positions
    tree: Array | None  # uint32 [T, 2]
    drafts: Array | None  # whether the tree says what it attends to


def forward(
    attributes: DecodeAttributes,
    query: Array,
    key: Array,
    value: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    num_seqs: Array,
    selection: Array,
    tree: Array,
    sinks: Array,
) -> tuple[Array, Array]:
    """One group of the decoding call, of the native call's operands.

    Args:
      attributes: Static numbers.
      query: [T, N, H].
      key: [P, Z, K, H], or [P, Z, 2 K, H] with keys at even and values at odd heads.
      value: [P, Z, K, Hv], or without elements.
      kv_lens: int32 [Q].
      page_indices: int32 [Q, M].
      cu_q_lens: int32 [Q + 1].
      num_seqs: int32 [1].
      selection: int32 [Q, K, selected], or without elements.
      tree: uint32 [T, 2], or without elements.
      sinks: float32 [N], or without elements.

    Returns:
      out [T, N, Hv] in query's type, and the log-sum-exp float32 [T, N], `NO_LOG_SUM_EXP` where nothing is attended to.
    """
    (tokens, heads, _), (_, page_size, kv_heads, _) = query.shape, key.shape
    both = value.shape[-1] == 0
    kv_heads = kv_heads // 2 if both else kv_heads
    value_dim = key.shape[-1] if both else value.shape[-1]
    if 0 in (tokens, heads, kv_heads):
        return jnp.zeros((tokens, heads, value_dim), query.dtype), jnp.zeros((tokens, heads), jnp.float32)
    group, dtype = heads // kv_heads, statistics_dtype(query.dtype)
    number = jnp.arange(tokens, dtype=jnp.int32)
    seq, owned, sound = sequences(number, cu_q_lens, num_seqs)

    start, end = cu_q_lens[seq], cu_q_lens[seq + 1]
    length = kv_lens[seq]
    bad_length = (length < 0) | (length > page_indices.shape[1] * page_size)
    kv_len = jnp.where(owned & ~bad_length, length, 0)
    base = kv_len - (end - start)
    has_tree = tree.shape[-1] != 0
    of_tokens = _Tokens(
        query=query.astype(dtype).reshape(tokens, kv_heads, group, -1),
        seq=seq,
        position=base + (number - start),
        kv_len=kv_len,
        base=base,
        tree=tree if has_tree else None,
        drafts=end - start <= 64 if has_tree else None,
    )
    cache = _Cache(key, None if both else value, page_indices, selection if selection.shape[-1] else None)
    step = min(_STEP, cache.positions)
    a_token = step * kv_heads * (query.shape[-1] + value_dim) * dtype.itemsize
    block = max(1, min(tokens, 256, _BLOCK_BYTES // a_token))
    walk = functools.partial(_walk, attributes, cache, step)
    if block == tokens:
        row_max, total, acc, bad = walk(of_tokens)
    else:
        blocks = -(-tokens // block)
        pad = blocks * block - tokens
        # Padding has no keys: lengths of 0.
        padded = jax.tree.map(lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)), of_tokens)
        split = jax.tree.map(lambda x: x.reshape((blocks, block, *x.shape[1:])), padded)
        results = lax.map(walk, split)
        row_max, total, acc, bad = (x.reshape((-1, *x.shape[2:]))[:tokens] for x in results)

    if sinks.shape[-1]:
        sink = jnp.where(owned[:, None, None], of_rank(sinks.astype(dtype).reshape(kv_heads, group), 3), -jnp.inf)
        new_max = jnp.maximum(row_max, sink)
        only = jnp.isposinf(sink)  # a sink of +inf is all of the denominator
        rescale = jnp.where(only, 0, jnp.exp(row_max - _finite(new_max)))
        total = total * rescale + jnp.exp(jnp.where(only, 0, sink - _finite(new_max)))
        acc, row_max = acc * rescale[..., None], new_max
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    out = acc / safe[..., None] * jnp.asarray(attributes.value_scale, dtype)
    lse = jnp.where(empty, NO_LOG_SUM_EXP, _finite(row_max) + jnp.log(safe))
    if sinks.shape[-1]:
        lse = jnp.where(jnp.isposinf(row_max), jnp.inf, lse)
    bad = bad | ((owned & bad_length) | ~sound)[:, None, None]
    out = jnp.where(bad[..., None], jnp.nan, out).astype(query.dtype)
    lse = jnp.where(bad, jnp.nan, lse).astype(jnp.float32)
    return out.reshape(tokens, heads, value_dim), lse.reshape(tokens, heads)


def _finite(row_max: Array) -> Array:
    return jnp.where(jnp.isinf(row_max), 0, row_max)


class _Cache(NamedTuple):
    """The keys and values, and which of their rows are whose."""

    key: Array
    value: Array | None
    table: Array  # [Q, M]
    selection: Array | None

    @property
    def page_size(self) -> int:
        return self.key.shape[1]

    @property
    def positions(self) -> int:
        """Most positions that are visited for a token."""
        pages = self.table.shape[1] if self.selection is None else self.selection.shape[-1]
        return pages * self.page_size

    def rows(self, seq: Array, position: Array) -> tuple[Array, Array]:
        """Rows of the flat cache that hold positions of sequences, and which of these are in a page that is none."""
        page = jnp.clip(position // self.page_size, 0, self.table.shape[1] - 1)
        number = self.table[seq, page]
        good = (number >= 0) & (number < self.key.shape[0])
        return jnp.where(good, number, 0) * self.page_size + position % self.page_size, ~good

    def take(self, rows: Array, dtype: Any) -> tuple[Array, Array]:
        """Keys and values [K, T, step, ..] of rows [1 | K, T, step]."""

        def gathered(x: Array, trailing: tuple[int, ...]) -> Array:
            flat = x.reshape((-1, x.shape[2] // (2 if len(trailing) == 2 else 1), *trailing))
            if rows.shape[0] == 1:
                return jnp.moveaxis(flat.at[rows[0]].get(**_IN_BOUNDS), 2, 0)
            rank = len(trailing)
            numbers = lax.GatherDimensionNumbers(
                offset_dims=tuple(range(3, 3 + rank)),
                collapsed_slice_dims=(0,),
                start_index_map=(0,),
                operand_batching_dims=(1,),
                start_indices_batching_dims=(0,),
            )
            return lax.gather(flat, rows[..., None], numbers, (1, 1, *trailing), mode="promise_in_bounds")

        if self.value is not None:
            k, v = (gathered(x, x.shape[3:]) for x in (self.key, self.value))
        else:
            pairs = gathered(self.key, (2, self.key.shape[-1]))
            k, v = pairs[..., 0, :], pairs[..., 1, :]
        return k.astype(dtype), v.astype(dtype)


def _walk(attributes: DecodeAttributes, cache: _Cache, step: int, tokens: _Tokens) -> tuple[Array, Array, Array, Array]:
    """Maximum [T, K, G], sums relative to it [T, K, G] and [T, K, G, Hv], and who reads a wrong page [T, K, 1]."""
    count, kv_heads, group, _ = tokens.query.shape
    dtype = tokens.query.dtype
    value_dim = cache.key.shape[-1] if cache.value is None else cache.value.shape[-1]
    visited, position_of = _visits(attributes, cache, tokens)
    steps = (visited.max() + (step - 1)) // step

    def attends(position: Array) -> Array:
        """Of positions [h, T, step]."""
        end, own, base = (x[None, :, None] for x in (tokens.kv_len, tokens.position, tokens.base))
        seen = position <= own if attributes.causal else jnp.full(position.shape, True)
        if tokens.tree is not None and tokens.drafts is not None:
            bit = position - base
            low, high = (tokens.tree[None, :, i, None] for i in (0, 1))
            word = jnp.where(bit < 32, low, high)
            is_set = ((word >> (bit & 31).astype(jnp.uint32)) & jnp.uint32(1)) == 1
            seen = jnp.where(tokens.drafts[None, :, None] & (bit >= 0), is_set, seen)
        if attributes.window:
            near = position > own - min(attributes.window, 1 << 30)
            seen = seen & (near | (position < attributes.sink_tokens))
        return seen & (position < end) & (position >= 0)

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        row_max, total, acc, bad = carry
        number = i * step + jnp.arange(step, dtype=jnp.int32)
        position, listed = position_of(number)
        attended = attends(position) & listed
        rows, wrong = cache.rows(tokens.seq[None, :, None], jnp.where(attended, position, 0))
        wrong = wrong & attended
        key, value = cache.take(jnp.where(attended, rows, 0), dtype)
        key, value = (jnp.where(attended[..., None], x, 0) for x in (key, value))
        logits = jnp.einsum("tkgh,ktwh->ktgw", tokens.query, key, precision="highest")
        logits = logits * jnp.asarray(attributes.scale, dtype)
        if attributes.soft_cap:
            cap = jnp.asarray(attributes.soft_cap, dtype)
            logits = cap * jnp.tanh(logits / cap)
        logits = jnp.where(attended[:, :, None], logits, -jnp.inf)
        new_max = jnp.maximum(row_max, logits.max(-1))
        finite = _finite(new_max)
        weights = jnp.where(attended[:, :, None], jnp.exp(logits - finite[..., None]), 0)
        rescale = jnp.exp(row_max - finite)
        total = total * rescale + weights.sum(-1)
        acc = acc * rescale[..., None] + jnp.einsum("ktgw,ktwh->ktgh", weights, value, precision="highest")
        return new_max, total, acc, bad | wrong.any(-1)

    init = (
        jnp.full((kv_heads, count, group), -jnp.inf, dtype),
        jnp.zeros((kv_heads, count, group), dtype),
        jnp.zeros((kv_heads, count, group, value_dim), dtype),
        jnp.zeros((1 if cache.selection is None else kv_heads, count), bool),
    )
    # Inside a shard_map what a step makes varies over the mesh as what it reads does.
    init = compat.match_varying(*init, *jax.tree.leaves((tokens, cache)))[: len(init)]
    row_max, total, acc, bad = lax.fori_loop(0, steps, body, init)
    row_max, total, acc = (jnp.moveaxis(x, 0, 1) for x in (row_max, total, acc))
    return row_max, total, acc, jnp.broadcast_to(bad, (kv_heads, count)).T[..., None]


def _visits(attributes: DecodeAttributes, cache: _Cache, tokens: _Tokens) -> tuple[Array, Any]:
    """The lists of positions that tokens visit.

    Returns:
      The lengths of the lists, [T], and a function of numbers [step] in a list to positions [1 | K, T, step] and to
      whether the list has them. Of these positions a token attends to some.
    """
    size = cache.page_size
    if cache.selection is not None:
        chosen, pages = cache.selection, cache.table.shape[1]

        def selected(number: Array) -> tuple[Array, Array]:
            page = jnp.moveaxis(chosen[tokens.seq[:, None], :, (number // size)[None]], 2, 0)  # [K, T, step]
            listed = (page >= 0) & (page < pages) & of_rank(number < chosen.shape[-1] * size, 3)
            return jnp.where(listed, page, 0) * size + of_rank(number % size, 3), listed

        some = tokens.kv_len > 0
        return jnp.where(some, chosen.shape[-1] * size, 0), selected

    end = tokens.kv_len
    if attributes.causal:
        own = jnp.clip(tokens.position + 1, 0, end)
        end = own if tokens.drafts is None else jnp.where(tokens.drafts, end, own)
    first = few = jnp.zeros_like(end)
    if attributes.window and attributes.window < cache.positions:
        first = jnp.clip(tokens.position - (attributes.window - 1), 0, end)
        few = jnp.minimum(first, min(attributes.sink_tokens, cache.positions))
    visited = few + (end - first)

    def near(number: Array) -> tuple[Array, Array]:
        n = of_rank(number, 2)
        position = jnp.where(n < few[:, None], n, n - few[:, None] + first[:, None])
        return position[None], (n < visited[:, None])[None]

    return visited, near
