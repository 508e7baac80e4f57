"""Block-sparse attention in plain JAX: the ``"xla"`` implementation.

Place on the path: ``_dispatch`` picks it where no native kernel can take the call, and it is what native kernels are
compared with. Made of ordinary differentiable JAX, so it has every derivative (forward, reverse, higher orders, of
``bias`` and ``sinks`` too) and every transformation, on any platform and floating dtype.

The ragged block list is walked as one flat sequence of entries (query block, key block, bit tile), a fixed number of
entries per step of a ``lax.scan``: however skewed the rows are, the work follows the number of entries. Two walks:

1. the maximum of each row's logits, outside of differentiation (the results do not depend on it);
2. with the maximum ``m`` fixed, the sums ``l = sum exp(s - m)`` and ``acc = sum exp(s - m) v``.

The second walk is linear in what it carries, so reverse mode need not keep the carry of every step, and each step is a
``jax.checkpoint``: its probabilities are computed again in the backward. Hence memory is linear in the lengths. The
usual single walk (online softmax) multiplies its carry by a data-dependent factor and would have to keep it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jax_bsk import _compat
from jax_bsk._shapes import of_rank
from jax_bsk.masks import _explicit
from jax_bsk.masks._run_mask import RunBlockMask

if TYPE_CHECKING:
    from jax_bsk.masks import BlockMask


def sparse_attention_xla(
    query: Array,
    key: Array,
    value: Array,
    mask: BlockMask,
    *,
    bias: Array | None,
    lengths: Array | None,
    sinks: Array | None,
    scale: float | Array,
    soft_cap: float | None,
    gates: Array | None = None,
) -> tuple[Array, Array]:
    """Attention over the visited blocks of ``mask``; arguments are trusted to be validated by the caller.

    Args:
        query: ``[B, T, N, H]``.
        key: ``[B, S, K, H]``, K dividing N.
        value: ``[B, S, K, Hv]``.
        mask: block lists with leading dims ``[B|1, N|1]`` and bit tiles with leading dims ``[B|1, N|1]`` of their own.
            A row of blocks whose list is invalid gives NaN.
        bias: ``[B|1, N|1, T, S]``, added to the logits after the soft cap (so that -inf masks), or None.
        lengths: int32 ``[B|1, 2]``, the valid queries and keys of each example, or None.
        sinks: ``[N]``, a logit per head which takes part in the denominator only, or None.
        scale: factor of the products of queries and keys.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``, or None.
        gates: ``[B|1, N|1, capacity]``, a factor of each listed block's normalised probabilities, or None.

    Returns:
        out ``[B, T, N, Hv]`` in the dtype of ``query`` and lse ``[B, N, T]``, float32 (float64 for float64).
    """
    batch, q_len, heads, _ = query.shape
    kv_len, kv_heads, v_size = key.shape[1], key.shape[2], value.shape[-1]
    stats_dtype = _softmax_dtype(query.dtype)
    if 0 in (batch, q_len, heads, kv_heads):
        return jnp.zeros((batch, q_len, heads, v_size), query.dtype), jnp.zeros((batch, heads, q_len), stats_dtype)
    if kv_len == 0:  # nothing to gather blocks from: one key block that no length reaches
        pad = [(0, 0), (0, 1), (0, 0), (0, 0)]
        key, value = jnp.pad(key, pad), jnp.pad(value, pad)
        bias = gates = None
    if isinstance(mask, RunBlockMask):  # made on the host with no more room than it needs
        row_offsets, kv_blocks, tiles, known = *mask._kernel_rows(), True
    else:
        row_offsets, kv_blocks, tiles, known = _trim(mask.row_offsets, mask.kv_blocks, mask.tiles)
    attend = functools.partial(
        _attention, block_q=mask.block_q, block_kv=mask.block_kv, kv_len=kv_len, skip_steps=not known
    )
    arguments = query, key, value, bias, gates, lengths, sinks, scale, soft_cap
    lists = row_offsets, kv_blocks, tiles, mask.bit_tiles
    arrays = jax.tree.leaves((arguments, lists))
    if not _explicit.shards(arrays):
        return attend(*arguments, *lists)
    # On an explicit mesh every gather, search and carry would need a sharding: XLA partitions them by itself.
    examples, queries, head_axes = (*jax.typeof(query).sharding.spec, None, None, None)[:3]
    shardings = PartitionSpec(examples, queries, head_axes), PartitionSpec(examples, head_axes, queries)
    partitioned: Any = jax.sharding.auto_axes(attend, out_sharding=shardings)
    with _explicit.mesh_of(arrays):
        return partitioned(*arguments, *lists)


def _softmax_dtype(dtype: Any) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _trim(row_offsets: Array, kv_blocks: Array, tiles: Array) -> tuple[Array, Array, Array, bool]:
    """Cuts the padding off lists whose values are known now, so that no step is spent on it."""
    if not all(_is_known(x) for x in (row_offsets, kv_blocks, tiles)) or row_offsets.size == 0:
        return row_offsets, kv_blocks, tiles, False
    capacity = kv_blocks.shape[-1]
    # An offset past the capacity must remain past it: the row is poisoned, not cut.
    used = int(np.asarray(row_offsets).max())
    if not 0 <= used < capacity:
        return row_offsets, kv_blocks, tiles, used == capacity
    return row_offsets, kv_blocks[..., :used], tiles[..., :used], True


def _is_known(x: Any) -> bool:
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


class _Schedule(NamedTuple):
    """The flat sequence of entries of each list; leading dims ``[Lb, Lk, Lg]``: batch, kv heads, group (or 1)."""

    rows: Array  # [..., steps, chunk] query block, ascending
    cols: Array  # [..., steps, chunk] key block
    tiles: Array  # [..., steps, chunk] bit tile, -1 = full
    visit: Array  # [..., steps, chunk] False for padding and for entries of poisoned rows
    entries: Array | None  # [..., steps, chunk] where the entry stands in the list; None where nobody asks


class _Operands(NamedTuple):
    """Blocked operands in the softmax dtype; b, k, g are batch, kv heads and group (1 where mapped or shared).

    Fields are arrays, or axes of them (`_OPERAND_AXES`).
    """

    query: Any  # [nq, b, k, g, block_q, H], times scale
    key: Any  # [nk, b, k, block_kv, H]
    value: Any  # [nk, b, k, block_kv, Hv]
    query_flaw: Any  # [nq, b, k, g, block_q], NaN where the row of ``query`` was not finite, else 0
    key_flaw: Any  # [nk, b, k, block_kv]
    value_flaw: Any  # [nk, b, k, block_kv]
    bit_tiles: Any  # uint32 [n, b, k, g, block_q, block_kv / 32]
    bias: Any  # [b, k, g, nq, block_q, nk, block_kv]
    gates: Any  # [b, k, g, capacity]
    q_end: Any  # int32 [b], valid queries
    kv_end: Any  # int32 [b], valid keys


# Axes of (b, k, g) in each field above, for mapping over lists; None: the field has no such axis.
_LIST_AXES = (0, 1, 2)
_OPERAND_AXES = _Operands(
    query=(1, 2, 3),
    key=(1, 2, None),
    value=(1, 2, None),
    query_flaw=(1, 2, 3),
    key_flaw=(1, 2, None),
    value_flaw=(1, 2, None),
    bit_tiles=(1, 2, 3),
    bias=(0, 1, 2),
    gates=(0, 1, 2),
    q_end=(0, None, None),
    kv_end=(0, None, None),
)


@jax.jit(static_argnames=("block_q", "block_kv", "kv_len", "skip_steps"))
def _attention(
    query,
    key,
    value,
    bias,
    gates,
    lengths,
    sinks,
    scale,
    soft_cap,
    row_offsets,
    kv_blocks,
    tiles,
    bit_tiles,
    *,
    block_q: int,
    block_kv: int,
    kv_len: int,
    skip_steps: bool,
):
    batch, q_len, heads, _ = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    dtype = _softmax_dtype(query.dtype)
    nq, nk = -(-q_len // block_q), -(-key.shape[1] // block_kv)

    def split_heads(x, axis):
        """[.., N|1, ..] to [.., K|1, G|1, ..]."""
        dims = (kv_heads, group) if x.shape[axis] == heads else (1, 1)
        return x.reshape(x.shape[:axis] + dims + x.shape[axis + 1 :])

    def blocked(x, n, block):
        """[B, L, K.., D] to [n, B, K.., block, D] in the softmax dtype, which also holds the sums of cotangents."""
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, n * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape((x.shape[0], n, block, *x.shape[2:]))
        return jnp.moveaxis(x, (1, 2), (0, -2))

    if bias is not None:
        bias = bias.astype(dtype)
        bias = jnp.pad(
            bias, [(0, 0), (0, 0), (0, nq * block_q - bias.shape[2]), (0, nk * block_kv - bias.shape[3])]
        ).reshape((*bias.shape[:2], nq, block_q, nk, block_kv))
        bias = split_heads(bias, 1)
    if gates is not None:
        gates = split_heads(gates.astype(dtype), 1)
    if lengths is None:
        q_end, kv_end = jnp.array([q_len]), jnp.array([kv_len])
    else:
        q_end, kv_end = jnp.minimum(lengths[:, 0], q_len), jnp.minimum(lengths[:, 1], kv_len)
    q, q_flaw = _isolate(blocked(split_heads(query, 2), nq, block_q))
    k, k_flaw = _isolate(blocked(key, nk, block_kv))
    v, v_flaw = _isolate(blocked(value, nk, block_kv))
    operands = _Operands(
        query=q * jnp.asarray(scale, dtype),
        key=k,
        value=v,
        query_flaw=q_flaw,
        key_flaw=k_flaw,
        value_flaw=v_flaw,
        bit_tiles=split_heads(jnp.moveaxis(bit_tiles, 2, 0), 2),
        bias=bias,
        gates=gates,
        q_end=q_end.astype(jnp.int32),
        kv_end=kv_end.astype(jnp.int32),
    )

    schedule, used, poisoned = _schedule(
        split_heads(row_offsets, 1),
        split_heads(kv_blocks, 1),
        split_heads(tiles, 1),
        nk,
        bit_tiles.shape[2],
        with_entries=gates is not None,
    )
    # Lists of a fixed capacity (traced ones) may be mostly padding: steps past the longest list are skipped.
    steps, chunk = schedule.rows.shape[-2:]
    active = jnp.arange(steps, dtype=jnp.int32) * chunk < used.max() if skip_steps else None
    row_max, total, acc = _map_lists(_walk, schedule, operands, soft_cap, active)

    position = jnp.arange(nq * block_q, dtype=jnp.int32).reshape(nq, 1, 1, 1, block_q)
    valid = position < operands.q_end[None, :, None, None, None]
    if sinks is not None:
        sink = sinks.astype(dtype).reshape(1, 1, kv_heads, group, 1)
        # The walk was relative to its own maximum; a greater sink shrinks it, and out of reach it counts as nothing.
        new_max = jnp.maximum(row_max, lax.stop_gradient(sink))
        rescale = jnp.exp(row_max - _finite_or_zero(new_max))
        row_max = new_max
        total = total * rescale + jnp.where(valid, jnp.exp(sink - _finite_or_zero(row_max)), 0)
        acc = acc * rescale[..., None]
    row_max = _finite_or_zero(row_max)
    empty = total == 0
    safe_total = jnp.where(empty, 1, total)
    # A row with a NaN is NaN through acc. Its reciprocal stays finite all the same, since the cotangent of acc, which
    # is multiplied by it, reaches keys that the row does not attend to (with a zero probability, and 0 * NaN is NaN).
    flawed = ~jnp.isfinite(safe_total)
    reciprocal = jnp.where(flawed, 1, 1 / safe_total)
    out = acc * reciprocal[..., None]
    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(safe_total))

    # NaN for the rows of an invalid list, as a product with the query such that dq is NaN as well.
    poison = jnp.where(jnp.moveaxis(poisoned, -1, 0)[..., None], jnp.nan, 0).astype(dtype)
    poison = poison * (q.sum(-1) / max(q.shape[-1], 1))
    out, lse = out + poison[..., None], lse + poison

    out = jnp.moveaxis(out, (0, -2), (1, 2)).reshape(batch, nq * block_q, heads, -1)[:, :q_len]
    lse = jnp.moveaxis(lse, 0, -2).reshape(batch, heads, nq * block_q)[..., :q_len]
    return out.astype(query.dtype), lse


def _schedule(row_offsets: Array, kv_blocks: Array, tiles: Array, nk: int, n_tiles: int, with_entries: bool):
    """Flattens lists ``[Lb, Lk, Lg, ..]``; returns the schedule, the entries used and the poisoned rows of each.

    Overlapping rows (decreasing offsets) can name more entries than the capacity: rows past it are poisoned too.
    """
    nq, capacity = row_offsets.shape[-1] - 1, kv_blocks.shape[-1]
    # About one entry a row and step: what a step does beside its entries (walking the whole carry, and in the backward
    # the whole cotangents of keys and values) is then a small part of its products, and memory is linear in length.
    chunk = max(1, min(nq, capacity))
    steps = -(-capacity // chunk)

    def one(offsets, kv_blocks, tiles):
        start, end = offsets[:-1], offsets[1:]
        bad_row = (start < 0) | (end < start) | (end > capacity)
        counts = jnp.where(bad_row, 0, end - start)
        ends = jnp.cumsum(counts)
        bad_row |= ends > capacity
        slot = jnp.arange(steps * chunk, dtype=jnp.int32)
        rows = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), nq - 1).astype(jnp.int32)
        if capacity == 0:
            empty = jnp.zeros((0, chunk), jnp.int32)
            return _Schedule(empty, empty, empty, empty.astype(bool), None), ends[-1], bad_row
        entry = jnp.clip((start - ends + counts)[rows] + slot, 0, capacity - 1)
        cols, tiles = kv_blocks[entry], tiles[entry]
        visit = slot < ends[-1]
        bad_entry = visit & ((cols < 0) | (cols >= nk) | (tiles < -1) | (tiles >= n_tiles))
        bad_row = bad_row.at[rows].max(bad_entry)
        visit &= ~bad_row[rows]
        fields = _Schedule(rows, jnp.clip(cols, 0, nk - 1), tiles, visit, entry if with_entries else None)
        return jax.tree.map(lambda x: x.reshape(steps, chunk), fields), ends[-1], bad_row

    return jax.vmap(jax.vmap(jax.vmap(one)))(row_offsets, kv_blocks, tiles)


def _map_lists(walk, schedule: _Schedule, operands: _Operands, soft_cap, active):
    """Runs ``walk`` once for a list that is shared, and mapped over batch or heads where each has its own."""

    def call(level, schedule, operands):
        if level == 3:
            return walk(jax.tree.map(lambda x: x[0, 0, 0], schedule), operands, soft_cap, active)
        axis = _LIST_AXES[level]
        if schedule.rows.shape[axis] == 1:
            return call(level + 1, schedule, operands)

        def mapped_axis(x, axes):  # a field of size 1 serves all the lists as it is
            return None if x is None or axes[level] is None or x.shape[axes[level]] == 1 else axes[level]

        def restore(x, axis):  # vmap takes the axis away, the walk expects it with size 1
            return x if axis is None else jnp.expand_dims(x, axis)

        in_axes = _Operands(*(mapped_axis(x, axes) for x, axes in zip(operands, _OPERAND_AXES, strict=True)))

        def one(schedule, operands):
            schedule = jax.tree.map(lambda x: jnp.expand_dims(x, axis), schedule)
            operands = _Operands(*(restore(x, a) for x, a in zip(operands, in_axes, strict=True)))
            return jax.tree.map(lambda x: jnp.squeeze(x, level + 1), call(level + 1, schedule, operands))

        return jax.vmap(one, in_axes=(axis, in_axes), out_axes=level + 1)(schedule, operands)

    return call(0, schedule, operands)


def _walk(schedule: _Schedule, operands: _Operands, soft_cap, active) -> tuple[Array, Array, Array]:
    """One list over its operands: row maximum and sums relative to it, ``[nq, b, k, g, block_q]`` and ``[.., Hv]``."""
    query, value = operands.query, operands.value
    # All of the blocks of bias that are visited at once: they are xs of the scans, so that the cotangent of bias is put
    # together by one scatter. Gathered step by step, each step would add an array of the size of the whole bias.
    bias = operands.bias
    if bias is not None:
        bias = bias[:, :, :, schedule.rows, :, schedule.cols, :]  # [steps, chunk, b, k, g, block_q, block_kv]
    gates = operands.gates
    if gates is not None and schedule.entries is not None:  # likewise
        gates = jnp.moveaxis(gates[..., schedule.entries], (-2, -1), (0, 1))  # [steps, chunk, b, k, g]
    schedule, operands = schedule._replace(entries=None), operands._replace(gates=None)
    xs = (schedule, bias, gates, active)

    def scan(body, init):
        leaves, tree = jax.tree.flatten(init)
        # A step that is skipped hands on what it was given, which must vary over a mesh as what a step makes.
        leaves = _compat.match_varying(*leaves, *jax.tree.leaves((xs, operands, soft_cap)))[: len(leaves)]

        def step(carry, x):
            schedule, bias, gates, active = x
            if active is None:
                return body(carry, schedule, bias, gates), None
            return lax.cond(active, lambda c: body(c, schedule, bias, gates), lambda c: c, carry), None

        init = tree.unflatten(leaves)
        return lax.scan(step, init, xs)[0] if schedule.rows.shape[0] else init

    def maximum(row_max, entries, bias, gates):
        del gates  # of normalised probabilities: no logit knows of them
        logits, attends = _logits(lax.stop_gradient(operands), entries, lax.stop_gradient(bias), soft_cap)
        found = jnp.where(attends, logits, -jnp.inf).max(-1)
        return row_max.at[entries.rows].max(found, indices_are_sorted=True, mode="promise_in_bounds")

    @jax.checkpoint
    def contributions(operands, row_max, entries, bias, gates, soft_cap):
        logits, attends = _logits(operands, entries, bias, soft_cap)
        relative = logits - _take(row_max, entries.rows)[..., None]
        # Zeros twice: without the inner one, a masked pair's exp might be inf and its derivative 0 * inf.
        probs = jnp.where(attends, jnp.exp(jnp.where(attends, relative, 0)), 0)
        value_flaw = _take(operands.value_flaw, entries.cols)[:, :, :, None, None, :]
        weights = probs + jnp.where(attends, value_flaw, 0)
        if gates is not None:  # a NaN among them reaches only the rows that attend to its block
            weights = jnp.where(attends, weights * gates[..., None, None], 0)
        return probs.sum(-1), jnp.einsum("cbkgqs,cbksd->cbkgqd", weights, _take(operands.value, entries.cols))

    def add(carry, entries, bias, gates):
        parts = contributions(operands, safe_max, entries, bias, gates, soft_cap)
        return jax.tree.map(
            lambda c, x: c.at[entries.rows].add(x, indices_are_sorted=True, mode="promise_in_bounds"), carry, parts
        )

    row_max = scan(maximum, jnp.full_like(lax.stop_gradient(query[..., 0]), -jnp.inf))
    row_max = lax.stop_gradient(row_max)
    safe_max = _finite_or_zero(row_max)
    zero = jnp.zeros_like(safe_max)
    total, acc = scan(add, (zero, jnp.zeros(zero.shape + value.shape[-1:], zero.dtype)))
    return row_max, total, acc


def _logits(operands: _Operands, entries: _Schedule, bias, soft_cap) -> tuple[Array, Array]:
    """Logits ``[chunk, b, k, g, block_q, block_kv]`` of a step's entries, and which pairs attend (broadcastable)."""
    logits = jnp.einsum("cbkgqd,cbksd->cbkgqs", _take(operands.query, entries.rows), _take(operands.key, entries.cols))
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias
    logits = logits + _take(operands.query_flaw, entries.rows)[..., None]
    logits = logits + _take(operands.key_flaw, entries.cols)[:, :, :, None, None, :]

    block_q, block_kv = logits.shape[-2:]
    q_pos = entries.rows[:, None] * block_q + jnp.arange(block_q, dtype=jnp.int32)[None]  # [chunk, block_q]
    kv_pos = entries.cols[:, None] * block_kv + jnp.arange(block_kv, dtype=jnp.int32)[None]
    attends = (q_pos[:, None] < operands.q_end[None, :, None])[:, :, None, None, :, None]
    attends &= (kv_pos[:, None] < operands.kv_end[None, :, None])[:, :, None, None, None, :]
    attends &= entries.visit[:, None, None, None, None, None]
    if operands.bit_tiles.shape[0]:
        words = _take(operands.bit_tiles, entries.tiles)  # a full block's -1 is clipped, and overruled below
        bits = (words[..., None] >> of_rank(np.arange(32, dtype=np.uint32), words.ndim + 1)) & 1
        bits = bits.astype(bool).reshape((*words.shape[:-1], block_kv))
        attends &= bits | (entries.tiles < 0)[:, None, None, None, None, None]
    return logits, attends


def _take(x: Array, blocks: Array) -> Array:
    return x.at[blocks].get(mode="clip")


@jax.custom_jvp
def _zero_flawed(x: Array) -> Array:
    """Vectors (last axis) with a NaN or infinity become zero, so that as operands they meet no zero probability."""
    return jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0)


@_zero_flawed.defjvp
def _zero_flawed_jvp(primals, tangents):
    # The identity, not zero: what attends to a flawed vector has a NaN cotangent for it, which must arrive.
    return _zero_flawed(*primals), tangents[0]


def _isolate(x: Array) -> tuple[Array, Array]:
    """Splits vectors into finite operands and flaws: NaN to be added wherever a flawed vector is attended to."""
    flaw = jnp.where(jnp.isfinite(lax.stop_gradient(x)).all(-1), 0, jnp.nan).astype(x.dtype)
    return _zero_flawed(x), flaw


def _finite_or_zero(row_max: Array) -> Array:
    """Row maxima as safe subtrahends: -inf (nothing attended to) becomes 0, NaN stays."""
    return jnp.where(jnp.isneginf(row_max), 0, row_max)
