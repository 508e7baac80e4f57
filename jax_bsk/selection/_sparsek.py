"""SparseK attention's selection (arXiv 2406.16747): a window, and the best of the key blocks before it, with gates."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, of_rank
from jax_bsk.core.inputs import floating
from jax_bsk.lists import native
from jax_bsk.masks import BlockMask, CausalMask, Mask, as_block_mask
from jax_bsk.masks.grid import MAX_LENGTH, OWN, Grid, grid_of
from jax_bsk.selection._prefixes import CHUNK, take, top_of_prefixes
from jax_bsk.selection.candidates import EMPTY, both, candidates_of, either, restricted
from jax_bsk.selection.choice import choose_listed, per_table
from jax_bsk.selection.inputs import block_means, positive
from jax_bsk.selection.soft_topk import solve
from jax_bsk.selection.soft_topk_causal import sparsek_causal

Gate = Literal["straight-through", "soft"]


def sparsek(
    scores: ArrayLike,
    *,
    top_k: int = 8,
    window: int = 512,
    gate: Gate = "straight-through",
    candidates: int | None = None,
    q_len: int | None = None,
    block_size: int | tuple[int, int] = 128,
    mask: Mask | None = None,
    always: Mask | None = None,
) -> tuple[BlockMask, jax.Array]:
    """A sliding window and the key blocks of highest score before it: SparseK's choice (Lou et al., arXiv 2406.16747).

    The score z of a key block is the mean of its keys' scores. A query block may choose among the key blocks that lie
    wholly before its window. SparseK over these, which are a prefix of all, gives each block

        p = clip(z - tau, 0, 1), with tau such that sum(p) = k

    and the hard choice takes the k blocks of highest z, which are those of highest p, of equal ones the lower. Blocks
    of the window have a gate of 1. Those chosen have 1 as well, with the derivative of p ("straight-through"), or p
    itself ("soft"): so the attention's gradient reaches the scores of the chosen and, through tau, of all blocks with
    0 < p < 1. A row with k blocks to choose from, or fewer, takes all of them, with p = 1 and no derivative.

    The window is counted in whole key blocks: that of query block i begins with the block of the key
    i block_q - window + 1. So each query sees itself and at least the window - 1 keys before it, and every key is in
    the window or in a block that may be chosen.

    Costs, with n key blocks: lists and the hard choice are linear in n. For exact thresholds the whole of each prefix
    is searched, n^2 numbers per head (10^6 for 131,072 tokens in blocks of 128) some 60 times over, a part at a time in
    memory. With `candidates` thresholds are linear, too.

    Args:
      scores: [B, S, G] or [S, G], floating, one per key and head; G heads have lists of their own. Finite, or -inf: a
        block with a score of -inf is never chosen. NaN and +inf make NaN of the rows that choose among them.
      top_k: blocks chosen in each row, k above, at least 1.
      window: tokens, at least 1.
      gate: "straight-through" or "soft".
      candidates: number of the best blocks that are remembered for the threshold, at least top_k; None for all. Where
        more than these have a part in it (0 < p), thresholds are too low: soft gates sum to more than top_k.
      q_len: queries, query t at position t; S by default.
      block_size: block size of the lists, as in `BlockMask.from_mask`.
      mask: lazy mask that restricts window and choice, or None: blocks that it leaves empty are never visited, and the
        elements of the others are masked by it, besides causality. It may hold traced arrays (`SegmentMask(ids)` of
        documents) and differ per example and head of scores.
      always: lazy mask, or None: blocks that it visits are in each row besides the window and the top_k, with a gate of
        1, where `mask` leaves them open. `GlobalMask(4)` makes the first tokens sinks. They are visited as whole
        blocks. With `mask` or `always` each row is compared with all key blocks, n numbers per row and head in memory,
        and `candidates` has no meaning.

    Returns:
      A causal `BlockMask` [B, G], without gradient, whose lists cannot overflow: room for the window and top_k blocks
      per row; and the gates of its entries, [B, G, capacity] in the statistics type, 1 past the lists' ends. Where no
      query is further than the window, both are [1, 1, ...], known beforehand and without gradient.

    Raises:
      TypeError, ValueError: an argument does not fit.

    Examples:
      >>> import jax
      >>> from jax_bsk.selection import sparsek
      >>> scores = jax.random.normal(jax.random.key(0), (1, 512, 2))  # for each key, of two heads
      >>> mask, gates = sparsek(scores, top_k=2, window=64, block_size=64)
      >>> mask.row_offsets[0, 0].tolist(), gates.shape == mask.kv_blocks.shape
      ([0, 1, 3, 6, 10, 14, 18, 22, 26], True)
    """
    array = floating(scores, "scores")
    if array.ndim not in (2, 3):
        raise ValueError(f"scores are [batch, keys, heads] or [keys, heads], got {array.shape}; add the heads")
    array = array[None] if array.ndim == 2 else array
    restricts = mask is not None or always is not None
    if gate not in ("straight-through", "soft"):
        raise ValueError(f"gate is 'straight-through' or 'soft', got {gate!r}; choose one")
    top_k, window = positive(top_k, "top_k"), positive(window, "window")
    if candidates is not None and positive(candidates, "candidates") < top_k:
        raise ValueError(f"candidates is at least top_k={top_k}, got {candidates}; None takes all blocks")

    grid = grid_of(array.shape[1] if q_len is None else q_len, array.shape[1], block_size)
    sizes = _Sizes(grid.q_len, grid.kv_len, (grid.block_q, grid.block_kv), window)
    known = _known(sizes)
    blocks = int(known.prefixes.max(initial=0))
    means = block_means(array[..., None], known.window.block_kv)[..., 0]
    if restricts:
        return _choose_restricted(jnp.swapaxes(means, 1, 2), sizes, top_k, gate, mask, always)
    if not blocks:
        return known.window, jnp.ones((1, 1, known.window.kv_blocks.shape[-1]), means.dtype)

    def choose(means: jax.Array) -> tuple[_Lists, jax.Array]:
        return _choose_heads(means, sizes, top_k, gate, candidates)

    lists, gates = explicit_mesh.call(choose, [jnp.swapaxes(means[:, :blocks], 1, 2)], ["bh"])
    return dataclasses.replace(known.window, **lists._asdict()), gates


class WindowBlocksMask(Mask):
    """Attends to whole key blocks: those from the first key of the window of the first query of each query block on.

    Bound with the same block size, no block is partly attended.
    """

    window: int
    block_size: tuple[int, int]

    def __init__(self, window: int, block_size: tuple[int, int]) -> None:
        self._set(window=window, block_size=block_size)

    def first_block(self, q: Array) -> Any:
        """The first key block of query q; may be negative."""
        block_q, block_kv = self.block_size
        return (q // block_q * block_q - (min(self.window, MAX_LENGTH) - 1)) // block_kv

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        q_low, q_high = grid.q_bounds(i)
        k_low, k_high = (k // self.block_size[1] for k in grid.kv_bounds(j))
        return grid.code(k_high < self.first_block(q_low), k_low >= self.first_block(q_high), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return k // self.block_size[1] >= self.first_block(q)


class _Sizes(NamedTuple):
    """The numbers that decide shapes and windows."""

    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    window: int


class _Known(NamedTuple):
    """The facts of a choice that are known before its scores, on the host, for each query block.

    Attributes:
      window: lists and bit tiles of the window.
      prefixes: int32 [nq], key blocks that lie wholly before the row's window.
      partial: int32 [nq], entries of the window's row that have a bit tile, its first.
    """

    window: BlockMask
    prefixes: np.ndarray
    partial: np.ndarray


class _Lists(NamedTuple):
    """The arrays of a `BlockMask` that depend on the scores."""

    row_offsets: jax.Array
    kv_blocks: jax.Array
    tiles: jax.Array


def _known(sizes: _Sizes) -> _Known:
    q_len, kv_len, block_size, window = sizes
    blocks = WindowBlocksMask(window, block_size)
    bound = as_block_mask(CausalMask() & blocks, q_len, kv_len, batch=1, heads=1, block_size=block_size)
    first = blocks.first_block(np.arange(bound.nq, dtype=np.int64) * bound.block_q)
    offsets, tiles = bound.row_offsets[0, 0], bound.tiles[0, 0]
    before = np.concatenate([[0], np.cumsum(tiles >= 0)])[offsets]
    return _Known(bound, np.clip(first, 0, bound.nk).astype(np.int32), np.diff(before).astype(np.int32))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # one program where it is called outside of jit, too
def _choose_heads(
    z: jax.Array, sizes: _Sizes, top_k: int, gate: Gate, candidates: int | None
) -> tuple[_Lists, jax.Array]:
    """Lists and gates [B, G, ...] for scores [B, G, n]."""
    known = _known(sizes)
    return jax.vmap(jax.vmap(lambda z: _choose(z, known, top_k, gate, candidates)))(z)


def _choose(z: jax.Array, known: _Known, top_k: int, gate: Gate, candidates: int | None) -> tuple[_Lists, jax.Array]:
    """Lists and gates of one head.

    Args:
      z: [n], scores of the key blocks that any row may choose.
    """
    n = z.shape[0]
    z = jnp.where(z == jnp.inf, jnp.nan, z)  # differences of infinities are no thresholds
    width = min(top_k, n)
    empty, last = known.prefixes == 0, np.maximum(known.prefixes - 1, 0)
    chosen = jnp.where(empty[:, None], n, top_of_prefixes(z, width)[last])  # [nq, width], n where there is none
    valid = chosen < n

    # ---- gates ----
    # In a single chunk nothing was before it, so no room is needed for what is remembered.
    capacity = top_k if n <= CHUNK else candidates
    tau = take(sparsek_causal(z, top_k, capacity=capacity, chunk=CHUNK).tau, jnp.asarray(last))
    own = take(z, jnp.where(valid, chosen, 0).ravel()).reshape(chosen.shape)
    own, tau = jnp.where(valid, own, 0), jnp.where(valid, tau[:, None], 0)
    # A derivative strictly inside only, as `sparsek` has it, and inside as tau's derivative sees it: where no score is,
    # tau is a score less 1 without derivative, and the rounding of own - tau must not make that score one inside.
    gates = jnp.where(own - 1 >= tau, 1, jnp.where(own <= tau, 0, own - tau))  # a NaN stays
    if gate == "straight-through":
        gates = 1 + (gates - jax.lax.stop_gradient(gates))

    # ---- rows: partial blocks of the window, then the full ones: those chosen, all before it, and its own ----
    window = _Lists(*(x[0, 0] for x in (known.window.row_offsets, known.window.kv_blocks, known.window.tiles)))
    counts = valid.sum(-1, dtype=jnp.int32)
    row_offsets = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(np.diff(window.row_offsets) + counts, dtype=jnp.int32)]
    )
    entry = jnp.arange(window.row_offsets[-1] + np.minimum(known.prefixes, width).sum(), dtype=jnp.int32)
    row = jnp.searchsorted(row_offsets[1:], entry, side="right").astype(jnp.int32)
    listed = row < counts.size
    row = jnp.minimum(row, counts.size - 1)
    position = entry - row_offsets[row]  # within the row
    rank = position - jnp.asarray(known.partial)[row]  # among those chosen
    of_choice = (rank >= 0) & (rank < counts[row]) & listed
    choice = row * width + jnp.clip(rank, 0, width - 1)
    source = jnp.asarray(window.row_offsets)[row] + position - jnp.where(rank >= counts[row], counts[row], 0)
    source = jnp.clip(source, 0, window.kv_blocks.size - 1)

    def merge(choice: Any, window: Any, rest: int) -> jax.Array:
        return jnp.where(listed, jnp.where(of_choice, choice, window), rest)

    kv_blocks = merge(chosen.ravel()[choice], jnp.asarray(window.kv_blocks)[source], -1)
    tiles = merge(-1, jnp.asarray(window.tiles)[source], -1)
    return _Lists(row_offsets, kv_blocks, tiles), merge(gates.ravel()[choice], 1, 1)


def _choose_restricted(
    means: jax.Array, sizes: _Sizes, top_k: int, gate: Gate, mask: Mask | None, always: Mask | None
) -> tuple[BlockMask, jax.Array]:
    """The choice where masks say what each row may choose: its candidates are no prefix of all, so each has its own.

    Args:
      means: [B, G, nk], scores of the key blocks.
    """
    q_len, kv_len, block_size, window = sizes
    batch, heads, nk = means.shape
    known = candidates_of(restricted(CausalMask(), mask), q_len, kv_len, block_size, batch=batch, heads=heads)

    # ---- states: what is always visited, and what may be chosen ----
    nq = known.grid.nq
    first = WindowBlocksMask(window, block_size).first_block(np.arange(nq, dtype=np.int64) * known.block_q)
    fixed = of_rank(np.arange(nk), 2) >= first[:, None]
    widths: int | np.ndarray = fixed.sum(1) + top_k
    if always is not None:
        blocks = known.blocks_of(always, batch, heads)
        fixed = either(blocks, fixed)
        widths = fixed.sum(1) + top_k if isinstance(fixed, np.ndarray) else nk
    is_open = known.tiles != EMPTY
    fixed, is_open = (of_rank(jnp.asarray(x), 4) for x in (both(fixed, is_open), is_open))
    states = jnp.where(
        fixed, np.int8(native.REQUIRED), jnp.where(is_open, np.int8(native.OPEN), np.int8(native.CLOSED))
    )

    # ---- lists ----
    z = jnp.where(means == jnp.inf, jnp.nan, means)
    scores = jnp.broadcast_to(jax.lax.stop_gradient(z)[:, :, None], (batch, heads, nq, nk))
    chosen = choose_listed(scores, states, (top_k, True), known, np.minimum(widths, nk))

    # ---- gates ----
    def gates_of(z: jax.Array, states: jax.Array, offsets: jax.Array, ids: jax.Array) -> jax.Array:
        free = states == native.OPEN
        p, tau = solve(jnp.where(free, z[None], -jnp.inf), jnp.full(nq, top_k, z.dtype), "fast")
        entry = jnp.arange(ids.shape[0], dtype=jnp.int32)
        row = jnp.minimum(jnp.searchsorted(offsets[1:], entry, side="right").astype(jnp.int32), max(nq - 1, 0))
        column = jnp.maximum(ids, 0)
        gates = jnp.where(free[row, column], p[row, column], 1)
        if gate == "straight-through":
            gates = 1 + (gates - jax.lax.stop_gradient(gates))
        return jnp.where(entry < offsets[-1], jnp.where(jnp.isnan(tau)[row], jnp.nan, gates), 1)

    if nq == 0 or nk == 0:
        return chosen, jnp.ones(chosen.kv_blocks.shape, z.dtype)
    arrays = [z, states, jnp.asarray(chosen.row_offsets), jnp.asarray(chosen.kv_blocks)]
    return chosen, explicit_mesh.call(functools.partial(per_table, gates_of), arrays, ["bh"] * 4)
