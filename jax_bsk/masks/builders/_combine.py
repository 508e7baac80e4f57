"""`BlockMask & mask`: chosen blocks stay, in their lists' order, and the elements inside them are masked.

Entries keep their positions, so that gates still belong to them, and no list grows. A block that the mask leaves
partial has a bit tile afterwards. One that it leaves empty has an empty tile: it is visited in vain.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array
from jax_bsk.masks._tiles import TileStore
from jax_bsk.masks.algebra.mask import Mask, has_multi_head
from jax_bsk.masks.block_lists import BlockLists, RowLists
from jax_bsk.masks.builders import _traced
from jax_bsk.masks.builders._host import on_host, tiles_of
from jax_bsk.masks.grid import EMPTY, FULL, OWN, Grid
from jax_bsk.masks.orders.column_lists import rows_of_entries

# A number of no tile: kernels give NaN for a row that refers to it.
_NO_TILE = np.int32(2**31 - 1)


class ListedMask(Mask):
    """The lists of a BlockMask as a lazy mask, for blocks of its own size."""

    _data_fields = ("row_offsets", "kv_blocks", "tiles", "bit_tiles")
    row_offsets: Array
    kv_blocks: Array
    tiles: Array
    bit_tiles: Array

    def __init__(self, listed: BlockLists) -> None:
        self._set(**{name: getattr(listed, name) for name in self._data_fields})

    def _leaf_dims(self, name: str) -> str:
        return "bh"[2 - (np.ndim(getattr(self, name)) - (3 if name == "bit_tiles" else 1)) :]

    def _table(self, grid: Grid) -> Any:
        """int32 [nq, nk]: number of the block's tile, -1 where it is full, -2 where it is not listed."""
        rows, columns, valid = _entries(grid, self.row_offsets, self.kv_blocks)
        if grid.xp is np:
            table = np.full((grid.nq, grid.nk), -2, np.int32)
            table[rows[valid], columns[valid]] = np.maximum(self.tiles[valid], -1)
            return table
        return (
            jnp.full((grid.nq, grid.nk), -2, jnp.int32)
            .at[jnp.where(valid, rows, grid.nq), columns]
            .set(jnp.maximum(self.tiles, -1), mode="drop")
        )

    def bad_rows(self, grid: Grid) -> Any:
        """bool [nq]: rows that kernels give NaN for."""
        capacity, offsets = self.kv_blocks.shape[0], self.row_offsets
        begin, end = offsets[:-1], offsets[1:]
        rows, _, valid = _entries(grid, offsets, self.kv_blocks)
        bad = (rows >= 0) & (~valid | (self.tiles < -1) | (self.tiles >= self.bit_tiles.shape[0]))
        if grid.xp is np:
            counts = np.bincount(rows[bad], minlength=grid.nq)
        else:
            counts = jnp.zeros(grid.nq, jnp.int32).at[jnp.where(bad, rows, grid.nq)].add(1, mode="drop")
        return (end < begin) | (begin < 0) | (end > capacity) | (counts > 0)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        tile = self._table(grid)[i, j]
        return grid.code(tile == -2, tile == -1, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        tile = self._table(grid)[grid.clip_q(q) // grid.block_q, grid.clip_kv(k) // grid.block_kv]
        if not self.bit_tiles.shape[0]:
            return tile == -1
        inside = k % grid.block_kv
        last = self.bit_tiles.shape[0] - 1
        words = self.bit_tiles[grid.xp.clip(tile, 0, last), q % grid.block_q, inside // 32]
        bit = (words >> (inside % 32).astype(np.uint32)) & np.uint32(1)
        return (tile == -1) | ((tile >= 0) & (bit == 1))

    def _visited_bound(self, grid: Grid) -> int:
        return min(self.kv_blocks.shape[-1], grid.nq * grid.nk)

    def _partial_bound(self, grid: Grid) -> int:
        return self._visited_bound(grid) if self.bit_tiles.shape[-3] else 0


def combine(chosen: BlockLists, mask: Mask) -> RowLists:
    """The lists of `chosen` with the tiles of both.

    Raises:
      ValueError: where the mask does not fit the lengths, or the two distinguish different examples or heads.
    """
    grid = chosen._grid
    mask = mask._sized(None, None)
    mask._validate(grid.q_len, grid.kv_len)
    sizes = []
    for name in ("batch", "heads"):
        ours, theirs = (getattr(x, name) for x in (chosen, mask))
        if ours != theirs and 1 not in (ours, theirs):
            raise ValueError(
                f"BlockMask & mask: both must have the same {name} or 1, got {ours} and {theirs}; combine masks of "
                "the same examples and heads"
            )
        sizes.append(theirs if ours == 1 else ours)
    lists = RowLists(chosen.row_offsets, chosen.kv_blocks, chosen.tiles, chosen.bit_tiles)
    if 0 in (grid.nq, grid.nk, *sizes):
        return lists
    if all(isinstance(x, np.ndarray) for x in lists) and not mask._is_traced(grid):
        return _combine_host(lists, on_host(mask), grid, *sizes)
    return _combine_traced(lists, mask, grid, *sizes)


# ---- on the host ------------------------------------------------------------------------------------------------


def _combine_host(lists: RowLists, mask: Mask, grid: Grid, batch: int, heads: int) -> RowLists:
    store = TileStore(grid.block_q, grid.block_kv)
    rows_of = {name: np.broadcast_to(x, (batch, heads, *x.shape[2:])) for name, x in lists._asdict().items()}
    tiles = np.empty(rows_of["tiles"].shape, np.int32)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for b, h in np.ndindex(batch, heads):
            one = RowLists(**{name: x[b, h] for name, x in rows_of.items()})
            tiles[b, h] = _combine_one(one, mask._select(b, h), grid, store, pool)
    row_offsets, kv_blocks = (np.array(rows_of[name]) for name in ("row_offsets", "kv_blocks"))
    return RowLists(row_offsets, kv_blocks, tiles, store.stack(np.arange(len(store)))[None, None])


def _combine_one(lists: RowLists, mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tile of each entry, int32 [capacity], kept in the store."""
    rows, columns, valid = _entries(grid, lists.row_offsets, lists.kv_blocks)
    entries = np.flatnonzero(valid)
    i, j, ours = rows[entries], columns[entries], lists.tiles[entries]
    codes = np.broadcast_to(mask._classify(grid, i[:, None], j[:, None]), (entries.size, 1))[:, 0]
    # ---- tiles of the mask alone: words [n], and which one an entry has; the last two are all and none ----
    partial = np.flatnonzero((codes != EMPTY) & (codes != FULL))
    own = TileStore(grid.block_q, grid.block_kv)
    numbers = tiles_of(mask, grid, own, pool, i[partial], j[partial])
    words = own.stack(np.arange(len(own))).reshape(len(own), grid.block_q * grid.block_kv // 32)
    every = np.full((1, grid.block_q * grid.block_kv // 32), 2**32 - 1, np.uint32)
    words = np.concatenate([words, every, ~every])
    theirs = np.where(codes == FULL, len(own), len(own) + 1)
    theirs[partial] = numbers
    # ---- both together, each pair once ----
    sound = (ours >= -1) & (ours < lists.bit_tiles.shape[0])
    pairs, which = np.unique((ours.astype(np.int64) + 1) * len(words) + theirs, return_inverse=True)
    tile_of_pair = np.full(pairs.size, _NO_TILE, np.int32)
    for n, pair in enumerate(pairs.tolist()):
        first, second = pair // len(words) - 1, pair % len(words)
        if first == -1 and second == len(own):
            tile_of_pair[n] = -1
        elif -1 <= first < lists.bit_tiles.shape[0]:
            tile = words[second] & (every[0] if first == -1 else lists.bit_tiles[first].ravel())
            hashes, distinct, _ = store.compress(tile[None])
            tile_of_pair[n] = store.add(hashes, distinct)[0]
    tiles = np.where(lists.tiles < 0, lists.tiles, _NO_TILE)  # of entries that are not valid: as bad as they were
    tiles[entries] = np.where(sound, tile_of_pair[which.ravel()], _NO_TILE)
    if isinstance(mask, ListedMask):
        tiles = _poison(tiles, rows, mask, grid)
    return tiles


# ---- in JAX -----------------------------------------------------------------------------------------------------


def _combine_traced(lists: RowLists, mask: Mask, grid: Grid, batch: int, heads: int) -> RowLists:
    leaves, structure = jax.tree_util.tree_flatten(mask)
    dims = ["bh"] * len(lists) + [dims for _, dims in mask._arrays()]

    def combined(*arrays: jax.Array) -> tuple[Array, ...]:
        ours = RowLists(*arrays[: len(lists)])
        return _combine_heads(ours, structure.unflatten(arrays[len(lists) :]), grid, batch, heads)

    return RowLists(*explicit_mesh.call(combined, [*map(jnp.asarray, lists), *leaves], dims))


def _combine_heads(lists: RowLists, mask: Mask, grid: Grid, batch: int, heads: int) -> tuple[Array, ...]:
    if not has_multi_head(mask):
        _, new_tiles = _traced.capacities(mask, grid, None, None)
        return _combine_mapped(lists, mask, grid, batch, heads, new_tiles)
    masks = [mask._select(None, h) for h in range(heads)]
    new_tiles = max(_traced.capacities(one, grid, None, None)[1] for one in masks)
    of_heads = []
    for h, one in enumerate(masks):
        ours = RowLists(*(x if x.shape[1] == 1 else x[:, h : h + 1] for x in lists))
        of_heads.append(_combine_mapped(ours, one, grid, batch, 1, new_tiles))
    return tuple(
        jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays], axis=1)
        for arrays in zip(*of_heads, strict=True)
    )


def _combine_mapped(
    lists: RowLists, mask: Mask, grid: Grid, batch: int, heads: int, new_tiles: int
) -> tuple[Array, ...]:
    leaves, structure = jax.tree_util.tree_flatten(mask)
    dims = ["bh"] * len(lists) + [dims for _, dims in mask._arrays()]
    new_tiles = min(new_tiles, lists.kv_blocks.shape[-1])
    chunk = max(1, _traced.CHUNK_ELEMENTS // (grid.block_q * grid.block_kv * batch * heads))

    def one(*arrays: jax.Array) -> tuple[Array, ...]:
        ours, theirs = RowLists(*arrays[: len(lists)]), structure.unflatten(arrays[len(lists) :])
        return _combine_one_traced(ours, theirs, dataclasses.replace(grid, xp=jnp), new_tiles, chunk)

    return _traced.over_examples_and_heads(one, [*lists, *leaves], dims)


def _combine_one_traced(lists: RowLists, mask: Mask, grid: Grid, new_tiles: int, chunk: int) -> tuple[Array, ...]:
    row_offsets, kv_blocks, tiles, bit_tiles = lists
    n_tiles, capacity = bit_tiles.shape[0], kv_blocks.shape[0]
    rows, columns, valid = _entries(grid, row_offsets, kv_blocks)
    i, j = jnp.maximum(rows, 0), jnp.clip(columns, 0, grid.nk - 1)
    codes = jnp.broadcast_to(mask._classify(grid, i[:, None], j[:, None]), (capacity, 1))[:, 0]
    partial = valid & (codes != EMPTY) & (codes != FULL)

    # ---- numbers: the tiles there were, an empty one, then a new one per entry that the mask leaves partial ----
    new = jnp.cumsum(partial, dtype=jnp.int32) - 1
    sound = (tiles >= -1) & (tiles < n_tiles)
    numbers = jnp.where(partial, jnp.where(new < new_tiles, n_tiles + 1 + new, _NO_TILE), tiles)
    numbers = jnp.where(valid & (codes == EMPTY), n_tiles, numbers)
    numbers = jnp.where(sound, numbers, jnp.where(tiles < -1, tiles, _NO_TILE))
    if isinstance(mask, ListedMask):
        numbers = _poison(numbers, rows, mask, grid)
    empty = jnp.zeros((1, *bit_tiles.shape[1:]), jnp.uint32)
    if new_tiles == 0:
        return row_offsets, kv_blocks, numbers, jnp.concatenate([bit_tiles, empty])

    # ---- bits of the new tiles ----
    number = jnp.where(partial & (new < new_tiles), new, new_tiles)
    entries = jnp.full(new_tiles, -1, jnp.int32).at[number].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")

    def bits(entry: jax.Array) -> jax.Array:
        listed = jnp.maximum(entry, 0)
        words = _traced.tile_words(mask, grid, i[listed], j[listed])
        if n_tiles:
            ours = bit_tiles[jnp.clip(tiles[listed], 0, n_tiles - 1)]
            words = jnp.where(tiles[listed] < 0, words, words & ours)
        return jnp.where(entry >= 0, words, jnp.uint32(0))

    made = jax.lax.map(bits, entries, batch_size=min(chunk, new_tiles))
    return row_offsets, kv_blocks, numbers, jnp.concatenate([bit_tiles, empty, made])


# ---- both -------------------------------------------------------------------------------------------------------


def _entries(grid: Grid, row_offsets: Any, kv_blocks: Any) -> tuple[Any, Any, Any]:
    """The entries of one list: row of each (-1 for none), its key block, and whether there is such a block."""
    if grid.xp is np:
        rows = rows_of_entries(row_offsets, kv_blocks.shape[0])
    else:
        capacity = kv_blocks.shape[0]
        offsets = jnp.clip(jax.lax.cummax(row_offsets), 0, capacity)
        entry = jnp.arange(capacity, dtype=jnp.int32)
        rows = jnp.searchsorted(offsets[1:], entry, side="right", method="sort").astype(jnp.int32)
        rows = jnp.where((entry >= offsets[0]) & (entry < offsets[-1]), rows, -1)
    return rows, kv_blocks, (rows >= 0) & (kv_blocks >= 0) & (kv_blocks < grid.nk)


def _poison(tiles: Array, rows: Array, other: ListedMask, grid: Grid) -> Any:
    """Rows that are bad in the other lists are bad in the result, where they have an entry."""
    bad = other.bad_rows(grid)[grid.xp.maximum(rows, 0)] & (rows >= 0)
    return grid.xp.where(bad, _NO_TILE, tiles)
