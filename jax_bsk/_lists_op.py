"""The native transpose of block lists.

Below `masks`, which says what the key-major lists are and has them in plain JAX; `_tables_op` makes a call of it that
vmaps, splits over meshes and lowers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_bsk import _ffi
from jax_bsk._native import like
from jax_bsk._tables_op import Layout, tables_op


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
    if not _ffi.takes_transpose(platform, rows=ctx.avals_in[0].shape[-1] - 1, columns=call.columns):
        return None
    return _ffi.lists_transpose(ctx, operands, call.columns)


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
