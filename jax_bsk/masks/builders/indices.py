"""Lists of padded index lists: for each query block, the numbers of the key blocks that it visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, as_array, is_traced
from jax_bsk.masks.block_lists import RowLists, no_tiles
from jax_bsk.masks.grid import Grid


def from_indices(given_blocks: ArrayLike, given_counts: ArrayLike, grid: Grid) -> RowLists:
    """Block lists of padded index lists (`BlockMask.from_indices`); all blocks are full."""
    kv_blocks, counts = _integers(given_blocks, "kv_blocks"), _integers(given_counts, "counts")
    if kv_blocks.ndim not in (2, 3, 4) or kv_blocks.shape[-2] != grid.nq:
        raise ValueError(
            f"kv_blocks must be [nq, k], [H|1, nq, k] or [B|1, H|1, nq, k] with nq={grid.nq} (q_len={grid.q_len} in "
            f"blocks of {grid.block_q}), given shape {kv_blocks.shape}"
        )
    if counts.shape != kv_blocks.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of kv_blocks without its last dimension, {kv_blocks.shape[:-1]}, given "
            f"{counts.shape}"
        )
    shape = (1,) * (4 - kv_blocks.ndim) + kv_blocks.shape
    traced = is_traced(kv_blocks) or is_traced(counts)
    if traced:
        return _indices_traced(jnp.reshape(kv_blocks, shape), jnp.reshape(counts, shape[:-1]), grid)
    return _indices_host(np.reshape(np.asarray(kv_blocks), shape), np.reshape(np.asarray(counts), shape[:-1]), grid)


def _integers(given: ArrayLike, name: str) -> Array:
    x = as_array(given)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, given {x.dtype}{x.shape}")
    return x


def _indices_host(kv_blocks: np.ndarray, counts: np.ndarray, grid: Grid) -> RowLists:
    width = kv_blocks.shape[-1]
    _raise_row((counts < 0) | (counts > width), f"its count is not in [0, {width}]")
    listed = np.arange(width) < counts[..., None]
    _raise_row((listed & ((kv_blocks < 0) | (kv_blocks >= grid.nk))).any(-1), f"it has an id outside [0, {grid.nk})")
    pairs = listed[..., 1:]
    _raise_row((pairs & (kv_blocks[..., 1:] == kv_blocks[..., :-1])).any(-1), "it has an id twice")
    _raise_row((pairs & (kv_blocks[..., 1:] < kv_blocks[..., :-1])).any(-1), "its ids do not ascend; sort them")
    batch, heads = counts.shape[:2]
    row_offsets = np.zeros((batch, heads, grid.nq + 1), np.int32)
    np.cumsum(counts, axis=-1, out=row_offsets[..., 1:])
    ids = np.full((batch, heads, max(1, int(row_offsets[..., -1].max(initial=0)))), -1, np.int32)
    for b in range(batch):
        for h in range(heads):
            chosen = kv_blocks[b, h][listed[b, h]]
            ids[b, h, : chosen.size] = chosen
    return RowLists(row_offsets, ids, np.full_like(ids, -1), no_tiles(grid))


def _raise_row(bad: np.ndarray, what: str) -> None:
    if bad.any():
        b, h, row = (int(n[0]) for n in np.nonzero(bad))
        raise ValueError(f"from_indices: batch {b}, head {h}, row {row}: {what}")


def _indices_traced(kv_blocks: jax.Array, counts: jax.Array, grid: Grid) -> RowLists:
    row_offsets, ids = explicit_mesh.call(jax.vmap(jax.vmap(packed_rows)), [kv_blocks, counts], ["bh"] * 2)
    return RowLists(row_offsets, ids, jnp.full_like(ids, -1), no_tiles(grid))


def packed_rows(kv_blocks: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Offsets [nq + 1] and ids [nq * width] of one table's padded lists [nq, width] without their gaps."""
    width = kv_blocks.shape[-1]
    if width == 0:  # nowhere to put the mark of a bad count
        kv_blocks, width = jnp.full((*kv_blocks.shape[:-1], 1), -1, jnp.int32), 1
        counts = jnp.where(counts == 0, 0, -1)
    # A count that disagrees with the lists poisons its own row only: the row becomes one entry with an id of -1.
    bad = (counts < 0) | (counts > width)
    counts = jnp.where(bad, 1, counts).astype(jnp.int32)
    ids = jnp.where(bad[:, None], -1, kv_blocks).astype(jnp.int32)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    listed = jnp.arange(width, dtype=jnp.int32)[None] < counts[:, None]
    # Stable sort by listed or not: closes the gaps and keeps the order (and needs no scatter).
    _, ids = jax.lax.sort(
        ((~listed).ravel().astype(jnp.int32), jnp.where(listed, ids, -1).ravel()), num_keys=1, is_stable=True
    )
    return offsets, ids if ids.size else jnp.full(1, -1, jnp.int32)
