"""Masks in which each query attends to one interval of keys, or to the union of a few.

A subclass gives, for queries by their indices, the first key and the one behind the last key of each interval. Bounds
of blocks are the least and greatest of these.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, as_array
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import EMPTY, FULL, MAX_LENGTH, OWN, Grid, in_blocks, min_max

__all__: list[str] = []

Interval = tuple[Any, Any]  # first key and the one behind the last key, of each query; empty where first >= last


class RangesMask(Mask):
    """A mask of intervals of keys per query."""

    _coarse_bounds = True

    def _key_ranges(self, grid: Grid, q: Array) -> Sequence[Interval]:
        """Intervals of the queries `q` (indices of any shape, inside the length), int32 of the same shape."""
        raise NotImplementedError

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        xp, (k_low, k_high) = grid.xp, grid.kv_bounds(j)
        code = xp.zeros((1, 1), np.int8) + np.int8(EMPTY)
        for first, last in self._key_ranges(grid, xp.arange(grid.q_len, dtype=np.int32)):
            some = first < last
            bounds = (xp.where(some, first, MAX_LENGTH), first, last, xp.where(some, last, -1))
            (least, _), (_, latest), (earliest, _), (_, greatest) = (
                min_max(grid, x, grid.nq, grid.block_q) for x in bounds
            )
            touched = (least[i] <= k_high) & (greatest[i] > k_low)
            # Where every interval begins at or before the first key and ends behind the last one, none is empty.
            full = (latest[i] <= k_low) & (earliest[i] > k_high)
            code = xp.maximum(code, xp.where(full, np.int8(FULL), xp.where(touched, np.int8(OWN), np.int8(EMPTY))))
        return code

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        # Positions before the first (of queries in a packed sequence) select nothing.
        xp, ranges = grid.xp, self._key_ranges(grid, grid.xp.maximum(grid.clip_q(q), 0))
        found = [(k >= first) & (k < xp.where(q < 0, 0, last)) for first, last in ranges]
        return functools.reduce(lambda a, b: a | b, found, grid.xp.zeros((1, 1), bool))

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        ends = [x for interval in self._key_ranges(grid, np.arange(grid.q_len, dtype=np.int32)) for x in interval]
        ends = np.concatenate([in_blocks(x, grid.nq, grid.block_q) for x in ends], 1)
        return (pieces(ends, i, j, grid.block_kv),)


def pieces(ends: np.ndarray, of: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """Numbers [n] of blocks, equal where their tokens on one side are the same and no interval ends on the other side.

    Args:
      ends: [blocks, m], ends of the intervals of each block of tokens.
      of: [n], numbers of blocks of those tokens.
      at: [n], numbers of blocks, of `size` tokens, in which the intervals lie.
    """
    stride = np.int64(MAX_LENGTH) * 4
    sorted_ends = np.unique(ends + np.arange(len(ends))[:, None] * stride)
    first = at.astype(np.int64) * size
    before, behind = (np.searchsorted(sorted_ends, of * stride + x, side="right") for x in (first, first + size - 1))
    alone = sorted_ends.size + 1 + np.arange(at.size)
    return np.where(before == behind, before, alone)


# ---- integer arrays of a token, for all, per example, or per example and head -----------------------------------


def of_lists(value: Any) -> Array:
    """An array as it is; lists of ints as int32, which stays what it is inside of `jit`."""
    if isinstance(value, list | tuple) and not value:
        return np.zeros(0, np.int32)
    array = as_array(value)
    if array is value or array.dtype != np.int64 or (array.size and abs(array).max() >= 2**31):
        return array
    return array.astype(np.int32)


def checked_integers(value: Any, who: str, name: str, last: str, *, scalar: bool = False) -> Array:
    """Integers [last], [B|1, last] or [B|1, H|1, last], host or traced; with `scalar` one for all, too.

    Raises:
      TypeError: they are no integers.
      ValueError: they have another number of dimensions.
    """
    array = of_lists(value)
    shapes = f"[{last}], [B|1, {last}] or [B|1, H|1, {last}]"
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{who}: {name} must hold integers {shapes}, given {array.dtype}{array.shape}; cast it, e.g. "
            f"{name}.astype('int32')"
        )
    if array.ndim > 3 or (array.ndim == 0 and not scalar):
        raise ValueError(f"{who}: {name} must have a shape of {shapes}, given {array.shape}")
    return array


def leading_dims(value: ArrayLike | None) -> str:
    """Leading dims of such an array."""
    return ("", "", "b", "bh")[np.ndim(value)]  # pyright: ignore[reportArgumentType]


def checked_length(value: Any, who: str, name: str, expected: int, what: str) -> None:
    """Raises ValueError where an array's last dimension is another one."""
    if np.ndim(value) and np.shape(value)[-1] != expected:
        raise ValueError(
            f"{who}: {name} has shape {np.shape(value)}; expected a last dimension of {what}={expected}; give one "
            "number per token"
        )
