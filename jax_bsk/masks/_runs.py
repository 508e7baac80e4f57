"""Block lists as runs: neighbouring blocks that share a bit tile (or are all full) are one entry.

A causal mask of n blocks visits n^2 / 2 of them in 2 n runs, so this is the form in which a host keeps the lists of a
long mask, and in which they become constants of a jitted function. Kernels read plain lists: `expand` makes them on
the device. `builders._host` makes runs, `run_lists` holds them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import compat


class Lists(NamedTuple):
    """Block lists of one example and head: row r visits the entries offsets[r] to offsets[r + 1].

    Attributes:
      offsets: int32 [rows + 1].
      blocks: int32 [entries], in each row first those with a tile, then the full ones, both ascending.
      tiles: int32 [entries], number of the entry's bit tile, -1 for a full block.
    """

    offsets: np.ndarray
    blocks: np.ndarray
    tiles: np.ndarray


class Runs(NamedTuple):
    """The same lists, one element per run of consecutive blocks with the same tile.

    Attributes:
      offsets: int32 [rows + 1], as in `Lists`: they count entries, not runs.
      starts: int32 [runs], the first entry of each run; ascending.
      blocks: int32 [runs], the block of that entry; the others follow by one.
      tiles: int32 [runs].
    """

    offsets: np.ndarray
    starts: np.ndarray
    blocks: np.ndarray
    tiles: np.ndarray


class Segments(NamedTuple):
    """Pieces of block rows in any order: row, first block, number of blocks, and the tile of each of them."""

    rows: np.ndarray
    first: np.ndarray
    length: np.ndarray
    tiles: np.ndarray

    def select(self, index: np.ndarray) -> Segments:
        """The segments at `index`."""
        return Segments(*(x[index] for x in self))


# ---- on the host ------------------------------------------------------------------------------------------------


def merge(segments: Segments) -> Segments:
    """Disjoint segments by row and first block, those that continue their neighbour joined to it."""
    s = segments.select(np.lexsort((segments.first, segments.rows)))
    if not s.rows.size:
        return s
    continues = (s.rows[1:] == s.rows[:-1]) & (s.first[1:] == s.first[:-1] + s.length[:-1])
    continues &= s.tiles[1:] == s.tiles[:-1]
    begins = np.flatnonzero(np.concatenate([[True], ~continues]))
    return Segments(s.rows[begins], s.first[begins], np.add.reduceat(s.length, begins), s.tiles[begins])


def from_segments(segments: Segments, rows: int) -> Runs:
    """Runs of merged segments.

    Raises:
      ValueError: where they have more blocks than int32 offsets can number.
    """
    s = segments.select(np.lexsort((segments.first, segments.tiles < 0, segments.rows)))
    ends = np.cumsum(s.length, dtype=np.int64)
    check_count(int(ends[-1]) if ends.size else 0)
    offsets = np.concatenate([[0], ends])[np.searchsorted(s.rows, np.arange(rows + 1))]
    return Runs(*(x.astype(np.int32) for x in (offsets, ends - s.length, s.first, s.tiles)))


def check_count(entries: int) -> None:
    """Raises ValueError where a list has more entries than int32 offsets can number."""
    if entries >= 2**31:
        raise ValueError(f"the mask visits {entries} blocks: more than int32 offsets can number; use larger blocks")


def from_lists(lists: Lists) -> Runs:
    """Runs of plain lists, in the same order."""
    continues = (lists.blocks[1:] == lists.blocks[:-1] + 1) & (lists.tiles[1:] == lists.tiles[:-1])
    begins = np.ones(lists.blocks.size, bool)
    begins[1:] = ~continues
    begins[lists.offsets[:-1][np.diff(lists.offsets) > 0]] = True
    starts = np.flatnonzero(begins)
    return Runs(lists.offsets, starts.astype(np.int32), lists.blocks[starts], lists.tiles[starts])


def to_lists(runs: Runs) -> Lists:
    """Plain lists of runs."""
    lengths = lengths_of(runs)
    blocks = np.repeat(runs.blocks - runs.starts, lengths) + np.arange(lengths.sum(), dtype=np.int32)
    return Lists(runs.offsets, blocks, np.repeat(runs.tiles, lengths))


def to_segments(runs: Runs) -> Segments:
    """Row, first block, length and tile of each run."""
    rows = np.searchsorted(runs.offsets, runs.starts, side="right") - 1
    lengths = lengths_of(runs)
    segments = Segments(rows, runs.blocks.astype(np.int64), lengths, runs.tiles.astype(np.int64))
    return segments.select(lengths > 0)


def lengths_of(runs: Runs) -> np.ndarray:
    """int64 [runs]: entries of each run; 0 for what pads the runs of one head to those of another."""
    total = int(runs.offsets[-1])
    return np.diff(np.minimum(runs.starts.astype(np.int64), total), append=total)


def transpose(runs: Runs, columns: int) -> Runs:
    """Lists of rows by runs in a row as lists of columns by runs in a column.

    Costs what the runs of both cost. For one tile (or for full blocks), the blocks of a row are an alternation of ends
    of runs. What two successive rows do not have in common is then between the ends that only one of them has, and it
    is where a column's run begins or ends.
    """
    rows = runs.offsets.size - 1
    tile, row, column = _changes(runs, rows, columns)
    order = np.lexsort((row, column, tile))  # in each column of each tile: begin, end, begin, end, ...
    begin, end = order[0::2], order[1::2]
    return from_segments(Segments(column[begin], row[begin], row[end] - row[begin], tile[begin]), columns)


def count_transposed(runs: Runs, columns: int) -> int:
    """How many runs `transpose` would make."""
    begin, end, _, _ = _differences(runs, runs.offsets.size - 1, columns)
    return int((end - begin).sum()) // 2


def _differences(runs: Runs, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Intervals [begin, end) of the blocks that row r and the row before do not have in common: begin, end, tile, r."""
    s = merge(to_segments(runs))
    ends = np.concatenate([s.first, s.first + s.length])
    tile, row = np.tile(s.tiles + 1, 2), np.tile(s.rows, 2)
    # An end in (tile, row) counts for that row and for the comparison of the next one; there twice is not at all.
    key = (np.concatenate([tile, tile]) * (rows + 1) + np.concatenate([row, row + 1])) * (columns + 1)
    key, counts = np.unique(key + np.concatenate([ends, ends]), return_counts=True)
    key = key[counts == 1].astype(np.int64)
    begin, end = key[0::2] % (columns + 1), key[1::2] % (columns + 1)
    at = key[0::2] // (columns + 1)
    return begin, end, at // (rows + 1) - 1, at % (rows + 1)


def _changes(runs: Runs, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tile, row and column of every block where a column's run begins, or before which one ended."""
    begin, end, tile, row = _differences(runs, rows, columns)
    lengths = end - begin
    column = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    return np.repeat(tile, lengths), np.repeat(row, lengths), column


# ---- in JAX -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("capacity",))
def expand(
    offsets: jax.Array, starts: jax.Array, blocks: jax.Array, tiles: jax.Array, *, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Blocks and tiles [B, H, capacity] int32 of runs [B, H, ...], -1 past the end.

    Elementwise work, in which each entry finds its run by bisection: at 1,048,576 causal tokens and blocks of 128 it
    writes 268 MB and reads 0.2 MB, beside attention that takes seconds.
    """

    def one(total: jax.Array, starts: jax.Array, blocks: jax.Array, tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
        entry = jnp.arange(capacity, dtype=jnp.int32)
        levels = max(0, starts.shape[0] - 1).bit_length()
        padded = jnp.pad(starts, (0, 2**levels - starts.shape[0]), constant_values=np.iinfo(np.int32).max)
        # The last run known to begin at or before each entry; in a shard_map it differs between devices as runs do.
        run, _ = compat.match_varying(jnp.zeros_like(entry), starts)

        def halve(n: jax.Array, run: jax.Array) -> jax.Array:
            later = run + (jnp.int32(2**levels) >> (n + 1))
            return jnp.where(_at(padded, later) <= entry, later, run)

        # A loop: unrolled (or by jnp.searchsorted so), results of all levels would stay in memory together, 1.7 GB.
        run = jax.lax.fori_loop(jnp.int32(0), jnp.int32(levels), halve, run)
        listed = entry < total
        return jnp.where(listed, _at(blocks - starts, run) + entry, -1), jnp.where(listed, _at(tiles, run), -1)

    # Without the barrier XLA would compute lists of constant runs at compile time, and keep them in the program.
    offsets, starts, blocks, tiles = jax.lax.optimization_barrier((offsets, starts, blocks, tiles))
    return jax.vmap(jax.vmap(one))(offsets[..., -1], starts, blocks, tiles)


def _at(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="promise_in_bounds")
