"""Masks known in closed form: they hold numbers, no arrays (but offsets and prefixes), and cost nothing to carry.

Each class gives bounds (`_classify`) and elements (`_evaluate`); see `mask.Mask`. `delta` is query minus key position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_bsk.core.arrays import Array, is_array, is_traced
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra import _places
from jax_bsk.masks.algebra._intervals import Intervals, number, reaching
from jax_bsk.masks.algebra._offsets import (
    check_offset_length,
    checked_offset,
    crossed_blocks,
    int32,
    offset_dims,
    offset_per_query,
    position_bounds,
    position_code,
    positions,
    static_int,
    window_blocks,
)
from jax_bsk.masks.algebra._places import LEAST, PlaceIntervals, place_intervals
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import FULL, MAX_LENGTH, OWN, SHIFT, Grid, alike, code_or, in_blocks

__all__ = [
    "BigBirdMask",
    "CausalMask",
    "ChunkedMask",
    "DilatedMask",
    "FullMask",
    "GlobalMask",
    "LocalMask",
    "PrefixLMMask",
]


def _clamp(value: int) -> int:
    return max(-MAX_LENGTH, min(MAX_LENGTH, value))


def _delta_bounds(grid: Grid, i: Array, j: Array, offset: int | Array = 0) -> tuple[Any, Any]:
    """Least and greatest position of a query less that of a key in block (i, j), inside the lengths."""
    q_low, q_high = position_bounds(grid, offset, i)
    k_low, k_high = grid.kv_bounds(j)
    return q_low - k_high, q_high - k_low


class FullMask(Mask):
    """Every query attends to every key.

    Examples:
      >>> from jax_bsk.masks import FullMask
      >>> FullMask().bind(256).density
      1.0
    """

    _coarse_bounds = True
    _shift_invariant = True

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        return grid.xp.full((1, 1), FULL, np.int8)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return grid.xp.ones((1,) * np.ndim(q), bool)

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        return Intervals(*reaching(grid, positions, None, None), own=True)


class _OffsetMask(Mask):
    """A mask of the positions of queries, which are their indices plus an offset."""

    _coarse_bounds = True
    _data_fields = ("offset",)

    offset: int | Array

    def _leaf_dims(self, name: str) -> str:
        return offset_dims(getattr(self, name))

    def _validate(self, q_len: int, kv_len: int) -> None:
        check_offset_length(self.offset, type(self).__name__, q_len)

    def _both_positions(self, grid: Grid) -> tuple[Any, Any]:
        """Positions of all queries and of all keys."""
        xp = grid.xp
        queries = positions(grid, self.offset, xp.arange(grid.q_len, dtype=np.int32))
        return queries, xp.arange(grid.kv_len, dtype=np.int32)

    def _ahead(self, grid: Grid, positions: Array, example: Array | None) -> Any:
        """Positions with the offset added; None where each query has an offset of its own."""
        ahead = number(self.offset, example, grid)
        return None if ahead is None else positions + ahead

    def _is_zero(self) -> bool:
        return isinstance(self.offset, int) and self.offset == 0

    def _offset_argument(self) -> list[str]:
        return [] if self._is_zero() else [f"offset={short(self.offset)}"]


class CausalMask(_OffsetMask):
    """Attends where `q_idx + offset >= kv_idx`: aligned at the top left, as in `jax.nn.dot_product_attention`.

    Args:
      offset: positions the queries are ahead of the keys; `kv_len - q_len` aligns at the bottom right (decoding). An
        int, or an integer array, host or traced: [] for all queries, [B] for each example (a cache that each example
        has filled up to a length of its own), or [B|1, T] for each query by itself (its position less its index).

    Raises:
      TypeError, ValueError: where the offset is none of these.

    Examples:
      >>> from jax_bsk.masks import CausalMask
      >>> CausalMask(offset=1).bind(2, 3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, offset: int | Array = 0) -> None:
        self._set(offset=checked_offset(offset, "CausalMask"))

    @property
    def _shift_invariant(self) -> bool:
        return np.ndim(self.offset) == 0

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        low, high = _delta_bounds(grid, i, j, self.offset)
        return grid.code(high < 0, low >= 0, position_code(self.offset, SHIFT, OWN))

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return positions(grid, self.offset, q) >= k

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        queries, keys = self._both_positions(grid)
        return place_intervals(grid, [LEAST], [queries], [keys])

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        ahead = self._ahead(grid, positions, example)
        return None if ahead is None else Intervals(*reaching(grid, ahead, None, 0), own=self._is_zero())

    def _partial_bound(self, grid: Grid) -> int:
        return crossed_blocks(grid, self.offset)

    def _repr_arguments(self) -> list[str]:
        return self._offset_argument()


class LocalMask(_OffsetMask):
    """Sliding window: attends where `q_idx + offset - left <= kv_idx <= q_idx + offset + right`.

    Args:
      window: (left, right) tokens besides the query's own position, either None for unbounded; an int w means (w, w).
        As `local_window_size` of `jax.nn.dot_product_attention`.
      offset: positions the queries are ahead of the keys, as in `CausalMask`.

    Raises:
      TypeError, ValueError: where window or offset is none of these.

    Examples:
      >>> from jax_bsk.masks import LocalMask
      >>> LocalMask((1, 0)).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    window: tuple[int | None, int | None]

    def __init__(
        self,
        window: int | tuple[int | None, int | None],
        *more: Any,
        offset: int | Array = 0,
    ) -> None:
        if more:
            raise TypeError(
                f"LocalMask: window must be one argument, an int or a (left, right) pair, got {1 + len(more)} "
                f"arguments; write LocalMask(({window!r}, {more[0]!r}))"
            )
        self._set(window=_window(window, "LocalMask"), offset=checked_offset(offset, "LocalMask"))

    @property
    def _shift_invariant(self) -> bool:
        return np.ndim(self.offset) == 0

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        low, high = _delta_bounds(grid, i, j, self.offset)
        least, greatest = _limits(self.window)
        partial = position_code(self.offset, SHIFT, OWN)
        return grid.code((high < least) | (low > greatest), (low >= least) & (high <= greatest), partial)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return _in_window(self.window, positions(grid, self.offset, q), k)

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        queries, keys = self._both_positions(grid)
        low, high = _places.window(grid, queries, self.window)
        return place_intervals(grid, [low], [high], [keys])

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        ahead = self._ahead(grid, positions, example)
        return None if ahead is None else Intervals(*reaching(grid, ahead, *self.window), own=self._is_zero())

    def _partial_bound(self, grid: Grid) -> int:
        sides = sum(side is not None for side in self.window)
        return min(sides * crossed_blocks(grid, self.offset), grid.nq * grid.nk)

    def _visited_bound(self, grid: Grid) -> int:
        left, right = self.window
        if left is None or right is None:
            return super()._visited_bound(grid)
        return window_blocks(grid, self.offset, left + right)

    def _repr_arguments(self) -> list[str]:
        return [repr(self.window), *self._offset_argument()]


def _window(window: Any, who: str) -> tuple[int | None, int | None]:
    if not isinstance(window, tuple | list):
        remedy = _TRACED_WINDOW if is_traced(window) else "or a (left, right) pair"
        size = static_int(window, who, "window", minimum=0, remedy=remedy)
        return size, size
    if len(window) != 2:
        raise ValueError(f"{who}: window must be a (left, right) pair or an int, given {window!r}")
    left, right = (
        None
        if w is None
        else static_int(w, who, f"window[{n}]", minimum=0, remedy=_TRACED_WINDOW if is_traced(w) else "")
        for n, w in enumerate(window)
    )
    return left, right


_TRACED_WINDOW = "for a traced window write CausalMask(offset=right) & ~CausalMask(offset=-left - 1)"


def _limits(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """Least and greatest allowed query - key."""
    left, right = window
    least, greatest = -(2**31), 2**31 - 1  # what int32 holds: an offset may bring positions beyond any length
    return (least if right is None else max(least, -right)), (greatest if left is None else min(greatest, left))


def _in_window(window: tuple[int | None, int | None], q: Array, k: Array) -> Array:
    least, greatest = _limits(window)
    delta = q - k
    if window[0] is None:
        return delta >= least
    if window[1] is None:
        return delta <= greatest
    return (delta >= least) & (delta <= greatest)


class ChunkedMask(_OffsetMask):
    """Attends inside chunks of equal size: `(q_idx + offset) // chunk == kv_idx // chunk`.

    Args:
      chunk: tokens of a chunk; the last chunk may be shorter.
      offset: positions the queries are ahead of the keys, as in `CausalMask`.

    Raises:
      TypeError, ValueError: where chunk or offset is none of these.

    Examples:
      >>> from jax_bsk.masks import ChunkedMask
      >>> ChunkedMask(2).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    chunk: int

    def __init__(self, chunk: int, *, offset: int | Array = 0) -> None:
        self._set(
            chunk=static_int(chunk, "ChunkedMask", "chunk", minimum=1), offset=checked_offset(offset, "ChunkedMask")
        )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        chunk = _clamp(self.chunk)
        q_low, q_high = (q // chunk for q in position_bounds(grid, self.offset, i))
        k_low, k_high = (k // chunk for k in grid.kv_bounds(j))
        full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return grid.code((q_high < k_low) | (q_low > k_high), full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        chunk = _clamp(self.chunk)
        return positions(grid, self.offset, q) // chunk == k // chunk

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        queries, keys = (x // _clamp(self.chunk) for x in self._both_positions(grid))
        return place_intervals(grid, [queries], [queries], [keys])

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        ahead = self._ahead(grid, positions, example)
        if ahead is None:
            return None
        first = ahead // np.int32(_clamp(self.chunk)) * np.int32(_clamp(self.chunk))
        end = grid.xp.minimum(first, MAX_LENGTH - 1) + np.int32(_clamp(self.chunk))  # does not wrap
        return Intervals(first, end, own=self._is_zero())

    def _partial_bound(self, grid: Grid) -> int:
        # Chunks are segments whose ids never decrease: see `SegmentMask._partial_bound`.
        visited = self._visited_bound(grid)
        return visited if offset_per_query(self.offset) else min(2 * (grid.nq + grid.nk), visited)

    def _visited_bound(self, grid: Grid) -> int:
        return window_blocks(grid, self.offset, 2 * (_clamp(self.chunk) - 1))

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...] | None:
        if np.ndim(self.offset):
            return None
        (q, q_rest), (k, k_rest) = (
            np.divmod(n.astype(np.int64) * block + offset, _clamp(self.chunk))
            for n, block, offset in ((i, grid.block_q, int(int32(self.offset, np))), (j, grid.block_kv, 0))
        )
        return q - k, q_rest, k_rest

    def _repr_arguments(self) -> list[str]:
        return [repr(self.chunk), *self._offset_argument()]


class PrefixLMMask(_OffsetMask):
    """Causal, but the first `prefix` keys are seen by every query: `kv_idx < prefix or q_idx + offset >= kv_idx`.

    The prefix-LM of T5 (Raffel et al., arXiv 1910.10683, figure 4).

    Args:
      prefix: tokens of the prefix; an int, or an integer array, host or traced: [] for all examples, [B] for each.
      offset: positions the queries are ahead of the keys, as in `CausalMask`.

    Raises:
      TypeError, ValueError: where prefix or offset is none of these.

    Examples:
      >>> from jax_bsk.masks import PrefixLMMask
      >>> PrefixLMMask(2).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    _data_fields = ("prefix", "offset")
    prefix: int | Array

    def __init__(self, prefix: int | Array, *, offset: int | Array = 0) -> None:
        if isinstance(prefix, list | tuple):
            prefix = np.asarray(prefix)
        if isinstance(prefix, np.ndarray | jax.Array):
            if prefix.ndim > 1 or not np.issubdtype(prefix.dtype, np.integer):
                raise ValueError(
                    f"PrefixLMMask: prefix must be an int or an integer array [B], given {prefix.dtype}{prefix.shape}"
                )
        else:
            prefix = static_int(prefix, "PrefixLMMask", "prefix", minimum=0)
        self._set(prefix=prefix, offset=checked_offset(offset, "PrefixLMMask"))

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        k_low, k_high = grid.kv_bounds(j)
        prefix = int32(self.prefix, grid.xp)
        seen = grid.code(k_low >= prefix, k_high < prefix, OWN)
        low, high = _delta_bounds(grid, i, j, self.offset)
        causal = grid.code(high < 0, low >= 0, position_code(self.offset, SHIFT, OWN))
        return code_or(seen, causal, grid.xp)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return (k < int32(self.prefix, grid.xp)) | (positions(grid, self.offset, q) >= k)

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        queries, keys = self._both_positions(grid)
        return place_intervals(grid, [LEAST], [grid.xp.maximum(queries, int32(self.prefix, grid.xp) - 1)], [keys])

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        ahead, prefix = self._ahead(grid, positions, example), number(self.prefix, example, grid)
        if ahead is None or prefix is None:
            return None
        first, end = reaching(grid, ahead, None, 0)
        return Intervals(first, grid.xp.maximum(end, prefix), own=self._is_zero())

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...] | None:
        if np.ndim(self.offset):
            return None
        first_q = i.astype(np.int64) * grid.block_q + int(int32(self.offset, np))
        first_k = j.astype(np.int64) * grid.block_kv
        # From a distance of a block on, all of the queries are before all of the keys, or none is.
        distance = np.clip(first_q - first_k, -grid.block_q, grid.block_kv)
        return np.clip(int(int32(self.prefix, np)) - first_k, 0, grid.block_kv), distance

    def _partial_bound(self, grid: Grid) -> int:
        # One column of blocks holds the prefix's end.
        return min(grid.nq + crossed_blocks(grid, self.offset), grid.nq * grid.nk)

    def _repr_arguments(self) -> list[str]:
        named = is_array(self.prefix)
        return [f"prefix={short(self.prefix)}" if named else repr(self.prefix), *self._offset_argument()]


class GlobalMask(Mask):
    """Attends where the query or the key is a global token: those see all, and all see them.

    `q_idx in tokens or kv_idx in tokens`. Positions past a length select nothing. Global attention of Longformer
    (Beltagy et al., arXiv 2004.05150, section 3.1): `LocalMask(w) | GlobalMask([0])`; symmetric, so with `CausalMask()`
    use `&` over the whole.

    Args:
      tokens: positions (a sequence of ints, a set, or a host array), or an int n for the first n tokens.

    Raises:
      TypeError: where tokens are traced or no integers.
      ValueError: where they are no sequence of positions, or one is negative.

    Examples:
      >>> from jax_bsk.masks import GlobalMask
      >>> GlobalMask([1]).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """

    _coarse_bounds = True

    tokens: int | tuple[int, ...]

    def __init__(self, tokens: int | Sequence[int] | set[int] | frozenset[int] | np.ndarray) -> None:
        if is_traced(tokens):
            raise TypeError("GlobalMask: tokens cannot be traced; use FunctionMask(lambda q, k: flags[q] | flags[k])")
        if not isinstance(tokens, set | frozenset | range) and np.ndim(tokens) == 0:
            tokens = static_int(tokens, "GlobalMask", "tokens", minimum=0, remedy="or a sequence of positions")
        else:
            positions = np.asarray(sorted(tokens) if isinstance(tokens, set | frozenset) else tokens)
            if positions.ndim != 1 or not (positions.size == 0 or np.issubdtype(positions.dtype, np.integer)):
                raise ValueError(
                    f"GlobalMask: tokens must be an int or a 1-D sequence of positions, given {positions.dtype}"
                    f"{positions.shape}; for a boolean array of flags pass np.flatnonzero(flags)"
                )
            if positions.size and positions.min() < 0:
                raise ValueError(f"GlobalMask: tokens has the negative position {positions.min()}")
            tokens = tuple(int(p) for p in np.unique(positions))
        self._set(tokens=tokens)

    def _flags(self, length: int) -> np.ndarray:
        return _global_flags(self.tokens, length)

    def _key_blocks(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Booleans [nk]: any of the block's keys is global; all of them are."""
        return _any_all(self._flags(grid.kv_len), grid.nk, grid.block_kv)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        q_some, q_all = _any_all(self._flags(grid.q_len), grid.nq, grid.block_q)
        k_some, k_all = self._key_blocks(grid)
        xp = grid.xp
        full = xp.asarray(q_all)[i] | xp.asarray(k_all)[j]
        return grid.code(~(xp.asarray(q_some)[i] | xp.asarray(k_some)[j]), full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        q_flags = grid.xp.asarray(self._flags(grid.q_len))
        k_flags = grid.xp.asarray(self._flags(grid.kv_len))
        # Positions before the first (of queries in a packed sequence) select nothing, as those past a length.
        return (q_flags[grid.clip_q(q)] & (q >= 0)) | k_flags[grid.clip_kv(k)]

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        q_kinds = alike(in_blocks(self._flags(grid.q_len), grid.nq, grid.block_q))
        k_kinds = alike(in_blocks(self._flags(grid.kv_len), grid.nk, grid.block_kv))
        return q_kinds[i], k_kinds[j]

    def _repr_arguments(self) -> list[str]:
        if isinstance(self.tokens, int):
            return [repr(self.tokens)]
        shown = ", ".join(map(str, self.tokens[:6])) + (", ..." if len(self.tokens) > 6 else "")
        return [f"[{shown}]"]


@functools.lru_cache(maxsize=16)
def _global_flags(tokens: int | tuple[int, ...], length: int) -> np.ndarray:
    """Boolean [length]: which positions are global."""
    if isinstance(tokens, int):
        return np.arange(length) < tokens
    flags = np.zeros(length, bool)
    positions = np.asarray(tokens, np.int64)
    flags[positions[positions < length]] = True
    return flags


def _any_all(flags: np.ndarray, blocks: int, block: int) -> tuple[Any, Any]:
    """Booleans [blocks]: any of the block's flags is set; all of them are."""
    padded = np.full(blocks * block, False)
    padded[: flags.size] = flags
    some = padded.reshape(blocks, block).any(1)
    padded[flags.size :] = True
    return some, padded.reshape(blocks, block).all(1)


class DilatedMask(Mask):
    """Attends to every `dilation`-th position: `(q_idx - kv_idx) % dilation == 0`, inside `window` if given.

    Dilated windows of Longformer (arXiv 2004.05150, section 3.1), there with a window counted in attended positions;
    here the window counts tokens, as in `LocalMask`: `DilatedMask(d, w)` is `DilatedMask(d) & LocalMask(w)`.

    Args:
      dilation: distance of neighbouring attended keys; 1 attends to all.
      window: int w for (w, w) or a (left, right) pair of tokens, None for unbounded.

    Raises:
      TypeError, ValueError: where an argument is none of these.

    Examples:
      >>> from jax_bsk.masks import DilatedMask
      >>> DilatedMask(2).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    _coarse_bounds = True
    _shift_invariant = True

    dilation: int
    window: tuple[int | None, int | None]

    def __init__(self, dilation: int, window: int | tuple[int | None, int | None] | None = None) -> None:
        self._set(
            dilation=static_int(dilation, "DilatedMask", "dilation", minimum=1),
            window=(None, None) if window is None else _window(window, "DilatedMask"),
        )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        low, high = _delta_bounds(grid, i, j)
        least, greatest = _limits(self.window)
        dilation = _clamp(self.dilation)
        full = (low >= least) & (high <= greatest) & (dilation == 1)
        # Empty where no multiple of the dilation lies in the part of [low, high] that is inside the window.
        top = grid.xp.minimum(high, greatest)
        empty = top // dilation * dilation < grid.xp.maximum(low, least)
        return grid.code(empty, full, SHIFT)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        hit = (q - k) % _clamp(self.dilation) == 0
        return hit if self.window == (None, None) else hit & _in_window(self.window, q, k)

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        queries, keys = (grid.xp.arange(length, dtype=np.int32) for length in (grid.q_len, grid.kv_len))
        low, high = _places.window(grid, queries, self.window)
        rest, of_keys = (x % _clamp(self.dilation) for x in (queries, keys))
        return place_intervals(grid, [low, rest], [high, rest], [keys, of_keys])

    def _repr_arguments(self) -> list[str]:
        return [repr(self.dilation)] + ([] if self.window == (None, None) else [f"window={self.window!r}"])


class BigBirdMask(Mask):
    """Window, global and random blocks (Zaheer et al., BigBird, arXiv 2007.14062, section 2 and appendix D).

    Block granular: tokens are grouped in blocks of `block` tokens and a pair of blocks is attended as a whole when

    - the blocks are at most `window // 2` apart (a band of `window` blocks), or
    - either is among the first `global_blocks`, or
    - the key block is one of `random_blocks` drawn for the query block among those not attended anyway.

    The draw depends on `seed`, the block numbers and the lengths only: the same on every machine and version.

    Args:
      block: tokens of a block; independent of the kernels' block size (equal or a multiple is the fastest).
      window: width of the band in blocks, odd.
      global_blocks: first blocks that see all and are seen by all.
      random_blocks: number of random key blocks per query block.
      seed: seed of the draw; give each head another one with `MultiHeadMask`.

    Raises:
      TypeError: where an argument is no int.
      ValueError: where one is too small, or the window is even.

    Examples:
      >>> from jax_bsk.masks import BigBirdMask
      >>> BigBirdMask(128).bind(2048).density
      0.46484375
    """

    _coarse_bounds = True

    block: int
    window: int
    global_blocks: int
    random_blocks: int
    seed: int

    def __init__(
        self, block: int = 128, *, window: int = 3, global_blocks: int = 1, random_blocks: int = 3, seed: int = 0
    ) -> None:
        window = static_int(window, "BigBirdMask", "window", minimum=1)
        if window % 2 == 0:
            raise ValueError(f"BigBirdMask: window must be odd (blocks around the query's own), given {window}")
        self._set(
            block=static_int(block, "BigBirdMask", "block", minimum=1),
            window=window,
            global_blocks=static_int(global_blocks, "BigBirdMask", "global_blocks", minimum=0),
            random_blocks=static_int(random_blocks, "BigBirdMask", "random_blocks", minimum=0),
            seed=static_int(seed, "BigBirdMask", "seed", minimum=0),
        )

    def _tables(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = -(-grid.q_len // self.block), -(-grid.kv_len // self.block)
        return _big_bird_tables(rows, columns, self.window, self.global_blocks, self.random_blocks, self.seed)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        # Of the coarse blocks under a grid block, counted with 2-D prefix sums: none, all, or some attended.
        sums = grid.xp.asarray(self._tables(grid)[1])
        q_low, q_high = (q // self.block for q in grid.q_bounds(i))
        k_low, k_high = (k // self.block for k in grid.kv_bounds(j))
        attended = sums[q_high + 1, k_high + 1] - sums[q_low, k_high + 1] - sums[q_high + 1, k_low] + sums[q_low, k_low]
        return grid.code(attended == 0, attended == (q_high - q_low + 1) * (k_high - k_low + 1), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return grid.xp.asarray(self._tables(grid)[0])[grid.clip_q(q) // self.block, grid.clip_kv(k) // self.block]


@functools.lru_cache(maxsize=16)
def _big_bird_tables(
    rows: int, columns: int, window: int, global_blocks: int, random_blocks: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boolean [rows, columns]: which key block a query block attends to; its prefix sums, one longer each way."""
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    table = (np.abs(row - column) <= window // 2) | (row < global_blocks) | (column < global_blocks)
    take = min(random_blocks, columns)
    if take:
        # Every pair has a hash; a row takes its smallest ones. Columns attended anyway rank last.
        rank = _mix(_mix(_mix(np.uint64(seed) + np.uint64(1)) ^ row.astype(np.uint64)) ^ column.astype(np.uint64))
        rank[table] = np.uint64(2**64 - 1)
        drawn = np.argsort(rank, axis=1, kind="stable")[:, :take]
        np.put_along_axis(table, drawn, True, axis=1)
    sums = np.zeros((rows + 1, columns + 1), np.int32)
    np.cumsum(np.cumsum(table, 0, dtype=np.int32), 1, out=sums[1:, 1:])
    return table, sums


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele et al., 2014): a bijection of uint64 that scrambles every bit."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**64 - 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
