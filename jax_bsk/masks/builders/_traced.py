"""Building a BlockMask inside a trace: segment ids, arrays or functions whose values come later.

Room is fixed beforehand (`capacities`). Lists come from prefix sums. Bits are computed only for as many tiles as there
is room for, a chunk at a time, so no T x S array exists. What finds no room is not dropped silently: offsets and tile
numbers keep their true values, which lie outside the arrays, and kernels answer such rows with NaN.

Everything is vmapped over examples and heads, so a mesh that shards them needs no communication here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, is_array, of_rank
from jax_bsk.masks.algebra.mask import Mask, count_codes, has_multi_head
from jax_bsk.masks.block_lists import RowLists
from jax_bsk.masks.builders import _intervals
from jax_bsk.masks.grid import EMPTY, FULL, Grid

# Elements evaluated at a time, of all examples and heads together.
CHUNK_ELEMENTS = 2**22


def build(
    mask: Mask, grid: Grid, *, batch: int, heads: int, max_blocks: int | None = None, max_tiles: int | None = None
) -> RowLists:
    """Lists and tiles of a mask with traced parts; see `BlockMask.from_mask` for the limits."""
    mask = jax.tree.map(lambda leaf: leaf if is_array(leaf) else np.asarray(leaf), mask)
    leaves, structure = jax.tree_util.tree_flatten(mask)

    def lists(*leaves: jax.Array) -> tuple[Array, ...]:
        return _build_heads(jax.tree_util.tree_unflatten(structure, leaves), grid, batch, heads, max_blocks, max_tiles)

    return RowLists(*explicit_mesh.call(lists, leaves, [dims for _, dims in mask._arrays()]))


def _build_heads(
    mask: Mask, grid: Grid, batch: int, heads: int, max_blocks: int | None, max_tiles: int | None
) -> tuple[Array, ...]:
    if not has_multi_head(mask):
        return _build(mask, grid, batch, heads, *capacities(mask, grid, max_blocks, max_tiles))

    # Heads have different structure: each is built by itself, equal ones once, all with the same room.
    singles = [mask._select(None, h) for h in range(heads)]
    sizes = [capacities(single, grid, max_blocks, max_tiles) for single in singles]
    capacity, n_tiles = (max(size[n] for size in sizes) for n in range(2))
    done: list[tuple[Mask, tuple[Array, ...]]] = []
    built: list[tuple[Array, ...]] = []
    for single in singles:
        same = [lists for other, lists in done if other == single]
        if not same:
            done.append((single, _build(single, grid, single.batch, 1, capacity, n_tiles)))
        built.append(same[0] if same else done[-1][1])

    def join(arrays: tuple[Array, ...]) -> jax.Array:
        # Only some heads may have ids per example.
        return jnp.concatenate([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in arrays], axis=1)

    return tuple(join(arrays) for arrays in zip(*built, strict=True))


def capacities(mask: Mask, grid: Grid, max_blocks: int | None, max_tiles: int | None) -> tuple[int, int]:
    """Numbers of entries and tiles to make room for, per example and head: as told, or the most that can be needed."""
    host = dataclasses.replace(grid, xp=np)
    if max_blocks is None or max_tiles is None:
        visited, partial = count_codes(mask._known_on_host(host), host)
        visited = min(visited, mask._visited_bound(host))
        max_blocks = max(1, visited) if max_blocks is None else max_blocks
        max_tiles = min(partial, mask._partial_bound(host), max_blocks) if max_tiles is None else max_tiles
    return max_blocks, max_tiles


def _build(mask: Mask, grid: Grid, batch: int, heads: int, capacity: int, n_tiles: int) -> tuple[Array, ...]:
    """Lists and tiles [B|1, H|1, ..]: of each example and head that the arrays of the mask distinguish."""
    leaves, structure = jax.tree_util.tree_flatten(mask)
    chunk = max(1, CHUNK_ELEMENTS // (grid.block_q * grid.block_kv * batch * heads))

    def one(*leaves: jax.Array) -> tuple[Array, ...]:
        return _build_one(jax.tree_util.tree_unflatten(structure, leaves), grid, capacity, n_tiles, chunk)

    return over_examples_and_heads(one, leaves, [dims for _, dims in mask._arrays()])


def over_examples_and_heads(
    function: Callable[..., tuple[Array, ...]], leaves: Sequence[Array], dims: Sequence[str]
) -> tuple[Array, ...]:
    """`function(*leaves)` of each example and head, stacked as [B|1, H|1, ..].

    Args:
      function: function of the leaves without their leading dims; it returns a tuple.
      leaves: arrays.
      dims: the leading dims of each: "", "b", "h" or "bh", shared where their size is 1.
    """
    # Dims of size 1 are shared: drop them. What is left is [B][H]..., in this order.
    axes = ["".join(d for n, d in enumerate(dim) if leaf.shape[n] > 1) for leaf, dim in zip(leaves, dims, strict=True)]
    leaves = [
        jnp.asarray(leaf).reshape([s for n, s in enumerate(leaf.shape) if n >= len(dim) or s > 1])
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    for dim in "hb":  # the inner one first
        in_axes = [0 if dim in axis else None for axis in axes]
        function = jax.vmap(function, in_axes=in_axes) if 0 in in_axes else _with_leading_one(function)
    return function(*leaves)


def _with_leading_one(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    return lambda *leaves: tuple(x[None] for x in function(*leaves))


def _build_one(mask: Mask, grid: Grid, capacity: int, n_tiles: int, chunk: int) -> tuple[Array, ...]:
    nq, nk = grid.nq, grid.nk
    grid = dataclasses.replace(grid, xp=jnp)
    if nq and nk:
        intervals = mask._key_intervals(grid, jnp.arange(grid.q_len, dtype=jnp.int32))
        if intervals is not None:
            return _intervals.build(intervals, grid, capacity, n_tiles)
    i = jnp.arange(nq, dtype=jnp.int32)[:, None]
    j = jnp.arange(nk, dtype=jnp.int32)[None, :]

    # ---- classify ----
    codes = jnp.broadcast_to(mask._classify(grid, i, j), (nq, nk))
    full = codes == FULL
    partial = (codes != EMPTY) & ~full

    # ---- positions in the lists: partial blocks first, then full ones ----
    def rank(flags: jax.Array) -> jax.Array:
        return jnp.cumsum(flags, axis=1, dtype=jnp.int32) - 1

    partial_counts = partial.sum(1, dtype=jnp.int32)
    counts = partial_counts + full.sum(1, dtype=jnp.int32)
    row_offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    position = row_offsets[:-1, None] + jnp.where(partial, rank(partial), partial_counts[:, None] + rank(full))
    position = jnp.where(partial | full, position, capacity).ravel()
    tile = jnp.where(partial.ravel(), jnp.cumsum(partial.ravel(), dtype=jnp.int32) - 1, -1)

    def scatter(size: int, fill: int, at: jax.Array, values: jax.Array) -> jax.Array:
        # Positions are distinct, or `size` and past it, which drops them: those are out of room.
        return jnp.full(size, fill, jnp.int32).at[at].set(values, mode="drop")

    kv_blocks = scatter(capacity, -1, position, jnp.broadcast_to(j, (nq, nk)).ravel())
    tiles = scatter(capacity, -1, position, tile)

    # ---- bits of the tiles ----
    shape = (grid.block_q, grid.block_kv // 32)
    if n_tiles == 0 or nq == 0 or nk == 0:
        return row_offsets, kv_blocks, tiles, jnp.zeros((n_tiles, *shape), jnp.uint32)
    block_of_tile = scatter(n_tiles, -1, jnp.where(tile >= 0, tile, n_tiles), jnp.arange(nq * nk, dtype=jnp.int32))

    def bits(block: jax.Array) -> jax.Array:
        row, column = jnp.maximum(block, 0) // nk, jnp.maximum(block, 0) % nk
        return jnp.where(block >= 0, tile_words(mask, grid, row, column), jnp.uint32(0))

    return row_offsets, kv_blocks, tiles, jax.lax.map(bits, block_of_tile, batch_size=min(chunk, n_tiles))


def tile_words(mask: Mask, grid: Grid, row: jax.Array, column: jax.Array) -> jax.Array:
    """uint32 [block_q, block_kv // 32], the bit tile of the block (row, column)."""
    shape = (grid.block_q, grid.block_kv // 32)
    q = (row * grid.block_q + jnp.arange(grid.block_q, dtype=jnp.int32))[:, None]
    k = (column * grid.block_kv + jnp.arange(grid.block_kv, dtype=jnp.int32))[None, :]
    attended = jnp.broadcast_to(mask._evaluate(grid, q, k), (grid.block_q, grid.block_kv))
    weights = of_rank(jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32), 3)
    return jnp.sum(attended.reshape(*shape, 32).astype(jnp.uint32) * weights, -1, dtype=jnp.uint32)
