"""The order of a BlockMask's entries: numbers that belong to entries (gates) go to the key-major order and back.

Beside `column_lists`, which makes the key-major lists in this order; only a call with gates asks for it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, of_rank
from jax_bsk.masks.block_lists import BlockLists
from jax_bsk.masks.orders.column_lists import ColumnLists, column_entries, ordered_transpose_traced, rows_of_entries


class EntryOrder(NamedTuple):
    """Two permutations of a mask's entries, each the other's inverse, and what kernels make of each entry.

    A position counts from the beginning of the key-major lists, an entry from that of the query-major ones.

    Attributes:
      to_columns: int32 [B, H, capacity], the entry at each position: `numbers[to_columns]` is in key-major order.
        Behind the last column stand the entries of no column.
      to_rows: int32 [B, H, capacity], the position of each entry: `numbers[to_rows]` is in query-major order again.
      factors: float32 [B, H, capacity] of each entry: 1 where kernels write what belongs to it, 0 where it is in no
        column, NaN where it is in a column that they refuse (for the number of a tile).
    """

    to_columns: Array
    to_rows: Array
    factors: Array


def with_entry_order(mask: BlockLists) -> tuple[Any, EntryOrder]:
    """The mask with its key-major lists and their order; of a host mask made once and kept.

    Lists that the mask has already are made anew: in those that a caller filled in, the order may be another. Where the
    mask holds runs, its entries are so many that they are ordered on the device.

    Returns:
      A mask of the same class, which holds lists, and their order.
    """
    mask = mask._plain()
    if "_ordered" not in mask.__dict__:
        lists = cast("tuple[Any, Any, Any]", (mask.row_offsets, mask.kv_blocks, mask.tiles))
        n_tiles = mask.bit_tiles.shape[2]
        if mask.is_traced or any(isinstance(x, jax.Array) for x in lists):
            columns, order = _order_traced(*lists, mask.nk, n_tiles)
            return mask._with_columns(columns), order
        given = mask.col_offsets is not None
        ours = (mask._with_columns(ColumnLists(None, None, None)) if given else mask).transpose()
        columns = ColumnLists(ours.col_offsets, ours.q_blocks, ours.col_tiles)
        mask.__dict__["_ordered"] = ours, _order_host(*lists, mask.nk, columns, n_tiles)
    return mask.__dict__["_ordered"]


def to_columns(numbers: jax.Array, order: EntryOrder) -> jax.Array:
    """Takes numbers [B, N, capacity], one for each entry, from the query-major to the key-major order."""
    return explicit_mesh.call(_permute, [numbers, jnp.asarray(order.to_columns)], ["bh"] * 2)


def to_rows(numbers: jax.Array, order: EntryOrder) -> jax.Array:
    """The way back, for what kernels wrote: 0 for the entries of no column, NaN for those of one that they refuse."""

    def function(numbers: jax.Array, positions: jax.Array, factors: jax.Array) -> jax.Array:
        return jnp.where(factors == 1, _permute(numbers, positions), factors.astype(numbers.dtype))

    return explicit_mesh.call(function, [jnp.asarray(x) for x in (numbers, order.to_rows, order.factors)], ["bh"] * 3)


def _permute(numbers: jax.Array, indices: jax.Array) -> jax.Array:
    """numbers[b, n, indices[b, n, i]] of a permutation [B|1, N|1, capacity]."""
    shared = tuple(axis for axis in (0, 1) if indices.shape[axis] == 1)
    axes = [None if axis in shared else 0 for axis in (0, 1)]

    def take(numbers: jax.Array, indices: jax.Array) -> jax.Array:
        return numbers.at[indices].get(mode="promise_in_bounds", unique_indices=True)

    by_head = jax.vmap(take, (0, axes[1]))
    return jax.vmap(by_head, (0, axes[0]))(numbers, jnp.squeeze(indices, shared))


def _order_host(
    row_offsets: np.ndarray, kv_blocks: np.ndarray, tiles: np.ndarray, nk: int, columns: ColumnLists, n_tiles: int
) -> EntryOrder:
    at_positions, positions = np.empty_like(kv_blocks, np.int32), np.empty_like(kv_blocks, np.int32)
    everything = np.arange(kv_blocks.shape[-1], dtype=np.int32)
    for b, h in np.ndindex(kv_blocks.shape[:2]):
        rows = rows_of_entries(row_offsets[b, h], everything.size)
        listed = column_entries(rows, kv_blocks[b, h], tiles[b, h], nk)
        at_positions[b, h] = np.concatenate([listed, np.setdiff1d(everything, listed, assume_unique=True)])
        positions[b, h, at_positions[b, h]] = everything
    return EntryOrder(at_positions, positions, _factors(np, columns, kv_blocks, positions, n_tiles))


def _order_traced(
    row_offsets: Array, kv_blocks: Array, tiles: Array, nk: int, n_tiles: int
) -> tuple[ColumnLists, EntryOrder]:
    *columns, at_positions, positions = ordered_transpose_traced(row_offsets, kv_blocks, tiles, nk)

    def function(*arrays: jax.Array) -> tuple[jax.Array]:
        *columns, kv_blocks, positions = arrays
        return (_factors(jnp, ColumnLists(*columns), kv_blocks, positions, n_tiles),)

    (factors,) = explicit_mesh.call(function, [*columns, jnp.asarray(kv_blocks), positions], ["bh"] * 5)
    return ColumnLists(*columns), EntryOrder(at_positions, positions, factors)


def _factors(xp: ModuleType, columns: ColumnLists, kv_blocks: Array, positions: Array, n_tiles: int) -> Any:
    """`EntryOrder.factors`, by numpy or jax.numpy."""
    offsets, tiles = cast(Any, columns.col_offsets), cast(Any, columns.col_tiles)
    nk, capacity = offsets.shape[-1] - 1, kv_blocks.shape[-1]
    if nk == 0:
        return xp.zeros(kv_blocks.shape, np.float32)
    position = of_rank(xp.arange(capacity, dtype=np.int32), tiles.ndim)
    bad = (position < offsets[..., -1:]) & ((tiles < -1) | (tiles >= n_tiles))
    before = xp.cumsum(bad, axis=-1, dtype=np.int32)
    before = xp.concatenate([xp.zeros((*bad.shape[:-1], 1), np.int32), before], axis=-1)
    refused = xp.diff(xp.take_along_axis(before, offsets, axis=-1), axis=-1) > 0
    refused = xp.take_along_axis(refused, xp.clip(kv_blocks, 0, nk - 1), axis=-1)
    return xp.where(positions < offsets[..., -1:], xp.where(refused, np.float32(np.nan), np.float32(1)), np.float32(0))
