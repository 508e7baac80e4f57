"""Block-sparse attention in plain JAX: the ``"xla"`` implementation.

Place on the path: ``dispatch`` picks it where no native kernel can take the call, and it is what native kernels are
compared with. Made of ordinary differentiable JAX, so it has every derivative (forward, reverse, higher orders, of
``bias`` and ``sinks`` too) and every transformation, on any platform and floating dtype.

The ragged block list is walked as a sequence of entries (query block, key block, bit tile), a fixed number of entries
per step of a ``lax.scan`` (`schedule`): however skewed the rows are, the work follows the number of entries. A few
entries are computed in a single step, without a loop. Two walks:

1. the maximum of each row's logits, outside of differentiation (the results do not depend on it);
2. with the maximum ``m`` fixed, the sums ``l = sum exp(s - m)`` and ``acc = sum exp(s - m) v``.

The second walk is linear in what it carries, so reverse mode need not keep the carry of every step, and each of several
steps is a ``jax.checkpoint``: its probabilities are computed again in the backward. Hence memory is linear in the
lengths. The usual single walk (online softmax) multiplies its carry by a data-dependent factor and would have to keep
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jax_bsk.attention import dropout
from jax_bsk.attention.schedule import (
    IN_BOUNDS,
    NOTHING,
    Lists,
    Schedule,
    known_schedule,
    schedule,
    split_heads,
    take,
)
from jax_bsk.biases.features import features_of_heads
from jax_bsk.biases.terms import Terms
from jax_bsk.core import compat, explicit_mesh
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask

# (logits, example, head, query, key), arrays that broadcast against each other, to other logits.
ScoreFunction = Callable[[Array, Array, Array, Array, Array], Any]


def sparse_attention_xla(
    query: Array,
    key: Array,
    value: Array,
    mask: BlockMask,
    *,
    bias: Terms | Array | None,
    lengths: Array | None,
    sinks: Array | None,
    scale: float | Array,
    soft_cap: float | None,
    gates: Array | None = None,
    dropout_keys: Array | None = None,
    dropout_threshold: int = 0,
    score_function: ScoreFunction | None = None,
    with_lse: bool = True,
) -> tuple[Array, Any]:
    """Attention over the visited blocks of ``mask``; arguments are trusted to be validated by the caller.

    Args:
        query: ``[B, T, N, H]``.
        key: ``[B, S, K, H]``, K dividing N.
        value: ``[B, S, K, Hv]``.
        mask: block lists with leading dims ``[B|1, N|1]`` and bit tiles with leading dims ``[B|1, N|1]`` of their own.
            A row of blocks whose list is invalid gives NaN.
        bias: terms that are added to the logits after the soft cap (so that -inf masks), or their dense one alone,
            ``[B|1, N|1, T|1, S|1]``, or None.
        lengths: int32 ``[B|1, 2]``, the valid queries and keys of each example, or None.
        sinks: ``[N]``, a logit per head which takes part in the denominator only, or None.
        scale: factor of the products of queries and keys.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``, or None.
        gates: ``[B|1, N|1, capacity]``, a factor of each listed block's normalised probabilities, or None.
        dropout_keys: uint32 ``[B, N]``, a word per head, where probabilities are dropped, or None.
        dropout_threshold: share of the probabilities that are dropped, in 256ths.
        score_function: of (logits, example, head, query, key), whose result takes the logits' place, or None.
        with_lse: whether lse is asked for. It is -inf where nothing is attended to, and a result of the jitted function
            that holds an infinity stops a call under ``jax_debug_infs``.

    Returns:
        out ``[B, T, N, Hv]`` in the dtype of ``query`` and lse ``[B, N, T]``, float32 (float64 for float64), or None.
    """
    batch, q_len, heads, _ = query.shape
    kv_len, kv_heads, v_size = key.shape[1], key.shape[2], value.shape[-1]
    stats_dtype = statistics_dtype(query.dtype)
    if 0 in (batch, q_len, heads, kv_heads):
        lse = jnp.zeros((batch, heads, q_len), stats_dtype) if with_lse else None
        return jnp.zeros((batch, q_len, heads, v_size), query.dtype), lse
    if kv_len == 0:  # nothing to gather blocks from: one key block that no length reaches
        pad = [(0, 0), (0, 1), (0, 0), (0, 0)]
        key, value = jnp.pad(key, pad), jnp.pad(value, pad)
        bias = gates = None
    terms = bias if isinstance(bias, Terms) else Terms(dense=bias)
    lists: Any = None
    if not mask.holds_runs:  # steps on the host would be as many as the blocks that it has no lists of
        lists = known_schedule(mask, (kv_heads, heads // kv_heads), max(kv_len, 1))
    if lists is None:
        lists = Lists(*mask.kernel_rows())
    # What a function closes over may be traced by an outer transformation, which a jitted function must not remember.
    attention: Any = _jitted_attention if score_function is None else _attention
    attend = functools.partial(
        attention,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        kv_len=kv_len,
        dropout_threshold=0 if dropout_keys is None else dropout_threshold,
        score_function=score_function,
        with_lse=with_lse,
    )
    arguments = query, key, value, terms, gates, dropout_keys, lengths, sinks, scale, soft_cap
    lists = lists, mask.bit_tiles
    arrays = jax.tree.leaves((arguments, lists))
    if not explicit_mesh.shards(arrays):
        return attend(*arguments, *lists)
    # On an explicit mesh every gather, search and carry would need a sharding: XLA partitions them by itself.
    examples, queries, head_axes = (*jax.typeof(query).sharding.spec, None, None, None)[:3]
    of_lse = PartitionSpec(examples, head_axes, queries) if with_lse else None
    shardings = PartitionSpec(examples, queries, head_axes), of_lse
    partitioned: Any = jax.sharding.auto_axes(attend, out_sharding=shardings)
    with explicit_mesh.mesh_of(arrays):
        return partitioned(*arguments, *lists)


class _Operands(NamedTuple):
    """Blocked operands in the softmax dtype; b, k, g are batch, kv heads and group (1 where mapped or shared).

    Fields are arrays, or axes of them (`_OPERAND_AXES`).
    """

    query: Any  # [nq, b, k, g, block_q, H], times scale
    key: Any  # [nk, b, k, block_kv, H]
    value: Any  # [nk, b, k, block_kv, Hv]
    query_flaw: Any  # [nq, b, k, g, block_q], NaN where the row of ``query`` was not finite, else 0
    kv_flaws: Any  # [nk, b, k, 2, block_kv], of keys and of values
    bit_tiles: Any  # uint32 [n, b, k, g, block_q, block_kv / 32]
    dense: Any  # bias [b, k, g, nq|1, block_q|1, nk|1, block_kv|1]
    distances: Any  # bias [b, k, g, nq * block_q + nk * block_kv - 1], of key - query from the last block's end on
    tiles: Any  # bias [b, k, g, count, block_q|1, block_kv|1]
    numbers: Any  # int32 [b, k, g, capacity], a bias tile per entry, with the leading dims of the lists
    gates: Any  # [b, k, g, capacity]
    dropout_keys: Any  # uint32 [b, k, g]
    examples: Any  # int32 [b], numbers of examples, where a score function asks
    heads: Any  # int32 [k, g], numbers of query heads, likewise
    q_end: Any  # int32 [b], valid queries; None where all are, but for those that fill up the last block
    kv_end: Any  # int32 [b], valid keys; None where all are, and no other fills up the last block


# Axes of (b, k, g) in each field above, for mapping over lists; None: the field has no such axis.
_LIST_AXES = (0, 1, 2)
_OPERAND_AXES = _Operands(
    query=(1, 2, 3),
    key=(1, 2, None),
    value=(1, 2, None),
    query_flaw=(1, 2, 3),
    kv_flaws=(1, 2, None),
    bit_tiles=(1, 2, 3),
    dense=(0, 1, 2),
    distances=(0, 1, 2),
    tiles=(0, 1, 2),
    numbers=(0, 1, 2),
    gates=(0, 1, 2),
    dropout_keys=(0, 1, 2),
    examples=(0, None, None),
    heads=(None, 0, 1),
    q_end=(0, None, None),
    kv_end=(0, None, None),
)


class _OfEntries(NamedTuple):
    """What belongs to single entries: ``[steps, chunk, width, b, k, g, ..]``, or of one step, without the first dim."""

    dense: Any = None  # bias [.., block_q|1, block_kv|1]
    distances: Any = None  # bias [.., block_q + block_kv - 1]
    tiles: Any = None  # bias [.., block_q|1, block_kv|1]
    gates: Any = None  # [..]


class _Static(NamedTuple):
    """What is known of a walk when it is traced."""

    soft_cap: Any  # a number, or None
    features: int  # last so many numbers of queries and keys are a bias, which the soft cap leaves alone
    dropout_threshold: int
    score_function: ScoreFunction | None


def _attention(
    query,
    key,
    value,
    terms: Terms,
    gates,
    dropout_keys,
    lengths,
    sinks,
    scale,
    soft_cap,
    lists: Schedule | Lists,
    bit_tiles,
    *,
    block_q: int,
    block_kv: int,
    kv_len: int,
    dropout_threshold: int,
    score_function: ScoreFunction | None,
    with_lse: bool,
):
    batch, q_len, heads, _ = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    dtype = statistics_dtype(query.dtype)
    nq, nk = -(-q_len // block_q), -(-key.shape[1] // block_kv)
    split = functools.partial(split_heads, heads=(kv_heads, group))

    def blocked(x, n, block):
        """[B, L, K.., D] to [n, B, K.., block, D]."""
        if n * block != x.shape[1]:
            x = jnp.pad(x, [(0, 0), (0, n * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape((x.shape[0], n, block, *x.shape[2:]))
        return jnp.moveaxis(x, (1, 2), (0, -2))

    def isolated(x, n, block):
        """Blocks of x in the softmax dtype, which also holds the sums of cotangents, and flaws of their vectors."""
        x, flaw = _isolate(x.astype(dtype))
        return blocked(x, n, block), blocked(flaw[..., None], n, block)[..., 0]

    dense, distances = terms.dense, terms.distances
    if dense is not None:
        shape = [n if dense.shape[2 + i // 2] > 1 else 1 for i, n in enumerate((nq, block_q, nk, block_kv))]
        pad = [(0, shape[2 * i] * shape[2 * i + 1] - dense.shape[2 + i]) for i in (0, 1)]
        dense = jnp.pad(dense.astype(dtype), [(0, 0), (0, 0), *pad]).reshape((*dense.shape[:2], *shape))
        dense = split(dense, 1)
    if distances is not None:
        pad = nq * block_q - q_len, nk * block_kv - kv_len
        distances = split(jnp.pad(distances.astype(dtype), [(0, 0), (0, 0), pad]), 1)
    if gates is not None:
        gates = split(gates.astype(dtype), 1)
    q_end = kv_end = None
    if lengths is not None:
        q_end, kv_end = jnp.minimum(lengths[:, 0], q_len), jnp.minimum(lengths[:, 1], kv_len)
    elif nk * block_kv != kv_len:
        kv_end = jnp.full(1, kv_len, jnp.int32)
    q, q_flaw = isolated(split(query, 2), nq, block_q)
    k, k_flaw = isolated(key, nk, block_kv)
    v, v_flaw = isolated(value, nk, block_kv)
    scaled = q * jnp.asarray(scale, dtype)
    features = 0
    if terms.query_features is not None:  # more of queries and keys, which no scale multiplies
        of_queries, of_keys = features_of_heads(terms, batch, heads, kv_heads)
        features = of_queries.shape[-1]
        more, more_flaw = isolated(split(of_queries, 2), nq, block_q)
        scaled, q_flaw = jnp.concatenate([scaled, more], -1), q_flaw + more_flaw
        more, more_flaw = isolated(of_keys, nk, block_kv)
        k, k_flaw = jnp.concatenate([k, more], -1), k_flaw + more_flaw
    operands = _Operands(
        query=scaled,
        key=k,
        value=v,
        query_flaw=q_flaw,
        kv_flaws=jnp.stack([k_flaw, v_flaw], axis=3),
        bit_tiles=split(jnp.moveaxis(bit_tiles, 2, 0), 2),
        dense=dense,
        distances=distances,
        tiles=None if terms.tiles is None else split(terms.tiles.astype(dtype), 1),
        numbers=None if terms.tiles is None else split(terms.numbers, 1),
        gates=gates,
        dropout_keys=None if dropout_keys is None else split(dropout_keys, 1),
        examples=None if score_function is None else jnp.arange(batch, dtype=jnp.int32),
        heads=None if score_function is None else jnp.arange(heads, dtype=jnp.int32).reshape(kv_heads, group),
        q_end=q_end,
        kv_end=kv_end,
    )

    active = poisoned = None
    if isinstance(lists, Schedule):
        order = lists
    else:
        order, used, poisoned = schedule(Lists(*(split(x, 1) for x in lists)), nk, bit_tiles.shape[2])
        # Lists of a fixed capacity (traced ones) may be mostly padding: steps past the longest list are skipped.
        steps, chunk, _ = order.cols.shape[-3:]
        active = jnp.arange(steps, dtype=jnp.int32) * chunk < used.max()
    if gates is None and terms.tiles is None:
        order = order._replace(positions=None)
    static = _Static(soft_cap, features, dropout_threshold, score_function)
    row_max, total, acc = _map_lists(_walk, order, operands, static, active)

    if sinks is not None:
        sink = sinks.astype(dtype).reshape(1, 1, kv_heads, group, 1)
        # The walk was relative to its own maximum; a greater sink shrinks it, and out of reach it counts as nothing.
        new_max = jnp.maximum(row_max, lax.stop_gradient(sink))
        rescale = jnp.exp(row_max - _finite_or_zero(new_max))
        row_max = new_max
        # A sink of +inf is all of the denominator: the row attends to it alone, and nothing has a gradient.
        share = jnp.exp(jnp.where(jnp.isposinf(sink), 0, sink - _finite_or_zero(row_max)))
        if q_end is not None:
            position = jnp.arange(nq * block_q, dtype=jnp.int32).reshape(nq, 1, 1, 1, block_q)
            share = jnp.where(position < q_end[None, :, None, None, None], share, 0)
        total = total * rescale + share
        acc = acc * rescale[..., None]
    row_max = _finite_or_zero(row_max)
    empty = total == 0
    safe_total = jnp.where(empty, 1, total)
    # A row with a NaN is NaN through acc. Its reciprocal stays finite all the same, since the cotangent of acc, which
    # is multiplied by it, reaches keys that the row does not attend to (with a zero probability, and 0 * NaN is NaN).
    flawed = ~jnp.isfinite(safe_total)
    reciprocal = jnp.where(flawed, 1, 1 / safe_total)
    out = acc * reciprocal[..., None]

    if poisoned is not None:  # NaN for the rows of an invalid list, times the query such that dq is NaN as well.
        poison = jnp.where(jnp.moveaxis(poisoned, -1, 0)[..., None], jnp.nan, 0).astype(dtype)
        poison = poison * (q.sum(-1) / max(q.shape[-1], 1))
        out = out + poison[..., None]
    out = jnp.moveaxis(out, (0, -2), (1, 2)).reshape(batch, nq * block_q, heads, -1)[:, :q_len].astype(query.dtype)
    if not with_lse:
        return out, None
    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(safe_total))
    if poisoned is not None:
        lse = lse + poison
    lse = jnp.moveaxis(lse, 0, -2).reshape(batch, heads, nq * block_q)[..., :q_len]
    return out, lse


_jitted_attention = jax.jit(
    _attention, static_argnames=("block_q", "block_kv", "kv_len", "dropout_threshold", "score_function", "with_lse")
)


def _map_lists(walk, order: Schedule, operands: _Operands, static: _Static, active):
    """Runs ``walk`` once for a list that is shared, and mapped over batch or heads where each has its own."""

    def call(level, order, operands):
        if level == 3:
            return walk(jax.tree.map(lambda x: x[0, 0, 0], order), operands, static, active)
        axis = _LIST_AXES[level]
        if order.cols.shape[axis] == 1:
            return call(level + 1, order, operands)

        def mapped_axis(x, axes):  # a field of size 1 serves all the lists as it is
            return None if x is None or axes[level] is None or x.shape[axes[level]] == 1 else axes[level]

        def restore(x, axis):  # vmap takes the axis away, the walk expects it with size 1
            return x if axis is None else jnp.expand_dims(x, axis)

        in_axes = _Operands(*(mapped_axis(x, axes) for x, axes in zip(operands, _OPERAND_AXES, strict=True)))

        def one(order, operands):
            order = jax.tree.map(lambda x: jnp.expand_dims(x, axis), order)
            operands = _Operands(*(restore(x, a) for x, a in zip(operands, in_axes, strict=True)))
            return jax.tree.map(lambda x: jnp.squeeze(x, level + 1), call(level + 1, order, operands))

        return jax.vmap(one, in_axes=(axis, in_axes), out_axes=level + 1)(order, operands)

    return call(0, order, operands)


def _walk(order: Schedule, operands: _Operands, static: _Static, active) -> tuple[Array, Array, Array]:
    """One list over its operands: row maximum and sums relative to it, ``[nq, b, k, g, block_q]`` and ``[.., Hv]``."""
    query, value = operands.query, operands.value
    # What belongs to the entries that are visited, all at once: it is xs of the scans, so that the cotangent of a bias
    # is put together by one scatter. Gathered step by step, each step would add an array of the whole bias's size.
    extras = _of_entries(order, operands)
    operands = operands._replace(dense=None, distances=None, tiles=None, numbers=None, gates=None)
    xs = (order._replace(positions=None), extras, active)
    steps = order.cols.shape[0]

    def scan(body, init):
        if steps == 0:
            return init
        leaves, tree = jax.tree.flatten(init)
        # A step that is skipped hands on what it was given, which must vary over a mesh as what a step makes.
        leaves = compat.match_varying(*leaves, *jax.tree.leaves((xs, operands, static.soft_cap)))[: len(leaves)]

        def step(carry, x):
            entries, extras, active = x
            if active is None:
                return body(carry, entries, extras), None
            return lax.cond(active, lambda c: body(c, entries, extras), lambda c: c, carry), None

        init = tree.unflatten(leaves)
        if steps == 1:
            return step(init, jax.tree.map(lambda x: x[0], xs))[0]
        return lax.scan(step, init, xs)[0]

    def maximum(row_max, entries, extras):
        logits, attends = _logits(lax.stop_gradient(operands), entries, lax.stop_gradient(extras), static)
        found = jnp.where(attends, lax.stop_gradient(logits), -jnp.inf).max(-1)
        if entries.rows is None:
            return jnp.maximum(row_max, found)
        return row_max.at[entries.rows].max(found, indices_are_sorted=True, **IN_BOUNDS)

    def contributions(operands, row_shift, entries, extras, soft_cap):
        logits, attends = _logits(operands, entries, extras, static._replace(soft_cap=soft_cap))
        flaws = _side_by_side(take(operands.kv_flaws, entries.cols), -1)[:, :, :, None, :, None, :]
        relative = (logits + flaws[..., 0, :, :]) - _of_rows(row_shift, entries)[..., None]
        # The exponential of the least number is 0, as are its derivatives: a masked pair has no part in any.
        probs = jnp.exp(jnp.where(attends, relative, jnp.finfo(relative.dtype).min))
        weights = probs + jnp.where(attends, flaws[..., 1, :, :], 0)
        if extras.gates is not None:  # a NaN among them reaches only the rows that attend to its block
            weights = jnp.where(attends, _gated(weights, extras.gates, operands.value.shape[-2]), 0)
        if operands.dropout_keys is not None:
            kept = _dropout_factors(operands, entries, logits.shape[-2], static.dropout_threshold, weights.dtype)
            weights = weights * kept
        values = _side_by_side(take(operands.value, entries.cols), -2)
        return probs.sum(-1), jnp.einsum("cbkgqs,cbksd->cbkgqd", weights, values)

    if steps > 1:
        contributions = jax.checkpoint(contributions)

    def add(carry, entries, extras):
        parts = contributions(operands, row_shift, entries, extras, static.soft_cap)
        if entries.rows is None:
            return jax.tree.map(jnp.add, carry, parts)
        return jax.tree.map(lambda c, x: c.at[entries.rows].add(x, indices_are_sorted=True, **IN_BOUNDS), carry, parts)

    # No flaw matters to the maximum, which may be any finite number: it cancels, and a flawed row's sums are NaN.
    row_max = scan(maximum, jnp.full_like(lax.stop_gradient(query[..., 0]), -jnp.inf))
    row_max = lax.stop_gradient(row_max)
    safe_max = _finite_or_zero(row_max)
    row_shift = safe_max + operands.query_flaw
    zero = jnp.zeros_like(safe_max)
    total, acc = scan(add, (zero, jnp.zeros(zero.shape + value.shape[-1:], zero.dtype)))
    return row_max, total, acc


def _of_entries(order: Schedule, operands: _Operands) -> _OfEntries:
    """What belongs to the entries of a schedule, in its order."""
    cols, rows = order.cols, order.rows
    nq, block_q = operands.query.shape[0], operands.query.shape[-2]
    block_kv = operands.key.shape[-2]
    if rows is None:
        rows = np.arange(nq, dtype=np.int32)[None]
    rows = rows[..., None]

    def entries_first(x):
        return jnp.moveaxis(x, (3, 4, 5), (0, 1, 2))

    dense, distances, tiles, gates = operands.dense, operands.distances, operands.tiles, operands.gates
    if dense is not None:
        of_rows, of_cols = (
            index if dense.shape[axis] > 1 else 0 * index for index, axis in ((rows + 0 * cols, 3), (cols, 5))
        )
        dense = dense[:, :, :, of_rows, :, of_cols, :]
    if distances is not None:
        begin = (cols * block_kv + (nq - 1 - rows) * block_q)[..., None]
        window = of_rank(np.arange(block_q + block_kv - 1, dtype=np.int32), begin.ndim)
        distances = entries_first(distances.at[..., begin + window].get(**IN_BOUNDS))
    if tiles is not None:
        # A negative number adds nothing; one past the last adds the last.
        number = operands.numbers[0, 0, 0][order.positions]
        tiles = entries_first(tiles.at[:, :, :, jnp.clip(number, 0, tiles.shape[3] - 1)].get(**IN_BOUNDS))
        tiles = jnp.where((number < 0)[(..., *[None] * 5)], 0, tiles)
    if gates is not None:
        gates = entries_first(gates[..., order.positions])
    return _OfEntries(dense, distances, tiles, gates)


def _logits(operands: _Operands, entries: Schedule, extras: _OfEntries, static: _Static) -> tuple[Array, Array]:
    """Logits of a step's entries and which pairs attend, ``[chunk, b, k, g, block_q, width * block_kv]``.

    What attends is broadcastable to that.
    """
    keys = _side_by_side(take(operands.key, entries.cols), -2)
    queries = _of_rows(operands.query, entries)
    product = functools.partial(jnp.einsum, "cbkgqd,cbksd->cbkgqs")
    soft_cap, size = static.soft_cap, queries.shape[-1] - static.features
    if soft_cap is None:
        logits = product(queries, keys)
    else:
        logits = soft_cap * jnp.tanh(product(queries[..., :size], keys[..., :size]) / soft_cap)
        if static.features:
            logits = logits + product(queries[..., size:], keys[..., size:])
    block_q, block_kv = logits.shape[-2], operands.key.shape[-2]
    for bias in (extras.dense, extras.tiles):
        if bias is not None:
            logits = logits + _of_pairs(bias, block_kv)
    if extras.distances is not None:
        logits = logits + _of_pairs(_diagonals(extras.distances, block_q, block_kv), block_kv)
    if static.score_function is not None:
        queries, keys = _positions(entries, block_q, block_kv)
        indices = (
            operands.examples[None, :, None, None, None, None],
            operands.heads[None, None, :, :, None, None],
            queries[:, None, None, None, :, None],
            keys[:, None, None, None, None, :],
        )
        scored = jnp.asarray(static.score_function(logits, *indices))
        logits = jnp.broadcast_to(scored.astype(logits.dtype), logits.shape)

    attends = _of_each_key(entries.tiles > NOTHING, block_kv)[:, None, None, None, None]
    if operands.q_end is not None or operands.kv_end is not None:
        queries, keys = _positions(entries, block_q, block_kv)
        if operands.q_end is not None:
            attends &= (queries[:, None] < operands.q_end[None, :, None])[:, :, None, None, :, None]
        if operands.kv_end is not None:
            attends &= (keys[:, None] < operands.kv_end[None, :, None])[:, :, None, None, None, :]
    if operands.bit_tiles.shape[0]:
        # The tile of a full block is clipped, and overruled below.
        words = _side_by_side(operands.bit_tiles.at[entries.tiles].get(mode="clip", wrap_negative_indices=False), -1)
        bits = (words[..., None] >> of_rank(np.arange(32, dtype=np.uint32), words.ndim + 1)) & 1
        bits = bits.astype(bool).reshape((*words.shape[:-1], -1))
        attends &= bits | _of_each_key(entries.tiles < 0, block_kv)[:, None, None, None, None]
    return logits, attends


def _side_by_side(x: Array, axis: int) -> Array:
    """``[chunk, width, .., n, ..]`` to ``[chunk, .., width * n, ..]``: the blocks of a row as one, along ``axis``."""
    if x.shape[1] == 1:
        return x[:, 0]
    x = jnp.moveaxis(x, 1, axis - 1)
    axis %= x.ndim
    return x.reshape((*x.shape[: axis - 1], -1, *x.shape[axis + 1 :]))


def _of_pairs(x: Array, block_kv: int) -> Array:
    """Bias ``[chunk, width, b, k, g, block_q|1, block_kv|1]`` to ``[chunk, b, k, g, block_q|1, width * block_kv|1]``.

    Only a width of 1 leaves a last dimension of 1.
    """
    if x.shape[1] > 1 and x.shape[-1] != block_kv:
        x = jnp.broadcast_to(x, (*x.shape[:-1], block_kv))
    return _side_by_side(x, -1)


def _diagonals(windows: Array, block_q: int, block_kv: int) -> Array:
    """``[.., block_q + block_kv - 1]`` to ``[.., block_q, block_kv]``: element [q, k] is k - q + block_q - 1.

    Rows that are one shorter than what they repeat begin one earlier each: no gather, and the transpose is a sum.
    """
    lead, length = windows.shape[:-1], windows.shape[-1]
    rows = jnp.pad(windows.reshape(-1, 1, length), [(0, 0), (0, 0), (0, 1)])
    rows = jnp.broadcast_to(rows, (rows.shape[0], block_q, length + 1)).reshape(rows.shape[0], -1)
    rows = rows[:, : block_q * length].reshape(-1, block_q, length)
    return rows[..., block_q - 1 :].reshape(*lead, block_q, block_kv)


def _positions(entries: Schedule, block_q: int, block_kv: int) -> tuple[Array, Array]:
    """Positions of a step's queries ``[chunk, block_q]`` and keys ``[chunk, width * block_kv]``."""
    rows = jnp.arange(entries.cols.shape[0], dtype=jnp.int32) if entries.rows is None else entries.rows
    queries = rows[:, None] * block_q + jnp.arange(block_q, dtype=jnp.int32)[None]
    keys = entries.cols[..., None] * block_kv + jnp.arange(block_kv, dtype=jnp.int32)[None, None]
    return queries, _side_by_side(keys, -1)


def _dropout_factors(operands: _Operands, entries: Schedule, block_q: int, threshold: int, dtype: Any) -> Array:
    """The factors of a step's pairs, ``[chunk, b, k, g, block_q, width * block_kv]``."""
    queries, keys = _positions(entries, block_q, operands.key.shape[-2])
    queries, keys = queries[:, None, None, None, :, None], keys[:, None, None, None, None, :]
    of_queries = dropout.query_words(operands.dropout_keys[None, ..., None, None], queries)
    return dropout.factors(of_queries, dropout.key_words(keys), queries, keys, threshold, dtype)


def _of_each_key(x: Array, block_kv: int) -> Array:
    """``[chunk, width, ..]``, one number per block, to ``[chunk, .., width * block_kv]`` (or 1 for a width of 1)."""
    x = jnp.moveaxis(x, 1, -1)
    return x if x.shape[-1] == 1 else jnp.repeat(x, block_kv, axis=-1)


def _gated(weights: Array, gates: Array, block_kv: int) -> Array:
    """Weights ``[chunk, b, k, g, block_q, width * block_kv]`` times gates ``[chunk, width, b|1, k|1, g|1]``.

    In as few dimensions as there are: the gradient of gates is a sum over queries and keys, and XLA's CPU crashed in
    sums over an inner one of eight dimensions (jaxlib 0.10.2), which these are under two `vmap` of `_map_lists`.
    """
    chunk, width = gates.shape[:2]
    lead = (chunk, *(n for n in (weights.shape[1], weights.shape[2] * weights.shape[3]) if n > 1))
    gates = jnp.broadcast_to(gates, (chunk, width, *weights.shape[1:4]))
    gates = jnp.moveaxis(gates, 1, -1).reshape((*lead, 1, width, 1))
    return (weights.reshape((*lead, -1, width, block_kv)) * gates).reshape(weights.shape)


def _of_rows(x: Array, entries: Schedule) -> Array:
    return x if entries.rows is None else take(x, entries.rows)


def _isolate(x: Array) -> tuple[Array, Array]:
    """Splits vectors (last axis) into finite operands and flaws: NaN to be added wherever a flawed one is attended to.

    A vector with a NaN or infinity becomes zero, so that as an operand it meets no zero probability.
    """
    fixed = lax.stop_gradient(x)
    flaw = (fixed - fixed).sum(-1)  # 0 or NaN; a comparison of each number, reduced, takes XLA's CPU 0.1 s to compile
    return _where_sound(flaw == 0, x), jnp.where(flaw == 0, 0, jnp.nan).astype(x.dtype)


@jax.custom_jvp
def _where_sound(sound: Array, x: Array) -> Array:
    return jnp.where(sound[..., None], x, 0)


@_where_sound.defjvp
def _where_sound_jvp(primals, tangents):
    # The identity, not zero: what attends to a flawed vector has a NaN cotangent for it, which must arrive.
    return _where_sound(*primals), tangents[1]


def _finite_or_zero(row_max: Array) -> Array:
    """Row maxima as safe subtrahends: -inf (nothing attended to) becomes 0, NaN stays."""
    return jnp.where(jnp.isneginf(row_max), 0, row_max)
