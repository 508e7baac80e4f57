"""The custom calls on block lists as `csrc/lists` knows them: names, operands, limits and workspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jax_bsk.core import library
from jax_bsk.core.dims import Dims

LISTS_CHOOSE = "jax_bsk_lists_choose"
LISTS_TRANSPOSE = "jax_bsk_lists_transpose"

TRANSPOSE = Dims(
    operands={"row_offsets": ".", "kv_blocks": ".", "tiles": "."},
    results={"col_offsets": ".", "q_blocks": ".", "col_tiles": ".", "to_columns": ".", "to_rows": "."},
    follow=("row_offsets",),
)
CHOOSE = Dims(
    operands={"scores": "..", "states": "..", "candidates": ".."},
    results={"row_offsets": ".", "kv_blocks": ".", "tiles": "."},
    unmapped=("states", "candidates"),
    follow=("scores",),
)


def transpose_refusals(platform: str, rows: int, columns: int) -> list[str]:
    """Why a platform does not transpose such lists natively: on CUDA a table's counters are in shared memory."""
    native = library.load(platform)
    if not native.usable:
        return [native.problem or ""]
    limit = native.info.get("lists_max_words", math.inf)
    return [] if rows + 4 * columns + 3 <= limit else [f"Its counters are more than {limit} words."]


def choose_refusals(platform: str, dtype: np.dtype, groups: int) -> list[str]:
    """Why a platform does not choose by such scores natively: on CUDA a row's keys or its list are in shared memory."""
    native = library.load(platform)
    if not native.usable:
        return [native.problem or ""]
    limit = native.info.get("lists_max_groups", math.inf)
    return [] if dtype == np.float32 and groups <= limit else [f"It takes float32 scores of {limit} groups per row."]


def choose_workspace(scores_shape: Sequence[int], blocks: int, width: int, group: int) -> int:
    """Bytes of a choice's workspace on CUDA."""
    *tables, rows, _ = scores_shape
    sizes = {"tables": math.prod(tables), "rows": rows, "blocks": blocks}
    return library.workspace(LISTS_CHOOSE, **sizes, width=width, group=group)
