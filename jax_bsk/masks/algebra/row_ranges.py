"""`RowRangeMask`: an interval of keys for each query, given by its ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, is_array
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32, static_int
from jax_bsk.masks.algebra._ranges import Interval, RangesMask, checked_integers, checked_length, leading_dims
from jax_bsk.masks.grid import Grid

__all__ = ["RowRangeMask"]


class RowRangeMask(RangesMask):
    """Each query attends to one interval of keys: `begin[q_idx] <= kv_idx < end[q_idx]`.

    Join several intervals by `|`. The intervals of cuDNN's Flex Attention, whose endpoints F0, F1, F2 mean the keys of
    [0, F0) and [F1, F2), are `RowRangeMask(0, F0) | RowRangeMask(F1, F2)`.

    Args:
      begin: first key of each query: an int for all, or integers [T], [B|1, T] or [B|1, H|1, T], host or traced.
      end: the key behind the last one of each query, likewise. A query whose end is not behind its begin attends to
        nothing. Numbers below 0 and past the keys mean the first key and the end.

    Raises:
      TypeError, ValueError: where one is none of these; when bound, where it has not one number per query.

    Examples:
      >>> from jax_bsk.masks import RowRangeMask
      >>> RowRangeMask([0, 0, 1], [1, 3, 3]).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 1], [0, 1, 1]]
    """

    _data_fields = ("begin", "end")
    begin: int | Array
    end: int | Array

    def __init__(self, begin: int | ArrayLike | Sequence[int], end: int | ArrayLike | Sequence[int]) -> None:
        self._set(begin=_ends(begin, "begin"), end=_ends(end, "end"))

    def _leaf_dims(self, name: str) -> str:
        return leading_dims(getattr(self, name))

    def _validate(self, q_len: int, kv_len: int) -> None:
        for name in self._data_fields:
            checked_length(getattr(self, name), "RowRangeMask", name, q_len, "q_len")

    def _key_ranges(self, grid: Grid, q: Any) -> Sequence[Interval]:
        def at(end: Any) -> Any:
            ends = int32(end[q], grid.xp) if np.ndim(end) else grid.xp.zeros(q.shape, np.int32) + int32(end, grid.xp)
            return grid.xp.clip(ends, 0, grid.kv_len)

        return [(at(self.begin), at(self.end))]

    def _repr_arguments(self) -> list[str]:
        return [short(x) if is_array(x) else repr(x) for x in (self.begin, self.end)]


def _ends(value: int | ArrayLike | Sequence[int], name: str) -> int | Array:
    if np.ndim(value) == 0 and not isinstance(value, jax.Array):  # pyright: ignore[reportArgumentType]
        return static_int(value, "RowRangeMask", name, remedy="or integers, one per query")
    return checked_integers(value, "RowRangeMask", name, "T", scalar=True)
