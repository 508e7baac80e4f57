"""Building a BlockMask inside a trace from the interval of keys that each query attends to.

Rows of blocks are written directly: a row visits the blocks that its queries' intervals meet, those that all of its
queries attend to are full, and their places in the lists follow from sums over rows. Every step is one elementwise
operation or one reduction over at most 128 elements, of arrays of tokens, entries or words of bit tiles: there is no
array of queries x keys, nor of all pairs of blocks, no sort and no loop. At 32,768 tokens with blocks of 128 it is
about a dozen fused kernels, which write 0.3 MB of lists and 2 KiB for each bit tile.

Room is fixed beforehand, as in `_traced`, and what finds no room gives NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import Array, of_rank
from jax_bsk.masks._search import greatest_before, last_at_most, sums_before
from jax_bsk.masks.algebra._intervals import Intervals, inside, row_bounds
from jax_bsk.masks.grid import Grid


def build(intervals: Intervals, grid: Grid, capacity: int, n_tiles: int) -> tuple[Array, ...]:
    """row_offsets, kv_blocks, tiles and bit_tiles of one example and head.

    Args:
      intervals: Keys of the queries [q_len].
      grid: Grid of the mask, with neither length 0, in `jax.numpy`.
      capacity: Number of entries that there is room for.
      n_tiles: Number of bit tiles that there is room for.
    """
    nq, nk, block_q, block_kv = grid.nq, grid.nk, grid.block_q, grid.block_kv

    # ---- what a row visits, and what all of its queries attend to ----
    real = np.arange(nq * block_q, dtype=np.int32).reshape(nq, block_q) < grid.q_len
    pad = (0, nq * block_q - grid.q_len)
    first, end = inside(intervals, grid, (grid.q_len,))
    # Queries past the length have what the last one has, but count for nothing: their elements mean nothing.
    first, end = (jnp.pad(x, pad, mode="edge").reshape(nq, block_q) for x in (first, end))
    bounds = row_bounds(grid, first, end, real)
    full_first = _blocks_up_to(bounds.full_first, block_kv)
    full_end = jnp.where(bounds.full_end >= grid.kv_len, np.int32(nk), bounds.full_end // np.int32(block_kv))
    full = jnp.maximum(full_end - full_first, 0)
    if intervals.own:
        # One run of blocks per row.
        run_blocks = (bounds.first // np.int32(block_kv))[:, None]
        run_counts = jnp.maximum(_blocks_up_to(bounds.end, block_kv)[:, None] - run_blocks, 0)
    else:
        # A run for each query: the blocks that no query before it in the row meets.
        last = jnp.where(real, _blocks_up_to(end, block_kv), 0)
        run_blocks = jnp.maximum(first // np.int32(block_kv), greatest_before(last))
        run_counts = jnp.maximum(last - run_blocks, 0)

    # ---- where rows begin in the lists ----
    entries = run_counts.sum(1, dtype=np.int32)
    partial = entries - full
    before = sums_before(jnp.stack([entries, partial]))
    row_starts, tile_starts = before[0], before[1]
    total, total_tiles = row_starts[-1] + entries[-1], tile_starts[-1] + partial[-1]
    run_first = bounds.first // np.int32(block_kv)
    lead = jnp.maximum(full_first - run_first, 0)
    table = jnp.stack([row_starts, tile_starts, partial, full, lead, run_first], 1)

    # ---- entries: in each row the partial blocks first, then the full ones ----
    def block_of(rows: _Rows, place: jax.Array) -> jax.Array:
        """The block of a row's entry number `place`."""
        # A row with full blocks is one run: partial blocks, full ones, and partial ones again.
        later = jnp.where(place < rows.partial, place + rows.full, place - rows.partial + rows.lead)
        rank = jnp.where((place < rows.lead) | (rows.full == 0), place, later)
        if intervals.own:
            return rows.run_first + rank
        starts = (row_starts[:, None] + sums_before(run_counts)).reshape(-1)
        runs = jnp.stack([starts, run_blocks.reshape(-1)], 1)
        entry = rows.row_start + place
        run = _at(runs, jnp.clip(last_at_most(starts, entry, jnp), 0, runs.shape[0] - 1))
        return jnp.where(rows.full > 0, rows.run_first + rank, run[:, 1] + entry - run[:, 0])

    def rows_of(starts: jax.Array, index: jax.Array) -> _Rows:
        """What the table has of the last row that starts at or before `index`."""
        found = _at(table, jnp.clip(last_at_most(starts, index, jnp), 0, nq - 1))
        return _Rows(*(found[:, n] for n in range(table.shape[1])))

    entry = jnp.arange(capacity, dtype=np.int32)
    rows = rows_of(row_starts, entry)
    place, listed = entry - rows.row_start, entry < total
    kv_blocks = jnp.where(listed, block_of(rows, place), -1)
    tiles = jnp.where(listed & (place < rows.partial), rows.tile_start + place, -1)

    # ---- bits of the tiles ----
    tile = jnp.arange(n_tiles, dtype=np.int32)
    row = jnp.clip(last_at_most(tile_starts, tile, jnp), 0, nq - 1)
    rows = rows_of(tile_starts, tile)
    words = np.arange(block_kv // 32, dtype=np.int32) * np.int32(32)
    block = block_of(rows, tile - rows.tile_start)
    start = (block * np.int32(block_kv))[:, None, None] + of_rank(jnp.asarray(words), 3)
    bit_tiles = _ones(_at(end, row)[:, :, None] - start) & ~_ones(_at(first, row)[:, :, None] - start)
    bit_tiles = jnp.where((tile < total_tiles)[:, None, None], bit_tiles, np.uint32(0))

    row_offsets = jnp.append(row_starts, total)
    if intervals.valid is not None:
        # Nothing that follows from data that break their promise is used: every row ends past the lists.
        past = np.full(nq + 1, capacity + 1, np.int32)
        past[0] = 0
        row_offsets = jnp.where(intervals.valid, row_offsets, past)
    return row_offsets, kv_blocks, tiles, bit_tiles


class _Rows(NamedTuple):
    """Of rows of blocks: their first entry and tile, numbers of partial and of full blocks, of partial blocks before
    the full ones, and the first block; int32 of one shape."""

    row_start: jax.Array
    tile_start: jax.Array
    partial: jax.Array
    full: jax.Array
    lead: jax.Array
    run_first: jax.Array


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return array.at[index].get(mode="promise_in_bounds")


def _blocks_up_to(tokens: jax.Array, block: int) -> jax.Array:
    """Number of blocks that the first `tokens` tokens meet."""
    return (tokens + np.int32(block - 1)) // np.int32(block)


def _ones(count: jax.Array) -> Any:
    """uint32 words whose lowest `count` bits are set; none for a negative number, all for 32 and more."""
    shift = jnp.clip(count, 0, 31).astype(np.uint32)
    return jnp.where(count >= 32, np.uint32(2**32 - 1), (np.uint32(1) << shift) - np.uint32(1))
