"""`BlockDiagonalMask`: sequences one after another, each attending to keys of its own, from their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, is_array, known
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32, static_int
from jax_bsk.masks.algebra._ranges import Interval, RangesMask, checked_integers, leading_dims
from jax_bsk.masks.algebra.patterns import _window
from jax_bsk.masks.grid import MAX_LENGTH, Grid

__all__ = ["BlockDiagonalMask"]

_ARRAYS = ("q_lengths", "kv_lengths", "kv_starts", "prefix")


class BlockDiagonalMask(RangesMask):
    """Sequences one after another, each attending to keys of its own: the block-diagonal masks of xformers.

    Sequence n has `q_lengths[n]` queries, behind those of the sequences before it, and the keys of
    [`kv_starts[n]`, `kv_starts[n] + kv_lengths[n]`). Queries behind the last sequence attend to nothing. Inside a
    sequence positions count from its start, so a causal mask or a window moves with it.

    Args:
      q_lengths: queries of each sequence, integers [N], [B|1, N] or [B|1, H|1, N], host or traced; 0 is allowed.
      kv_lengths: keys of each sequence, likewise; `q_lengths` if not given.
      kv_starts: first key of each sequence, likewise; if not given, keys lie one after another, too. Give it for keys
        with padding between them, or in any places (paged, or "gappy").
      window: (left, right) tokens besides the query's own position, either None for unbounded, or an int, as in
        `LocalMask`. (None, 0) is causal.
      align: where the query's own position is: "start" aligns the first query of a sequence with its first key, "end"
        the last query with the last key (decoding, "from bottom right").
      prefix: first keys of each sequence that all of its queries see, whatever the window: an int, or integers as
        `q_lengths`. With the window (None, 0) it is prefix-LM by document. It needs a window that is unbounded at the
        left.

    Raises:
      TypeError: where arrays hold no integers.
      ValueError: where shapes do not fit, or an argument is none of these; when bound, where sequences on the host have
        more tokens than there are.

    Examples:
      >>> from jax_bsk.masks import BlockDiagonalMask
      >>> BlockDiagonalMask([2, 1], window=(None, 0)).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
      >>> BlockDiagonalMask([1, 1], [2, 3]).bind(2, 5, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    """

    _data_fields = _ARRAYS
    q_lengths: Array
    kv_lengths: Array | None
    kv_starts: Array | None
    window: tuple[int | None, int | None]
    align: Literal["start", "end"]
    prefix: int | Array

    def __init__(
        self,
        q_lengths: ArrayLike | Sequence[int],
        kv_lengths: ArrayLike | Sequence[int] | None = None,
        *,
        kv_starts: ArrayLike | Sequence[int] | None = None,
        window: int | tuple[int | None, int | None] = (None, None),
        align: Literal["start", "end"] = "start",
        prefix: int | ArrayLike | Sequence[int] = 0,
    ) -> None:
        who = "BlockDiagonalMask"
        if align not in ("start", "end"):
            raise ValueError(f"{who}: align must be 'start' or 'end', given {align!r}")
        sides = _window(window, who)
        numbers = (
            static_int(prefix, who, "prefix", minimum=0, remedy="or integers, one per sequence")
            if np.ndim(prefix) == 0 and not isinstance(prefix, jax.Array)  # pyright: ignore[reportArgumentType]
            else checked_integers(prefix, who, "prefix", "N")
        )
        if sides[0] is not None and (is_array(numbers) or numbers):
            raise ValueError(
                f"{who}: prefix must come with a window that is unbounded at the left, given window={window!r}; write "
                "window=(None, right), or join the prefix by `|`"
            )
        arrays = {
            "q_lengths": checked_integers(q_lengths, who, "q_lengths", "N"),
            "kv_lengths": None if kv_lengths is None else checked_integers(kv_lengths, who, "kv_lengths", "N"),
            "kv_starts": None if kv_starts is None else checked_integers(kv_starts, who, "kv_starts", "N"),
        }
        sizes = {name: x.shape[-1] for name, x in {**arrays, "prefix": numbers}.items() if is_array(x)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{who}: {', '.join(sizes)} must have one number per sequence each, given {sizes}")
        self._set(**arrays, window=sides, align=align, prefix=numbers)

    def _leaf_dims(self, name: str) -> str:
        return leading_dims(getattr(self, name))

    def _validate(self, q_len: int, kv_len: int) -> None:
        for name in ("q_lengths", "kv_lengths", "kv_starts"):
            values = None if getattr(self, name) is None else known(getattr(self, name))
            if values is not None and values.size and values.min() < 0:
                raise ValueError(f"BlockDiagonalMask: {name} must be at least 0, given {int(values.min())}")
        for name, length, what in (("q_lengths", q_len, "q_len"), ("kv_lengths", kv_len, "kv_len")):
            given = known(self.q_lengths if getattr(self, name) is None else getattr(self, name))
            if given is None or (name == "kv_lengths" and self.kv_starts is not None):
                continue
            if given.size and (most := int(given.sum(-1).max())) > length:
                remedy = "; give kv_starts where the keys lie elsewhere" if name == "kv_lengths" else ""
                raise ValueError(f"BlockDiagonalMask: {name} are {most} tokens, got {what}={length}{remedy}")

    def _key_ranges(self, grid: Grid, q: Array) -> Sequence[Interval]:
        xp = grid.xp

        def numbers(value: Any) -> Any:
            return int32(xp.asarray(value), xp)

        q_lengths = numbers(self.q_lengths)
        kv_lengths = q_lengths if self.kv_lengths is None else numbers(self.kv_lengths)
        kv_starts = _starts(kv_lengths, xp) if self.kv_starts is None else numbers(self.kv_starts)
        if q_lengths.shape[0] == 0:
            nothing = xp.zeros(q.shape, np.int32)
            return [(nothing, nothing)]
        q_starts = _starts(q_lengths, xp)
        n = xp.clip(xp.searchsorted(q_starts + q_lengths, q, side="right"), 0, q_lengths.shape[0] - 1)
        own = q < (q_starts + q_lengths)[n]
        # Of each sequence, then of its queries: how far their positions are ahead of their indices.
        ahead = kv_starts - q_starts + (kv_lengths - q_lengths if self.align == "end" else 0)
        first, last = kv_starts[n], (kv_starts + kv_lengths)[n]
        left, right = self.window
        end = last
        if right is not None:
            end = q + ahead[n] + (min(right, MAX_LENGTH) + 1)
            if is_array(self.prefix) or self.prefix:
                prefix = int32(self.prefix, np) if isinstance(self.prefix, int) else numbers(self.prefix)[n]
                end = xp.maximum(end, first + prefix)
            end = xp.clip(end, first, last)
        begin = first if left is None else xp.clip(q + ahead[n] - min(left, MAX_LENGTH), first, last)
        return [(xp.clip(begin, 0, grid.kv_len), xp.where(own, xp.clip(end, 0, grid.kv_len), 0).astype(np.int32))]

    def _partial_bound(self, grid: Grid) -> int:
        # Where keys lie in the order of the queries, begins and ends never decrease (but for queries of no sequence,
        # whose end is 0). In a row of blocks such an end passes from its first value to its last one, and those of
        # the next row go on from there: it crosses at most nq + nk blocks.
        most = grid.nq * grid.nk
        return most if self.kv_starts is not None else min(2 * (grid.nq + grid.nk) + grid.nk, most)

    def _repr_arguments(self) -> list[str]:
        shown = [short(self.q_lengths)]
        if self.kv_lengths is not None:
            shown.append(short(self.kv_lengths))
        if self.kv_starts is not None:
            shown.append(f"kv_starts={short(self.kv_starts)}")
        if self.window != (None, None):
            shown.append(f"window={self.window!r}")
        if self.align != "start":
            shown.append(f"align={self.align!r}")
        if is_array(self.prefix) or self.prefix:
            shown.append(f"prefix={short(self.prefix)}")
        return shown


def _starts(lengths: Any, xp: Any) -> Any:
    return (xp.cumsum(lengths) - lengths).astype(np.int32)
