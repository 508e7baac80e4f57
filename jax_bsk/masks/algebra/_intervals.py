"""Masks in which each query attends to one interval of keys, and what whole blocks can be told from the intervals.

Causal masks, windows, chunks, prefixes, documents, and what `&` makes of them are such masks. Both ends of the
intervals never decrease from one query to the next, so the visited blocks of a row follow from its queries by
themselves: no block is asked about.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jax_bsk.core.arrays import Array
from jax_bsk.masks.algebra._offsets import int32
from jax_bsk.masks.grid import MAX_LENGTH, Grid


class Intervals(NamedTuple):
    """The keys of queries: key k where `first <= k < end`.

    Attributes:
      first, end: int32 of the shape of the positions that were asked about, or broadcastable to it. Of the queries with
        a key (`first < end`, inside the keys) neither ever decreases.
      own: whether every query that attends to anything attends to the key at its own index, and the queries that attend
        to nothing are at the ends. Then a row's keys are one interval.
      valid: a boolean: whether the data keep what the mask was promised of them; None where there is no promise.
    """

    first: Any
    end: Any
    own: bool
    valid: Any = None

    def intersect(self, other: Intervals, grid: Grid) -> Intervals:
        """The keys that are in both."""
        valid = [x for x in (self.valid, other.valid) if x is not None]
        return Intervals(
            grid.xp.maximum(self.first, other.first),
            grid.xp.minimum(self.end, other.end),
            self.own and other.own,
            valid[0] & valid[1] if len(valid) == 2 else valid[0] if valid else None,
        )


class RowBounds(NamedTuple):
    """What the intervals of a block's queries say of it, int32 of one shape.

    Attributes:
      first, end: the keys that any of its queries attends to lie in [first, end); first is 2^30 where there are none.
      full_first, full_end: every one of its queries attends to [full_first, full_end), empty if full_first >= full_end.
    """

    first: Any
    end: Any
    full_first: Any
    full_end: Any


def inside(intervals: Intervals, grid: Grid, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """`first` and `end` of that shape, cut to the keys; of queries that attend to nothing 2^30 and 0."""
    xp = grid.xp
    first, end = xp.maximum(intervals.first, 0), xp.minimum(intervals.end, grid.kv_len)
    some = first < end
    first, end = xp.where(some, first, np.int32(MAX_LENGTH)), xp.where(some, end, np.int32(0))
    return xp.broadcast_to(first, shape), xp.broadcast_to(end, shape)


def row_bounds(grid: Grid, first: Array, end: Array, real: Array) -> RowBounds:
    """Bounds of rows.

    Args:
      grid: Grid of the mask.
      first, end: int32 [rows, block_q] as `inside` gives them.
      real: Booleans [rows, block_q]: whether a query is inside the length.
    """
    xp = grid.xp
    beyond, none = np.int32(MAX_LENGTH), np.int32(0)
    return RowBounds(
        xp.where(real, first, beyond).min(-1),
        xp.where(real, end, none).max(-1),
        xp.where(real, first, none).max(-1),
        xp.where(real, end, beyond).min(-1),
    )


def classify(grid: Grid, bounds: RowBounds, j: Array, partial: int) -> Any:
    """Class codes of the blocks of rows with these bounds and of the columns `j`."""
    low, high = grid.kv_bounds(j)
    empty = (high < bounds.first) | (low >= bounds.end)
    return grid.code(empty, (low >= bounds.full_first) & (high < bounds.full_end), partial)


def number(value: int | Array, example: Array | None, grid: Grid) -> Any:
    """A mask's number for each position: an int, or an array [] or (where `example` tells them apart) [examples].

    Returns:
      An int or int32 array in [-2^30, 2^30); None where the array's numbers are of something else.
    """
    whole = int32(value, grid.xp)
    if np.ndim(whole) == 0:
        return whole
    if np.ndim(whole) > 1 or example is None:
        return None
    return whole[grid.xp.clip(example, 0, whole.shape[0] - 1)]


def reaching(grid: Grid, positions: Array, left: int | None, right: int | None) -> tuple[Any, Any]:
    """`first` and `end` of the keys from `left` before a position to `right` after it, None for unbounded.

    Positions may be anything of int32, and the numbers anything that is not negative: nothing wraps.
    """
    xp, most = grid.xp, 2**31 - 1
    first = xp.zeros_like(positions) if left is None else xp.maximum(positions, 0) - np.int32(min(left, most))
    if right is None:
        return first, xp.full_like(positions, MAX_LENGTH)
    # Past 2^30 there is no key, so of what is not negative less than that is added.
    near = xp.minimum(positions, MAX_LENGTH - 1) + np.int32(min(right, MAX_LENGTH - 1)) + np.int32(1)
    far = xp.minimum(positions, -1) + np.int32(min(right, most)) + np.int32(1)
    return first, xp.where(positions >= 0, near, far)
