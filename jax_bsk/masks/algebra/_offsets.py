"""Offsets of queries: how far their positions are ahead of their indices, and what block lists such masks can need.

An offset is an int, or an integer array: [] for all queries, [B] for those of each example, [B|1, T] for each query by
itself (its position less its index). Arrays may be traced. What masks ask about is one example: an int, [] or [T].
"""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_bsk.core.arrays import Array, is_traced
from jax_bsk.masks.grid import MAX_LENGTH, Grid, min_max


def static_int(value: Any, who: str, name: str, *, minimum: int | None = None, remedy: str = "") -> int:
    """`value` as a Python int, or an error that names the argument."""
    if is_traced(value):
        raise TypeError(
            f"{who}: {name} must be an int that is known when tracing, got the traced {value}; "
            f"{remedy or 'make it a static argument of the jitted function (static_argnums)'}"
        )
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{who}: {name} must be an int, given {type(value).__name__} {value!r}{'; ' + remedy if remedy else ''}"
        ) from None
    if minimum is not None and result < minimum:
        raise ValueError(f"{who}: {name} must be at least {minimum}, given {result}")
    return result


def checked_offset(offset: int | Array, who: str) -> int | Array:
    """An int, or an array [], [B] or [B|1, T].

    Raises:
      TypeError: it is neither an int nor an integer array.
      ValueError: it has more dimensions.
    """
    if isinstance(offset, list | tuple):
        offset = np.asarray(offset)
    if not isinstance(offset, np.ndarray | jax.Array):
        return static_int(offset, who, "offset", remedy="or an integer array [], [B] or [B|1, T]")
    if not np.issubdtype(offset.dtype, np.integer):
        raise TypeError(
            f"{who}: offset must be an int or an integer array, got {offset.dtype}{offset.shape}; cast it, e.g. "
            "offset.astype('int32')"
        )
    if offset.ndim > 2:
        raise ValueError(
            f"{who}: offset must be an int or an array [], [B] or [B|1, T], got shape {offset.shape}; give one offset "
            "per example or one per query"
        )
    return offset


def offset_dims(offset: int | Array) -> str:
    """Leading dims of an offset that was not yet taken of one example."""
    return "b" if np.ndim(offset) else ""


def check_offset_length(offset: int | Array, who: str, q_len: int) -> None:
    """Raises ValueError where there is one offset per query, and not as many as queries."""
    shape = np.shape(offset)
    if len(shape) == 2 and shape[1] != q_len:
        raise ValueError(
            f"{who}: offset has shape {shape}; expected a last dimension of q_len={q_len}, got "
            f"{shape[1]}; give one offset per query, or one per example as [B]"
        )


def int32(value: int | Array, xp: ModuleType) -> Any:
    """An int or an integer array in [-2**30, 2**30): sums with an index do not wrap."""
    if isinstance(value, int):
        return max(-MAX_LENGTH, min(MAX_LENGTH - 1, value))
    array = xp.asarray(value)
    if array.dtype.itemsize >= 4:
        array = xp.minimum(array, MAX_LENGTH - 1)
        array = array if np.issubdtype(array.dtype, np.unsignedinteger) else xp.maximum(array, -MAX_LENGTH)
    return array.astype(np.int32)


def positions(grid: Grid, offset: int | Array, q: Array) -> Any:
    """Positions of the queries `q`."""
    ahead = int32(offset, grid.xp)
    return q + (ahead[grid.clip_q(q)] if np.ndim(ahead) else ahead)


def position_bounds(grid: Grid, offset: int | Array, i: Array) -> tuple[Any, Any]:
    """Least and greatest position of the queries of block `i`."""
    ahead = int32(offset, grid.xp)
    if not np.ndim(ahead):
        low, high = grid.q_bounds(i)
        return low + ahead, high + ahead
    low, high = min_max(grid, ahead + grid.xp.arange(grid.q_len, dtype=np.int32), grid.nq, grid.block_q)
    return low[i], high[i]


def position_code(offset: int | Array, shift: int, own: int) -> int:
    """Code of a block that a diagonal crosses: `own` where each query has an offset of its own."""
    return own if np.ndim(offset) else shift


# ---- room for lists that are made before offsets are known ------------------------------------------------------


def crossed_blocks(grid: Grid, offset: int | Array) -> int:
    """Upper bound of the blocks that the diagonal "key = position of the query" crosses, with keys on both sides of it.

    A row of bq queries crosses blocks that meet an interval of bq - 1 keys, a column of bk keys those of an interval of
    bk - 1 positions, and a staircase through nq x nk blocks has nq + nk - 1 steps.
    """
    if offset_per_query(offset):
        return grid.nq * grid.nk
    of_row = blocks_met(min(grid.block_q, grid.q_len) - 1, grid.block_kv)
    of_column = blocks_met(min(grid.block_kv, grid.kv_len) - 1, grid.block_q)
    return max(0, min(grid.nq * min(of_row, grid.nk), grid.nk * min(of_column, grid.nq), grid.nq + grid.nk - 1))


def window_blocks(grid: Grid, offset: int | Array, more: int) -> int:
    """Upper bound of the blocks visited where a block of queries sees its own positions and `more` keys around."""
    if offset_per_query(offset):
        return grid.nq * grid.nk
    return grid.nq * min(blocks_met(min(grid.block_q, grid.q_len) + more, grid.block_kv), grid.nk)


def offset_per_query(offset: int | Array) -> bool:
    """Whether each query has an offset of its own; of a mask that was not yet taken of one example."""
    return np.ndim(offset) == 2


def blocks_met(tokens: int, block: int) -> int:
    """Blocks that an interval of so many tokens meets at most, wherever it begins; at least 1."""
    return (max(tokens, 1) + block - 2) // block + 1
