"""Masks that are intervals: bounds and bit tiles of blocks of any tokens, neighbours or not.

A mask that says of each query which interval of places it attends to, on each of a few axes, can be asked about blocks
of reordered tokens (`ordered`): the least and greatest places in a block are its box, and boxes that do not meet are
empty blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jax_bsk.core.arrays import Array
from jax_bsk.masks.grid import OWN, Grid, alike, in_blocks, min_max

# Stand for sides without a bound.
LEAST, GREATEST = -(2**31), 2**31 - 1


class PlaceIntervals(NamedTuple):
    """Query q attends to key k where `low[n][q] <= place[n][k] <= high[n][q]` on every axis n.

    Attributes:
      low, high: int32 [q_len] per axis, the first and last place of each query's interval.
      place: int32 [kv_len] per axis, the place of each key.
    """

    low: tuple[Any, ...]
    high: tuple[Any, ...]
    place: tuple[Any, ...]

    def taken(self, queries: Array | None, keys: Array | None) -> PlaceIntervals:
        """The intervals of the queries and keys of these numbers; None for all."""
        low, high, place = (
            rows if numbers is None else tuple(x[numbers] for x in rows)
            for rows, numbers in zip(self, (queries, queries, keys), strict=True)
        )
        return PlaceIntervals(low, high, place)


def place_intervals(grid: Grid, low: list[Any], high: list[Any], place: list[Any]) -> PlaceIntervals:
    """Of arrays or numbers, one per axis."""
    xp = grid.xp
    first, last = (tuple(xp.broadcast_to(xp.asarray(x, np.int32), (grid.q_len,)) for x in rows) for rows in (low, high))
    return PlaceIntervals(first, last, tuple(xp.asarray(x, np.int32) for x in place))


def window(grid: Grid, positions: Any, sides: tuple[int | None, int | None]) -> tuple[Any, Any]:
    """First and last place of a window around int32 positions; sums that int32 does not hold are its ends."""
    left, right = sides
    low = high = None
    if left is not None and left <= GREATEST:
        low = grid.xp.maximum(positions, LEAST + left) - left
    if right is not None and right <= GREATEST:
        high = grid.xp.minimum(positions, GREATEST - right) + right
    return LEAST if low is None else low, GREATEST if high is None else high


def classify(x: PlaceIntervals, grid: Grid, i: Array, j: Array) -> Any:
    """Class codes of the blocks (i, j), from the boxes of their queries and keys."""
    xp = grid.xp
    empty, full = xp.zeros((1, 1), bool), xp.ones((1, 1), bool)
    for low, high, place in zip(*x, strict=True):
        first_low, last_low = (n[i] for n in min_max(grid, low, grid.nq, grid.block_q))
        first_high, last_high = (n[i] for n in min_max(grid, high, grid.nq, grid.block_q))
        first, last = (n[j] for n in min_max(grid, place, grid.nk, grid.block_kv))
        empty = empty | (last < first_low) | (first > last_high)
        full = full & (first >= last_low) & (last <= first_high)
    return grid.code(empty, full, OWN)


def tile_key(x: PlaceIntervals, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
    """Keys of bit tiles (`Mask._tile_key`): what a block is apart from where it lies, and distances of two blocks."""
    sides = [_relative(side, grid.nq, grid.block_q) for side in (x.low, x.high)]
    first, inside = _relative(x.place, grid.nk, grid.block_kv)
    keys = [_kinds([patterns for _, patterns in sides])[i], _kinds([inside])[j]]
    for side, patterns in sides:
        for n in range(first.shape[0]):
            # Beyond these distances the whole block is on one side of the bound.
            least, greatest = inside[n].min() - patterns[n].max(), inside[n].max() - patterns[n].min() + 1
            keys.append(np.clip(side[n, i] - first[n, j], least, greatest))
    return tuple(keys)


def _relative(numbers: tuple[np.ndarray, ...], blocks: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The first number of each block [axes, blocks], and all of them less that [axes, blocks, block]."""
    split = np.stack([in_blocks(row.astype(np.int64), blocks, block) for row in numbers])
    return split[..., 0], split - split[..., :1]


def _kinds(patterns: list[np.ndarray]) -> np.ndarray:
    """Numbers [blocks], the same for blocks of equal patterns [axes, blocks, block]."""
    joined = np.concatenate(patterns, 0).swapaxes(0, 1)
    return alike(joined.reshape(joined.shape[0], -1))
