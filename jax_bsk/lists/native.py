"""The native calls on block lists: the transpose, and the choice of key blocks by scores.

Below `masks` and `selection`, which say what the lists are and have both in plain JAX; `_tables_op` makes calls of them
that vmap, split over meshes and lower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_bsk.core.native_call import like
from jax_bsk.core.tables_op import Layout, tables_op
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


def _transpose_natively(ctx, operands: Sequence[Any], call: TransposeCall, platform: str):
    if not ffi.takes_transpose(platform, rows=ctx.avals_in[0].shape[-1] - 1, columns=call.columns):
        return None
    return ffi.lists_transpose(ctx, operands, call.columns)


_transpose = tables_op(
    "jax_bsk_lists_transpose",
    Layout(operands=("r", "e", "e"), shared=(), results=("c", "e", "e", "e", "e")),
    _transpose_shapes,
    _transpose_natively,
    lambda call, *lists: call.fallback(*lists, call.columns),
)


def transpose(lists: tuple[Any, Any, Any], call: TransposeCall) -> tuple[Any, ...]:
    """Key-major lists, and the two permutations between the orders.

    Args:
      lists: int32 row_offsets [tables.., rows + 1], kv_blocks and tiles [tables.., capacity].
      call: Static part.

    Returns:
      col_offsets [.., columns + 1]; q_blocks, col_tiles, entries and places, all [.., capacity].
    """
    return _transpose(lists, call)


# ---- choice ---------------------------------------------------------------------------------------------------------

# States of a unit, of key blocks that are chosen together; `UnitState` in csrc/lists/params.h.
CLOSED, OPEN, REQUIRED = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class ChooseCall:
    """Static part of a call; hashable.

    Attributes:
      k: Units a row, and where more are required, these.
      width: Units that no row exceeds.
      unit: Key blocks of a unit; the last may have fewer.
      capacity: Of the lists; entries past it are dropped.
      n_tiles: Bit tiles that the outline refers to, for the fallback.
      fallback: The same of one table in plain JAX, `fallback(scores, states, outline, call)`, for what has no native
        kernel.
    """

    k: int
    width: int
    unit: int
    capacity: int
    n_tiles: int
    fallback: Callable[..., tuple[Any, ...]]


def _choose_shapes(scores, states, outline, *, call: ChooseCall):
    del states, outline
    lead, rows = scores.shape[:-2], scores.shape[-2]
    dims = [*range(len(lead)), -1]
    return tuple(like(scores, (*lead, n), np.int32, dims) for n in (rows + 1, call.capacity, call.capacity))


def _choose_natively(ctx, operands: Sequence[Any], call: ChooseCall, platform: str):
    scores = ctx.avals_in[0]
    if not ffi.takes_choose(platform, scores.dtype, units=scores.shape[-1]):
        return None
    return ffi.lists_choose(ctx, operands, ffi.ChooseAttributes(call.k, call.width, call.unit), platform)


_choose = tables_op(
    "jax_bsk_lists_choose",
    Layout(operands=("ru",), shared=("ru", "rb"), results=("o", "e", "e")),
    _choose_shapes,
    _choose_natively,
    lambda call, *operands: call.fallback(*operands, call),
)


def choose(scores: Any, states: Any, outline: Any, call: ChooseCall) -> tuple[Any, Any, Any]:
    """Query-major lists of each row's required units and the best others, less what the outline leaves empty.

    Args:
      scores: float32 or float64 [tables.., rows, units]; NaN and -inf are never chosen, of equal ones the lower unit.
      states: int8 [rows, units]: `CLOSED` units are never chosen, `REQUIRED` ones first, whatever their score.
      outline: int32 [rows, blocks]: the block's bit tile, -1 for a full one, below that an empty one.
      call: Static part.

    Returns:
      int32 row_offsets [tables.., rows + 1], kv_blocks and tiles [tables.., capacity]: in each row first those with a
      bit tile, ascending, then full ones, ascending; -1 past the lists' ends.
    """
    row_offsets, kv_blocks, tiles = _choose((scores, states, outline), call)
    return row_offsets, kv_blocks, tiles
