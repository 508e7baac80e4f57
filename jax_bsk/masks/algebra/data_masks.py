"""Masks made of data: segment ids, boolean arrays, and boolean block arrays.

Their arrays are pytree leaves and may be traced: then the block lists are computed inside `jit` (`builders._traced`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, as_array
from jax_bsk.masks._search import last_at_most
from jax_bsk.masks.algebra._intervals import Intervals
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import OWN, Grid, alike, in_blocks, min_max

__all__ = ["ArrayMask", "BlockArrayMask", "SegmentMask"]


class SegmentMask(Mask):
    """Attends inside segments (packed documents): `q_ids[q_idx] == kv_ids[kv_idx]`.

    Args:
      q_ids: integer ids [T], or [B, T] for ids per example; host or traced.
      kv_ids: integer ids [S] or [B, S]; `q_ids` if not given.
      contiguous: a promise, used when the ids are traced: along each sequence ids never decrease (give padding the
        largest id). Then only blocks at segment ends can be partial, and room for 2 * (nq + nk) bit tiles is enough;
        without the promise there must be room for one per block. Where the promise is broken, all rows give NaN
        (of a mask that is combined with other than causal masks, windows, chunks and prefixes by `&`, those that find
        no room).

    Raises:
      TypeError, ValueError: where ids are not integers, or their shapes do not fit.

    Examples:
      >>> from jax_bsk.masks import CausalMask, SegmentMask
      >>> documents = SegmentMask([0, 0, 1])
      >>> (CausalMask() & documents).bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """

    _data_fields = ("q_ids", "kv_ids")
    _coarse_bounds = True
    q_ids: Array
    kv_ids: Array | None
    contiguous: bool

    def __init__(
        self,
        q_ids: ArrayLike | Sequence[Any],
        kv_ids: ArrayLike | Sequence[Any] | None = None,
        *,
        contiguous: bool = False,
    ) -> None:
        q, k = _ids(q_ids, "q_ids"), None if kv_ids is None else _ids(kv_ids, "kv_ids")
        if k is not None:
            sizes = {x.shape[0] for x in (q, k) if x.ndim == 2} - {1}
            if len(sizes) > 1:
                raise ValueError(f"SegmentMask: q_ids {q.shape} and kv_ids {k.shape} have different batch sizes")
        self._set(q_ids=q, kv_ids=k, contiguous=bool(contiguous))

    def _leaf_dims(self, name: str) -> str:
        return "b" if np.ndim(getattr(self, name)) == 2 else ""

    def _both(self) -> tuple[Any, Any]:
        return self.q_ids, self.q_ids if self.kv_ids is None else self.kv_ids

    def _validate(self, q_len: int, kv_len: int) -> None:
        q_ids, kv_ids = self._both()
        if q_ids.shape[-1] != q_len:
            raise ValueError(f"SegmentMask: q_ids has shape {q_ids.shape}; expected a last dimension of q_len={q_len}")
        if kv_ids.shape[-1] != kv_len:
            remedy = "; give kv_ids, as there are more or fewer keys than queries" if self.kv_ids is None else ""
            raise ValueError(
                f"SegmentMask: kv_ids has shape {kv_ids.shape}; expected a last dimension of kv_len={kv_len}{remedy}"
            )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        q_ids, kv_ids = self._both()
        q_min, q_max = min_max(grid, q_ids, grid.nq, grid.block_q)
        same = kv_ids is q_ids and grid.block_q == grid.block_kv
        k_min, k_max = (q_min, q_max) if same else min_max(grid, kv_ids, grid.nk, grid.block_kv)
        q_min, q_max, k_min, k_max = q_min[i], q_max[i], k_min[j], k_max[j]
        # One id in both blocks: full. Ranges that do not meet: empty. (Ranges that meet may still share no id.)
        full = (q_min == k_max) & (q_max == k_min)
        return grid.code((q_max < k_min) | (q_min > k_max), full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        q_ids, kv_ids = self._both()
        return q_ids[grid.clip_q(q)] == kv_ids[grid.clip_kv(k)]

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        q_ids, kv_ids = self._both()
        if not self.contiguous or example is not None or np.issubdtype(q_ids.dtype, np.unsignedinteger):
            return None
        if kv_ids.dtype != q_ids.dtype or 0 in (grid.q_len, grid.kv_len):
            return None
        xp = grid.xp
        q_ids, kv_ids = xp.asarray(q_ids), xp.asarray(kv_ids)
        if q_ids.dtype.itemsize < 4:
            q_ids, kv_ids = q_ids.astype(np.int32), kv_ids.astype(np.int32)
        ids = q_ids[grid.clip_q(positions)]
        first, end = (last_at_most(kv_ids, x, xp) + np.int32(1) for x in (ids - np.ones((), ids.dtype), ids))
        first = xp.where(ids == np.iinfo(ids.dtype).min, np.int32(0), first)  # the least number has none before it
        kept = (kv_ids[1:] >= kv_ids[:-1]).all()
        if self.kv_ids is not None:
            kept = kept & (q_ids[1:] >= q_ids[:-1]).all()
        return Intervals(first, end, own=self.kv_ids is None, valid=kept)

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        # A block of keys of one document has the same elements beside a block of queries as the document's next one.
        q_ids, kv_ids = self._both()
        q_kinds = alike(in_blocks(q_ids, grid.nq, grid.block_q))
        same = kv_ids is q_ids and grid.block_q == grid.block_kv
        k_kinds = q_kinds if same else alike(in_blocks(kv_ids, grid.nk, grid.block_kv))
        return q_kinds[i], k_kinds[j]

    def _partial_bound(self, grid: Grid) -> int:
        # Non-decreasing ids: each block covers a range of ids, and ranges of successive blocks meet at ends only. A
        # block with one id s meets at most two blocks of the other sequence that hold more than s (one ends, one begins
        # with s, or a single one has s inside): 2 for each block of one id. Pairs of blocks of more ids form a
        # staircase, one step a block, and touch at a common end once more: no more than 2 for each of those blocks.
        return min(2 * (grid.nq + grid.nk), grid.nq * grid.nk) if self.contiguous else grid.nq * grid.nk


def _ids(given: ArrayLike | Sequence[Any], name: str) -> Array:
    ids = as_array(given)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"SegmentMask: {name} must hold integers, given {ids.dtype}{ids.shape}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"SegmentMask: {name} must be [tokens] or [batch, tokens], given shape {ids.shape}")
    return ids


class ArrayMask(Mask):
    """A boolean array as a mask. Quadratic in memory where it comes from; the block lists made of it are not.

    Args:
      array: bool [T, S], [H|1, T, S] or [B|1, H|1, T, S] with H query heads; host or traced.

    Raises:
      TypeError: where it is not boolean.
      ValueError: where it is not 2-D to 4-D.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk.masks import ArrayMask
      >>> ArrayMask(np.eye(64, dtype=bool)).bind(64, block_size=32).density
      0.5
    """

    _data_fields = ("array",)
    array: Array

    def __init__(self, array: ArrayLike | Sequence[Any]) -> None:
        self._set(array=_booleans(array, "ArrayMask", "array", "[T, S], [H|1, T, S] or [B|1, H|1, T, S]"))

    def _leaf_dims(self, name: str) -> str:
        return "bh"[4 - np.ndim(self.array) :]

    def _validate(self, q_len: int, kv_len: int) -> None:
        if self.array.shape[-2:] != (q_len, kv_len):
            raise ValueError(
                f"ArrayMask: array has shape {self.array.shape}; expected last dimensions (q_len, kv_len) = "
                f"({q_len}, {kv_len})"
            )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        if grid.xp is not np:
            some, every = self._reduce(grid)
            if (i.shape, j.shape) != ((grid.nq, 1), (1, grid.nk)):  # not all blocks
                some, every = some[i, j], every[i, j]
        else:
            rows, which = np.unique(i, return_inverse=True)
            some, every = (x[which.reshape(i.shape), j] for x in self._reduce_rows(grid, rows))
        return grid.code(~some, every, OWN)

    def _reduce(self, grid: Grid) -> tuple[Any, Any]:
        xp = grid.xp
        pad = ((0, grid.nq * grid.block_q - grid.q_len), (0, grid.nk * grid.block_kv - grid.kv_len))
        blocks = (grid.nq, grid.block_q, grid.nk, grid.block_kv)
        some = xp.pad(self.array, pad, constant_values=False).reshape(blocks).any((1, 3))
        every = xp.pad(self.array, pad, constant_values=True).reshape(blocks).all((1, 3))
        return some, every

    def _reduce_rows(self, grid: Grid, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_reduce` on the host for the rows `i`, a block row at a time: it needs no copy of the array."""
        starts = np.arange(0, grid.kv_len, grid.block_kv)
        some, every = np.empty((i.size, grid.nk), bool), np.empty((i.size, grid.nk), bool)
        for n, row in enumerate(i):
            rows = self.array[row * grid.block_q : (row + 1) * grid.block_q]
            # Down the queries first (whole lines, fast), then along the keys of each block.
            some[n] = np.logical_or.reduceat(np.logical_or.reduce(rows, 0), starts)
            every[n] = np.logical_and.reduceat(np.logical_and.reduce(rows, 0), starts)
        return some, every

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return self.array[grid.clip_q(q), grid.clip_kv(k)]


def _booleans(given: ArrayLike | Sequence[Any], who: str, name: str, shapes: str) -> Array:
    array = as_array(given)
    if array.dtype != np.bool_:
        raise TypeError(
            f"{who}: {name} must be boolean with True for attended, given {array.dtype}{array.shape}; an additive mask "
            "of 0 and -inf becomes one by `array == 0`"
        )
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"{who}: {name} must be {shapes}, given shape {array.shape}")
    return array


class BlockArrayMask(Mask):
    """A boolean array over blocks: the pair of blocks (i, j) is attended as a whole where `blocks[..., i, j]`.

    Args:
      blocks: bool [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk]; host or traced.
      block_size: tokens of these blocks, an int or a (query, key) pair. The block size of `bind` must be the same.

    Raises:
      TypeError: where blocks are not boolean.
      ValueError: where they are not 2-D to 4-D.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk.masks import BlockArrayMask
      >>> BlockArrayMask(np.eye(2, dtype=bool), 32).bind(64, block_size=32).density
      0.5
    """

    _data_fields = ("blocks",)
    blocks: Array
    block_size: tuple[int, int]

    def __init__(self, blocks: ArrayLike | Sequence[Any], block_size: int | tuple[int, int] = 128) -> None:
        size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
        shapes = "[nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk]"
        self._set(blocks=_booleans(blocks, "BlockArrayMask", "blocks", shapes), block_size=size)

    def _leaf_dims(self, name: str) -> str:
        return "bh"[4 - np.ndim(self.blocks) :]

    def _validate(self, q_len: int, kv_len: int) -> None:
        expected = -(-q_len // self.block_size[0]), -(-kv_len // self.block_size[1])
        if self.blocks.shape[-2:] != expected:
            raise ValueError(
                f"BlockArrayMask: blocks has shape {self.blocks.shape}; expected last dimensions {expected}: the "
                f"blocks of {self.block_size} tokens in ({q_len}, {kv_len}) tokens"
            )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        if (grid.block_q, grid.block_kv) != self.block_size:
            raise ValueError(
                f"BlockArrayMask: its block_size is {self.block_size}, the block size asked for is "
                f"({grid.block_q}, {grid.block_kv}); they must be the same"
            )
        blocks = self.blocks[i, j]
        return grid.code(~blocks, blocks, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return self.blocks[grid.clip_q(q) // self.block_size[0], grid.clip_kv(k) // self.block_size[1]]

    def _partial_bound(self, grid: Grid) -> int:
        return 0
