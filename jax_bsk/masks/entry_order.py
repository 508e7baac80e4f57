"""Where the entries of a BlockMask's rows stand in its key-major lists: numbers an entry (gates) go there and back.

Beside `_transpose`, whose order it is; only a call with gates asks for it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import of_rank
from jax_bsk.masks._transpose import ColumnLists, column_entries, ordered_transpose_traced, rows_of_entries
from jax_bsk.masks.run_mask import RunBlockMask

if TYPE_CHECKING:
    from jax_bsk.masks.block_mask import BlockMask


class EntryOrder(NamedTuple):
    """Two permutations of a mask's entries, each the other's inverse, and what kernels make of each entry.

    Attributes:
      entries: int32 [B, H, capacity], the rows' entry at each place of the key-major lists. Behind the last column
        stand the entries of no column.
      places: int32 [B, H, capacity], the place of each of the rows' entries.
      fate: float32 [B, H, capacity], by the rows' entry: 1 where kernels write what belongs to it, 0 where it is in no
        column, NaN where it is in one that they refuse (for the number of a tile).
    """

    entries: Any
    places: Any
    fate: Any


def with_entry_order(mask: BlockMask) -> tuple[BlockMask, EntryOrder]:
    """The mask with its key-major lists and their order; of a host mask made once and kept.

    Lists that the mask has already are made anew: in those that a caller filled in, the order may be another.
    """
    if isinstance(mask, RunBlockMask):  # so many entries are ordered on the device
        mask = mask._plain()
    if "_ordered" not in mask.__dict__:
        lists, n_tiles = (mask.row_offsets, mask.kv_blocks, mask.tiles), mask.bit_tiles.shape[2]
        if mask.is_traced or any(isinstance(x, jax.Array) for x in lists):
            columns, order = _order_traced(*lists, mask.nk, n_tiles)
            return dataclasses.replace(mask, **columns._asdict()), order
        given = mask.col_offsets is not None
        rows = dataclasses.replace(mask, col_offsets=None, q_blocks=None, col_tiles=None) if given else mask
        ours = rows.transpose()
        columns = ColumnLists(ours.col_offsets, ours.q_blocks, ours.col_tiles)
        object.__setattr__(mask, "_ordered", (ours, _order_host(*lists, columns, n_tiles)))
    return mask.__dict__["_ordered"]


def to_columns(numbers: jax.Array, order: EntryOrder) -> jax.Array:
    """From [B, N, capacity] numbers, one an entry of the rows' lists, to the order of the key-major ones."""
    return explicit_mesh.call(_permute, [numbers, jnp.asarray(order.entries)], ["bh"] * 2)


def to_rows(numbers: jax.Array, order: EntryOrder) -> jax.Array:
    """The way back, for what kernels wrote: 0 for the entries of no column, NaN for those of one that they refuse."""

    def function(numbers: jax.Array, places: jax.Array, fate: jax.Array) -> jax.Array:
        return jnp.where(fate == 1, _permute(numbers, places), fate.astype(numbers.dtype))

    return explicit_mesh.call(function, [jnp.asarray(x) for x in (numbers, order.places, order.fate)], ["bh"] * 3)


def _permute(numbers: jax.Array, indices: jax.Array) -> jax.Array:
    """numbers[b, n, indices[b, n, i]] of a permutation [B|1, N|1, capacity]."""
    shared = tuple(axis for axis in (0, 1) if indices.shape[axis] == 1)
    axes = [None if axis in shared else 0 for axis in (0, 1)]

    def take(numbers: jax.Array, indices: jax.Array) -> jax.Array:
        return numbers.at[indices].get(mode="promise_in_bounds", unique_indices=True)

    by_head = jax.vmap(take, (0, axes[1]))
    return jax.vmap(by_head, (0, axes[0]))(numbers, jnp.squeeze(indices, shared))


def _order_host(
    row_offsets: np.ndarray, kv_blocks: np.ndarray, tiles: np.ndarray, columns: ColumnLists, n_tiles: int
) -> EntryOrder:
    nk = columns.col_offsets.shape[-1] - 1
    entries, places = np.empty_like(kv_blocks, np.int32), np.empty_like(kv_blocks, np.int32)
    everything = np.arange(kv_blocks.shape[-1], dtype=np.int32)
    for b, h in np.ndindex(kv_blocks.shape[:2]):
        rows = rows_of_entries(row_offsets[b, h], everything.size)
        listed = column_entries(rows, kv_blocks[b, h], tiles[b, h], nk)
        entries[b, h] = np.concatenate([listed, np.setdiff1d(everything, listed, assume_unique=True)])
        places[b, h, entries[b, h]] = everything
    return EntryOrder(entries, places, _fate(np, columns, kv_blocks, places, n_tiles))


def _order_traced(
    row_offsets: Any, kv_blocks: Any, tiles: Any, nk: int, n_tiles: int
) -> tuple[ColumnLists, EntryOrder]:
    *columns, entries, places = ordered_transpose_traced(row_offsets, kv_blocks, tiles, nk)

    def fate(*arrays: Any) -> tuple[Any, ...]:
        *columns, kv_blocks, places = arrays
        return (_fate(jnp, ColumnLists(*columns), kv_blocks, places, n_tiles),)

    (fates,) = explicit_mesh.call(fate, [*columns, jnp.asarray(kv_blocks), places], ["bh"] * 5)
    return ColumnLists(*columns), EntryOrder(entries, places, fates)


def _fate(xp: Any, columns: ColumnLists, kv_blocks: Any, places: Any, n_tiles: int) -> Any:
    """`EntryOrder.fate`, by numpy or jax.numpy."""
    offsets, tiles = columns.col_offsets, columns.col_tiles
    nk, capacity = offsets.shape[-1] - 1, kv_blocks.shape[-1]
    if nk == 0:
        return xp.zeros(kv_blocks.shape, np.float32)
    place = of_rank(xp.arange(capacity, dtype=np.int32), tiles.ndim)
    bad = (place < offsets[..., -1:]) & ((tiles < -1) | (tiles >= n_tiles))
    before = xp.cumsum(bad, axis=-1, dtype=np.int32)
    before = xp.concatenate([xp.zeros((*bad.shape[:-1], 1), np.int32), before], axis=-1)
    refused = xp.diff(xp.take_along_axis(before, offsets, axis=-1), axis=-1) > 0
    refused = xp.take_along_axis(refused, xp.clip(kv_blocks, 0, nk - 1), axis=-1)
    return xp.where(places < offsets[..., -1:], xp.where(refused, np.float32(np.nan), np.float32(1)), np.float32(0))
