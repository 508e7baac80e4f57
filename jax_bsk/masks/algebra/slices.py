"""`SliceMask`: rectangles of queries and keys, each full, causal, inverse causal, or both."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, known
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32
from jax_bsk.masks.algebra._ranges import Interval, RangesMask, of_lists
from jax_bsk.masks.grid import Grid

__all__ = ["SliceMask"]

KINDS = ("full", "causal", "inv_causal", "bi_causal")


class SliceMask(RangesMask):
    """The union of slices, rectangles of queries and keys with a kind each: the masks of MagiAttention.

    In slice n the queries [a, b) of `q_ranges[n]` attend to the keys [c, d) of `kv_ranges[n]`:

    - 0, "full": all of them;
    - 1, "causal": those with `kv_idx - d <= q_idx - b` (aligned at the bottom right);
    - 2, "inv_causal": those with `kv_idx - c >= q_idx - a` (aligned at the top left);
    - 3, "bi_causal": those that both leave.

    Args:
      q_ranges: begin and end of the queries of each slice, integers [n, 2] or [B|1, n, 2], host or traced.
      kv_ranges: begin and end of its keys, likewise.
      kinds: its kind: a name or number for all slices, or a sequence of them, or integers [n] or [B|1, n], host or
        traced; "full" if not given.

    Raises:
      TypeError: where ranges or kinds hold no integers.
      ValueError: where their shapes do not fit, or a kind is unknown; when bound, where a slice on the host reaches
        past the lengths.

    Slices may overlap. Host slices cost what their rows and blocks cost; traced ones are looked at one by one for each
    block, so their number should be some dozens.

    Examples:
      >>> from jax_bsk.masks import SliceMask
      >>> mask = SliceMask([[0, 2], [2, 4]], [[0, 2], [0, 4]], ["full", "causal"])
      >>> mask.bind(4, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    _data_fields = ("q_ranges", "kv_ranges", "kinds")
    q_ranges: Array
    kv_ranges: Array
    kinds: Array

    def __init__(
        self,
        q_ranges: ArrayLike | Sequence[Any],
        kv_ranges: ArrayLike | Sequence[Any],
        kinds: str | int | ArrayLike | Sequence[str] | Sequence[int] = "full",
    ) -> None:
        queries, keys = _ranges(q_ranges, "q_ranges"), _ranges(kv_ranges, "kv_ranges")
        if queries.shape[-2] != keys.shape[-2]:
            raise ValueError(
                f"SliceMask: q_ranges and kv_ranges must have as many slices, given shapes {queries.shape} and "
                f"{keys.shape}"
            )
        self._set(q_ranges=queries, kv_ranges=keys, kinds=_kinds(kinds, queries.shape[-2]))

    def _leaf_dims(self, name: str) -> str:
        return "b" if np.ndim(getattr(self, name)) == (2 if name == "kinds" else 3) else ""

    def _validate(self, q_len: int, kv_len: int) -> None:
        for name, length, what in (("q_ranges", q_len, "q_len"), ("kv_ranges", kv_len, "kv_len")):
            ranges = known(getattr(self, name))
            if ranges is None:
                continue
            outside = np.argwhere((ranges.min(-1) < 0) | (ranges[..., 1] > length))
            if outside.size:
                place = tuple(outside[0].tolist())
                raise ValueError(
                    f"SliceMask: {name}{list(place)} = {ranges[place].tolist()} must lie in [0, {what}={length}); cut "
                    "it, which moves the diagonal of a causal slice"
                )

    def _key_ranges(self, grid: Grid, q: Array) -> Sequence[Interval]:
        if grid.xp is not np:
            return _of_slices(grid.xp, q, *(int32(x, grid.xp) for x in (self.q_ranges, self.kv_ranges, self.kinds)))
        texts = (np.asarray(x, np.int64).tobytes() for x in (self.q_ranges, self.kv_ranges, self.kinds))
        return [(first[q], last[q]) for first, last in _lanes(*texts, grid.q_len)]

    def _repr_arguments(self) -> list[str]:
        return [short(self.q_ranges), short(self.kv_ranges), short(self.kinds)]


def _of_slices(xp: Any, q: Any, q_ranges: Any, kv_ranges: Any, kinds: Any) -> list[Interval]:
    """One interval per slice."""
    found = []
    for n in range(q_ranges.shape[0]):
        (a, b), (c, d), kind = q_ranges[n], kv_ranges[n], kinds[n]
        first = xp.where(kind >= 2, xp.maximum(c, c + (q - a)), c)
        last = xp.where(kind % 2 == 1, xp.minimum(d, d + (q - b) + 1), d)
        found.append((first, xp.where((a <= q) & (q < b), last, 0)))
    return found


@functools.lru_cache(maxsize=8)
def _lanes(q_ranges: bytes, kv_ranges: bytes, kinds: bytes, q_len: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """The slices' intervals of all queries, those of slices that share no query in one pair of arrays [q_len]."""
    queries, keys = (np.frombuffer(x, np.int64).reshape(-1, 2) for x in (q_ranges, kv_ranges))
    lanes: list[tuple[np.ndarray, np.ndarray]] = []
    free: list[int] = []  # from which query on a lane has room
    for n in np.argsort(queries[:, 0], kind="stable"):
        begin, end = queries[n]
        if begin >= end:
            continue
        lane = next((lane for lane, at in enumerate(free) if at <= begin), len(lanes))
        if lane == len(lanes):
            lanes.append((np.zeros(q_len, np.int32), np.zeros(q_len, np.int32)))
            free.append(0)
        free[lane] = end
        q = np.arange(begin, end)
        ((first, last),) = _of_slices(
            np, q, queries[n : n + 1], keys[n : n + 1], np.frombuffer(kinds, np.int64)[n : n + 1]
        )
        lanes[lane][0][begin:end], lanes[lane][1][begin:end] = first, last
    nothing = np.zeros(q_len, np.int32)
    return lanes or [(nothing, nothing)]


def _ranges(given: ArrayLike | Sequence[Any], name: str) -> Array:
    ranges = of_lists(given)
    if ranges.shape == (0,):
        ranges = ranges.reshape(0, 2)  # an empty list
    if not np.issubdtype(ranges.dtype, np.integer):
        raise TypeError(f"SliceMask: {name} must hold integers, given {ranges.dtype}{ranges.shape}; cast them")
    if ranges.ndim not in (2, 3) or ranges.shape[-1] != 2:
        raise ValueError(f"SliceMask: {name} must be [n, 2] or [B|1, n, 2], begin and end, given shape {ranges.shape}")
    return ranges


def _kinds(given: Any, n: int) -> Array:
    numbers = {kind: number for number, kind in enumerate(KINDS)}
    if isinstance(given, str | int):
        given = [given] * n
    if isinstance(given, list | tuple):
        unknown = [kind for kind in given if kind not in KINDS and kind not in range(len(KINDS))]
        if unknown:
            raise ValueError(f"SliceMask: kinds must be of {', '.join(KINDS)} or 0 to 3, given {unknown[0]!r}")
        given = np.array([numbers.get(kind, kind) for kind in given], np.int32)
    kinds = of_lists(given)
    if (values := known(kinds)) is not None and np.issubdtype(kinds.dtype, np.integer):
        outside = values[(values < 0) | (values >= len(KINDS))]
        if outside.size:
            raise ValueError(f"SliceMask: kinds must be of {', '.join(KINDS)} or 0 to 3, given {int(outside[0])}")
    if not np.issubdtype(kinds.dtype, np.integer):
        raise TypeError(f"SliceMask: kinds must be names or integers, given {kinds.dtype}{kinds.shape}")
    if kinds.ndim not in (1, 2) or kinds.shape[-1] != n:
        raise ValueError(f"SliceMask: kinds must be one per slice, [{n}] or [B|1, {n}], given shape {kinds.shape}")
    return kinds
