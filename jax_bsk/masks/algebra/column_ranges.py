"""`ColumnRangeMask`: for each key the intervals of queries that do not attend to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32
from jax_bsk.masks.algebra._ranges import checked_integers, checked_length, leading_dims, pieces
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import MAX_LENGTH, OWN, Grid, in_blocks, min_max

__all__ = ["ColumnRangeMask"]


class ColumnRangeMask(Mask):
    """Each key hides from two intervals of queries: FlashMask (Wang et al., arXiv 2410.01359, section 4.1).

    Query q attends to key k unless `lower_start[k] <= q < lower_end[k]` or `upper_start[k] <= q < upper_end[k]`. These
    are FlashMask's LTS, LTE, UTS and UTE. The mask is not causal by itself: write `CausalMask() &
    ColumnRangeMask(lower_start)`, where a causal FlashMask has one or two arrays. Its arrays are per key/value head;
    here they are per query head, so repeat them for the heads that share one.

    Args:
      lower_start: integers [S], [B|1, S] or [B|1, H|1, S] with H query heads, host or traced.
      lower_end: likewise; the end of the queries if not given.
      upper_start: likewise; 0 if not given.
      upper_end: likewise; if not given, the second interval is empty.

    Raises:
      TypeError, ValueError: where an array is none of these; when bound, where it has not one number per key.

    Examples:
      >>> from jax_bsk.masks import CausalMask, ColumnRangeMask
      >>> documents = CausalMask() & ColumnRangeMask([2, 2, 3])  # of two tokens and of one
      >>> documents.bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """

    _data_fields = ("lower_start", "lower_end", "upper_start", "upper_end")
    _coarse_bounds = True
    lower_start: Array
    lower_end: Array | None
    upper_start: Array | None
    upper_end: Array | None

    def __init__(
        self,
        lower_start: ArrayLike | Sequence[int],
        lower_end: ArrayLike | Sequence[int] | None = None,
        upper_start: ArrayLike | Sequence[int] | None = None,
        upper_end: ArrayLike | Sequence[int] | None = None,
    ) -> None:
        if upper_start is not None and upper_end is None:
            raise ValueError("ColumnRangeMask: upper_end must be given with upper_start, which has no end without it")
        given = zip(self._data_fields, (lower_start, lower_end, upper_start, upper_end), strict=True)
        self._set(**{n: None if x is None else checked_integers(x, "ColumnRangeMask", n, "S") for n, x in given})

    def _leaf_dims(self, name: str) -> str:
        return leading_dims(getattr(self, name))

    def _validate(self, q_len: int, kv_len: int) -> None:
        for name in self._data_fields:
            if getattr(self, name) is not None:
                checked_length(getattr(self, name), "ColumnRangeMask", name, kv_len, "kv_len")

    def _hidden(self, grid: Grid, k: Any) -> list[tuple[Any, Any]]:
        """First query of each interval that does not attend to keys `k` (indices), and the one behind its last one."""

        def at(value: Array | None, default: int) -> Any:
            if value is None:
                return grid.xp.full(k.shape, default, np.int32)
            return grid.xp.clip(int32(value[k], grid.xp), 0, grid.q_len)

        hidden = [(at(self.lower_start, 0), at(self.lower_end, grid.q_len))]
        return hidden if self.upper_end is None else [*hidden, (at(self.upper_start, 0), at(self.upper_end, 0))]

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        xp, (q_low, q_high) = grid.xp, grid.q_bounds(i)
        hidden = touched = xp.zeros((1, 1), bool)
        for first, last in self._hidden(grid, xp.arange(grid.kv_len, dtype=np.int32)):
            some = first < last
            bounds = (xp.where(some, first, MAX_LENGTH), first, last, xp.where(some, last, -1))
            (least, _), (_, latest), (earliest, _), (_, greatest) = (
                min_max(grid, x, grid.nk, grid.block_kv) for x in bounds
            )
            hidden = hidden | (latest[j] <= q_low) & (earliest[j] > q_high)
            touched = touched | (least[j] <= q_high) & (greatest[j] > q_low)
        return grid.code(hidden, ~touched, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        (first, last), *upper = self._hidden(grid, grid.clip_kv(k))
        hit = q < first if self.lower_end is None else (q < first) | (q >= last)
        for first, last in upper:
            hit = hit & (q >= last if self.upper_start is None else (q < first) | (q >= last))
        return hit

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        ends = [x for hidden in self._hidden(grid, np.arange(grid.kv_len)) for x in hidden]
        ends = np.concatenate([in_blocks(x, grid.nk, grid.block_kv) for x in ends], 1)
        return (pieces(ends, j, i, grid.block_q),)

    def _repr_arguments(self) -> list[str]:
        named = ((n, short(x)) for n, x in self._named().items() if x is not None)
        return [text if name == "lower_start" else f"{name}={text}" for name, text in named]
