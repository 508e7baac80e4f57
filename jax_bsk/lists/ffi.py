"""Lowering of the calls on block lists: names of targets and attributes, and the order of operands (`csrc/lists`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from jax_bsk.core import library
from jax_bsk.core.library import LISTS_CHOOSE, LISTS_TRANSPOSE
from jax_bsk.core.version import __version__


def takes_transpose(platform: str, rows: int, columns: int) -> bool:
    """Whether the platform's library transposes lists of this size: on CUDA a table's counters are in shared memory."""
    native = library.load(platform)
    return native.usable and rows + 4 * columns + 3 <= native.info.get("lists_max_words", math.inf)


def lists_transpose(ctx, operands: Sequence[Any], columns: int):
    """Lowers to the transpose of block lists.

    Operands: row_offsets, kv_blocks, tiles. Results: col_offsets, q_blocks, col_tiles, entries, places.
    """
    return jax.ffi.ffi_lowering(LISTS_TRANSPOSE)(ctx, *operands, columns=np.int64(columns), version=__version__)


def takes_choose(platform: str, dtype: np.dtype, units: int) -> bool:
    """Whether the platform's library chooses by such scores: on CUDA a row's keys or its list are in shared memory."""
    native = library.load(platform)
    return native.usable and dtype == np.float32 and units <= native.info.get("lists_max_units", math.inf)


@dataclasses.dataclass(frozen=True)
class ChooseAttributes:
    """Static numbers of a choice of key blocks.

    Attributes:
      k: Units a row, and where more are required, these.
      width: Units that no row exceeds.
      unit: Key blocks of a unit.
    """

    k: int
    width: int
    unit: int

    def encode(self) -> dict[str, Any]:
        return {
            "k": np.int64(self.k),
            "width": np.int64(self.width),
            "unit": np.int64(self.unit),
            "version": __version__,
        }


def lists_choose(ctx, operands: Sequence[Any], attributes: ChooseAttributes, platform: str):
    """Lowers to the choice of key blocks by scores.

    Operands: scores, states, outline. Results: row_offsets, kv_blocks, tiles; on CUDA also a workspace, as for
    attention.
    """
    results = list(ctx.avals_out)
    if platform == "cuda":
        words = choose_workspace(ctx.avals_in[0].shape, ctx.avals_in[2].shape[1], attributes)
        results.append(jax.core.ShapedArray((words,), np.dtype(np.int32)))
    lower = jax.ffi.ffi_lowering(LISTS_CHOOSE)
    return lower(ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


def choose_workspace(scores_shape: Sequence[int], blocks: int, attributes: ChooseAttributes) -> int:
    """Words of `cuda::ChooseWorkspace` in `csrc/lists/choose.cu`, which the handler checks."""
    return 2 * math.prod(scores_shape[:-1]) * (1 + min(attributes.width * attributes.unit, blocks))
