"""The native calls on block lists: the transpose, and the choice of key blocks by scores.

Below `masks` and `selection`, which say what the lists are and have both in plain JAX. A table is one example's and
head's list: all leading dimensions count tables, and split over a mesh without a collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_bsk.core.native_call import NativeCall, like
from jax_bsk.lists import ffi

# ---- transpose ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TransposeCall:
    """Static part of a call; hashable.

    Attributes:
      columns: Columns of blocks.
      fallback: The same of one table in plain JAX, `fallback(row_offsets, kv_blocks, tiles, columns)`, for what has no
        native kernel.
    """

    columns: int
    fallback: Callable[..., tuple[Any, ...]]


def _transpose_shapes(offsets, ids, tiles, *, call: TransposeCall):
    del tiles
    lead = list(range(ids.ndim - 1))
    col_offsets = like(offsets, (*offsets.shape[:-1], call.columns + 1), np.int32, [*lead, -1])
    return (col_offsets, *[like(ids, ids.shape, np.int32, [*lead, -1]) for _ in range(4)])


def _transpose_refusals(platform: str, avals: Sequence[Any], call: TransposeCall) -> list[str]:
    return ffi.transpose_refusals(platform, rows=avals[0].shape[-1] - 1, columns=call.columns)


TRANSPOSE = NativeCall(
    ffi.LISTS_TRANSPOSE,
    dims=lambda call: ffi.TRANSPOSE,
    shapes=_transpose_shapes,
    attributes=lambda call: {"columns": np.int64(call.columns)},
    refusals=_transpose_refusals,
    fallback=lambda call, *lists: call.fallback(*lists, call.columns),
)


def transpose(lists: tuple[Any, Any, Any], call: TransposeCall) -> tuple[Any, ...]:
    """Key-major lists, and the two permutations between the orders.

    Args:
      lists: int32 row_offsets [tables.., rows + 1], kv_blocks and tiles [tables.., capacity].
      call: Static part.

    Returns:
      col_offsets [.., columns + 1]; q_blocks, col_tiles, to_columns and to_rows, all [.., capacity].
    """
    return TRANSPOSE(call, *lists)


# ---- choice ---------------------------------------------------------------------------------------------------------

# States of a group, of key blocks that are chosen together; `GroupState` in csrc/lists/params.h.
CLOSED, OPEN, REQUIRED = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class ChooseCall:
    """Static part of a call; hashable.

    Attributes:
      k: Groups a row, and where more are required, these.
      width: Groups that no row exceeds.
      group: Key blocks of a group; the last may have fewer.
      capacity: Of the lists; entries past it are dropped.
      n_tiles: Bit tiles that the candidates refers to, for the fallback.
      fallback: The same of one table in plain JAX, `fallback(scores, states, candidates, call)`, for what has no native
        kernel.
    """

    k: int
    width: int
    group: int
    capacity: int
    n_tiles: int
    fallback: Callable[..., tuple[Any, ...]]


def _choose_shapes(scores, states, candidates, *, call: ChooseCall):
    del states, candidates
    lead, rows = scores.shape[:-2], scores.shape[-2]
    dims = [*range(len(lead)), -1]
    return tuple(like(scores, (*lead, n), np.int32, dims) for n in (rows + 1, call.capacity, call.capacity))


def _choose_refusals(platform: str, avals: Sequence[Any], call: ChooseCall) -> list[str]:
    del call
    return ffi.choose_refusals(platform, avals[0].dtype, groups=avals[0].shape[-1])


CHOOSE = NativeCall(
    ffi.LISTS_CHOOSE,
    dims=lambda call: ffi.CHOOSE,
    shapes=_choose_shapes,
    attributes=lambda call: {name: np.int64(getattr(call, name)) for name in ("k", "width", "group")},
    workspace=lambda avals, call: ffi.choose_workspace(avals[0].shape, avals[2].shape[1], call.width, call.group),
    refusals=_choose_refusals,
    fallback=lambda call, *operands: call.fallback(*operands, call),
)


def choose(scores: Any, states: Any, candidates: Any, call: ChooseCall) -> tuple[Any, Any, Any]:
    """Query-major lists of each row's required groups and the best others, less what the candidates leaves empty.

    Args:
      scores: float32 or float64 [tables.., rows, groups]; NaN and -inf are never chosen, of equal ones the lower group.
      states: int8 [rows, groups]: `CLOSED` groups are never chosen, `REQUIRED` ones first, whatever their score.
      candidates: int32 [rows, blocks]: the block's bit tile, -1 for a full one, below that an empty one.
      call: Static part.

    Returns:
      int32 row_offsets [tables.., rows + 1], kv_blocks and tiles [tables.., capacity]: in each row first those with a
      bit tile, ascending, then full ones, ascending; -1 past the lists' ends.
    """
    row_offsets, kv_blocks, tiles = CHOOSE(call, scores, states, candidates)
    return row_offsets, kv_blocks, tiles
