"""The order in which the `"xla"` implementation walks over block lists.

Below `xla`, which computes attention step by step as a schedule says. The ragged lists of all rows become steps
of equal size, however skewed the rows are. Where the lists' values are known this is host work, and nothing of it is
left to compile and run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_bsk.core.arrays import known
from jax_bsk.masks import BlockMask

FULL, NOTHING = -1, -2  # among the numbers of bit tiles: every pair attends; none does
# So many blocks are computed in one step, without a loop: a quarter of it to compile, and the size of dense attention
# over 512 tokens.
FEW_ENTRIES = 16
# Gathers and scatters by entries, which are known to be blocks that there are.
IN_BOUNDS = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Lists(NamedTuple):
    """The arrays of a `BlockMask` whose values are not known, or are not those of valid lists."""

    row_offsets: Array  # int32 [Lb, Ln, nq + 1]
    kv_blocks: Array  # int32 [Lb, Ln, capacity]
    tiles: Array  # int32 [Lb, Ln, capacity]


class Schedule(NamedTuple):
    """The steps over the entries of each list; leading dims ``[Lb, Lk, Lg]``: batch, kv heads, group (or 1).

    A step has `chunk` rows, of each of which it visits `width` blocks. Aligned schedules visit all rows, in their
    order, in every step, and need no ``rows``. Others have a width of 1.
    """

    rows: Any  # int32 [..., steps, chunk] query block, ascending; None where aligned
    cols: Any  # int32 [..., steps, chunk, width] key block
    tiles: Any  # int32 [..., steps, chunk, width] bit tile, FULL, or NOTHING (padding, entries of poisoned rows)
    positions: Any  # int32 [..., steps, chunk, width] where the entry stands in the list; None where nobody asks


def split_heads(x: Any, axis: int, heads: tuple[int, int]) -> Any:
    """``[.., N|1, ..]`` to ``[.., K|1, G|1, ..]`` for (K, G) heads."""
    dims = heads if x.shape[axis] == heads[0] * heads[1] else (1, 1)
    return x.reshape(x.shape[:axis] + dims + x.shape[axis + 1 :])


def _chunk(nq: int, capacity: int) -> int:
    """Rows of a step that visits one entry of each.

    About as many as there are: what a step does beside its entries (walking the whole carry, and in the backward the
    whole cotangents of keys and values) is then a small part of its products, and memory is linear in length.
    """
    return max(1, min(nq, capacity))


def is_even(padded: int, used: int) -> bool:
    """Whether rows padded to the longest, ``padded`` entries in all, take hardly more time than the ``used`` ones."""
    return padded <= used + used // 4


def known_schedule(mask: BlockMask, heads: tuple[int, int], kv_len: int) -> Schedule | None:
    """The schedule of lists whose values are known now, made on the host.

    Args:
      mask: The lists, [B|1, N|1].
      heads: (K, G), with N = K * G.
      kv_len: Keys, at least 1.

    Returns:
      The schedule, of numpy arrays, or None: the values are not known, or a row is invalid (`schedule` poisons it).
    """
    offsets, kv_blocks, tiles = (known(x) for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
    if offsets is None or kv_blocks is None or tiles is None:
        return None
    lead, nq = offsets.shape[:2], offsets.shape[2] - 1
    counts = np.diff(offsets, axis=-1)
    used = int(offsets[..., -1].max(initial=0))
    if (offsets[..., 0] != 0).any() or (counts < 0).any() or used > kv_blocks.shape[-1]:
        return None
    visited = np.arange(used, dtype=np.int32) < offsets[..., -1:]
    kv_blocks = np.where(visited, kv_blocks[..., :used], 0)
    tiles = np.where(visited, tiles[..., :used], FULL)
    nk, n_tiles = -(-kv_len // mask.block_kv), mask.bit_tiles.shape[2]
    if (kv_blocks < 0).any() or (kv_blocks >= nk).any() or (tiles < FULL).any() or (tiles >= n_tiles).any():
        return None

    # ---- aligned: a few entries, or rows of about one length ----
    longest = int(counts.max(initial=0))
    few = nq * longest <= FEW_ENTRIES
    if few or is_even(nq * longest, used):
        width = max(longest, 1) if few else 1
        shape = (*lead, longest // width, nq, width)
        position = offsets[..., None, :-1, None] + np.arange(longest, dtype=np.int32).reshape(-1, 1, width)
        listed, rows = position < offsets[..., None, 1:, None], None
    else:
        chunk = _chunk(nq, used)
        shape = (*lead, -(-used // chunk), chunk, 1)
        position = np.arange(shape[2] * chunk, dtype=np.int32)
        listed = (position < offsets[..., -1:]).reshape(shape)
        position = position.reshape(shape[2:])
        rows = np.full((*lead, position.size), nq - 1, np.int32)
        for index in np.ndindex(*lead):
            own = np.repeat(np.arange(nq, dtype=np.int32), counts[index])
            rows[index][: own.size] = own
        rows = rows.reshape(shape[:-1])
    position = np.where(listed, position, 0)

    def look_up(x: np.ndarray, rest: int) -> np.ndarray:
        found = np.take_along_axis(x, position.reshape(*lead, -1), axis=-1) if used else x
        return np.where(listed, found.reshape(shape), np.int32(rest))

    fields = rows, look_up(kv_blocks, 0), look_up(tiles, NOTHING), position.astype(np.int32)
    return Schedule(*(None if x is None else split_heads(x, 1, heads) for x in fields))


def schedule(lists: Lists, nk: int, n_tiles: int) -> tuple[Schedule, Array, Array]:
    """The schedule of lists ``[Lb, Lk, Lg, ..]`` with ``nk`` key blocks and ``n_tiles`` bit tiles.

    Returns:
      The schedule; the entries used of each list; and which rows are invalid, bool ``[Lb, Lk, Lg, nq]``. These visit
      nothing: their results are to be poisoned.

    Overlapping rows (decreasing offsets) can name more entries than the capacity: rows past it are poisoned too.
    """
    nq, capacity = lists.row_offsets.shape[-1] - 1, lists.kv_blocks.shape[-1]
    chunk = _chunk(nq, capacity)
    steps = -(-capacity // chunk)
    # Comparing each entry with each row is one kernel, a search a loop of several.
    method = "compare_all" if nq * steps * chunk <= 2**16 else "scan"

    def one(offsets, kv_blocks, tiles):
        start, end = offsets[:-1], offsets[1:]
        bad_row = (start < 0) | (end < start) | (end > capacity)
        counts = jnp.where(bad_row, 0, end - start)
        ends = jnp.cumsum(counts)
        bad_row |= ends > capacity
        slot = jnp.arange(steps * chunk, dtype=jnp.int32)
        if capacity == 0:
            empty = jnp.zeros((0, chunk, 1), jnp.int32)
            return Schedule(empty[..., 0], empty, empty, empty), ends[-1], bad_row
        rows = jnp.searchsorted(ends, slot, side="right", method=method).astype(jnp.int32)
        rows = jnp.minimum(rows, nq - 1)
        position = jnp.clip(take(start - ends + counts, rows) + slot, 0, capacity - 1)
        cols, tiles = take(kv_blocks, position), take(tiles, position)
        visit = slot < ends[-1]
        bad_entry = visit & ((cols < 0) | (cols >= nk) | (tiles < FULL) | (tiles >= n_tiles))
        bad_row = bad_row.at[rows].max(bad_entry, **IN_BOUNDS)
        visit &= ~take(bad_row, rows)
        tiles = jnp.where(visit, tiles, NOTHING)
        cols, tiles, position = (x.reshape(steps, chunk, 1) for x in (jnp.clip(cols, 0, nk - 1), tiles, position))
        return Schedule(rows.reshape(steps, chunk), cols, tiles, position), ends[-1], bad_row

    return jax.vmap(jax.vmap(jax.vmap(one)))(*lists)


def take(x: Array, blocks: Array) -> Array:
    """``x[blocks]`` of blocks that there are."""
    return x.at[blocks].get(**IN_BOUNDS)
