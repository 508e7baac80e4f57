"""`at_positions`: a mask of whole sequences for queries that stand further on, as in decoding with a cache.

A lazy mask says which query of a sequence attends to which key. In a step of decoding the keys are those of the whole
cache, and the queries are a few tokens at its end. Masks that hold an offset add to it, masks of data give the rows of
these tokens, and any other mask is asked about the blocks of the whole sequence that hold them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import Array, is_array, is_traced, of_rank
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32, offset_dims, position_bounds, positions
from jax_bsk.masks.algebra.data_masks import ArrayMask, SegmentMask
from jax_bsk.masks.algebra.function_mask import FunctionMask
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.algebra.patterns import FullMask, GlobalMask, _OffsetMask
from jax_bsk.masks.grid import EMPTY, FULL, OWN, Grid, min_max

__all__ = ["at_positions"]


def at_positions(mask: Mask, offset: int | Array, q_len: int, kv_len: int) -> Mask:
    """The mask of `q_len` queries, of which query t stands at position `offset + t` of a sequence of `kv_len` tokens.

    Args:
      mask: mask of whole sequences, of `kv_len` queries and keys. Segment ids and arrays that have `q_len` queries
        are taken as those of these queries.
      offset: position of the first query: an int, or an integer array, host or traced, [] or [B].
      q_len, kv_len: numbers of queries and keys.

    Raises:
      ValueError: a part of the mask has an offset for each query.

    Examples:
      >>> from jax_bsk.masks import CausalMask, GlobalMask, LocalMask
      >>> window = CausalMask() & (LocalMask((1, 0)) | GlobalMask(1))
      >>> at_positions(window, 3, 2, 6).bind(2, 6, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]]
    """
    if isinstance(mask, FullMask):
        return mask
    if isinstance(mask, _OffsetMask):
        return _ahead(mask, offset)
    if isinstance(mask, GlobalMask):
        return _GlobalAhead(mask.tokens, offset)
    if isinstance(mask, SegmentMask):
        return mask if mask.q_ids.shape[-1] == q_len else _segment_rows(mask, offset, q_len)
    if isinstance(mask, ArrayMask):
        return mask if mask.array.shape[-2] == q_len else ArrayMask(_rows(mask.array, offset, q_len))
    if isinstance(mask, FunctionMask) and mask.within is not None:
        within, function = mask.parts()
        return at_positions(within, offset, q_len, kv_len) & _Shifted(function, offset)
    if mask._children() and mask._joins:
        return mask._map_fields(lambda child: at_positions(child, offset, q_len, kv_len), lambda _, array: array)
    return _Shifted(mask, offset)


def _ahead(mask: _OffsetMask, offset: int | Array) -> Mask:
    own = mask.offset
    if np.ndim(own) == 2:
        raise ValueError(
            f"{mask!r} has an offset for each query, which says where the queries stand already; give the mask of the "
            "whole sequence, without an offset"
        )
    both = own + offset if isinstance(own, int) and isinstance(offset, int) else _sum(own, offset)
    moved = object.__new__(type(mask))
    moved._set(**{**mask._named(), "offset": both})
    return moved


def _sum(a: int | Array, b: int | Array) -> Any:
    xp = _module(a, b)
    return int32(a, xp) + int32(b, xp)  # either is clipped to 2^30: the sum does not wrap


def _module(*arrays: Any) -> ModuleType:
    return jnp if any(isinstance(x, jax.Array) or is_traced(x) for x in arrays) else np


def _segment_rows(mask: SegmentMask, offset: int | Array, q_len: int) -> SegmentMask:
    ids, kv_ids = mask.q_ids, mask.q_ids if mask.kv_ids is None else mask.kv_ids
    xp = _module(ids, offset)
    starts = xp.asarray(int32(offset, xp))[..., None]
    places = xp.clip(starts + of_rank(np.arange(q_len, dtype=np.int32), starts.ndim), 0, ids.shape[-1] - 1)
    if ids.ndim == 1 or places.ndim == 1:
        rows = xp.asarray(ids)[..., places]
    else:
        batch = max(ids.shape[0], places.shape[0])
        rows = xp.take_along_axis(
            xp.broadcast_to(ids, (batch, ids.shape[1])), xp.broadcast_to(places, (batch, q_len)), 1
        )
    return SegmentMask(rows, kv_ids, contiguous=mask.contiguous)


def _rows(array: Array, offset: int | Array, q_len: int) -> Any:
    """Rows [offset, offset + q_len) of a boolean array [..., S, S]."""

    def cut(array: Any, start: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), start, q_len, axis=array.ndim - 2)

    if not np.ndim(offset):
        return cut(array, int32(offset, jnp))
    shape = np.shape(offset) + array.shape[-3:] if array.ndim == 4 else (*np.shape(offset), 1, *array.shape)[-4:]
    if array.ndim == 3:
        shape = (*np.shape(offset), *array.shape)
    return jax.vmap(cut)(jnp.broadcast_to(array, shape), int32(offset, jnp))


class _GlobalAhead(GlobalMask):
    """`GlobalMask` of queries at `q_idx + offset`."""

    _coarse_bounds = False
    _data_fields = ("offset",)
    offset: int | Array

    def __init__(self, tokens: int | tuple[int, ...], offset: int | Array) -> None:
        self._set(tokens=tokens, offset=offset)

    def _leaf_dims(self, name: str) -> str:
        return offset_dims(getattr(self, name))

    def _query_flags(self, grid: Grid) -> Any:
        """Boolean [q_len]: which queries are global."""
        xp = grid.xp
        places = positions(grid, self.offset, np.arange(grid.q_len, dtype=np.int32))
        return xp.asarray(self._flags(grid.kv_len))[xp.clip(places, 0, grid.kv_len - 1)] & (places < grid.kv_len)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        every, some = min_max(grid, self._query_flags(grid), grid.nq, grid.block_q)
        k_some, k_every = (grid.xp.asarray(x) for x in self._key_blocks(grid))
        return grid.code(~(some[i] | k_some[j]), every[i] | k_every[j], OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        keys = grid.xp.asarray(self._flags(grid.kv_len))
        return self._query_flags(grid)[grid.clip_q(q)] | keys[grid.clip_kv(k)]

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> Any:
        return None

    def _partial_bound(self, grid: Grid) -> int:
        # The first n tokens end within one row of blocks, and a block with one query has no end inside.
        ends = 0 if grid.q_len == 1 else 1 if isinstance(self.tokens, int) else grid.nq
        some, every = self._key_blocks(grid)
        return min(ends * grid.nk + grid.nq * int((some & ~every).sum()), grid.nq * grid.nk)

    def _repr_arguments(self) -> list[str]:
        return [*super()._repr_arguments(), f"offset={short(self.offset)}"]


class _Shifted(Mask):
    """Any mask of whole sequences, of as many queries as keys, asked about queries at `q_idx + offset`."""

    _joins = False
    _data_fields = ("mask", "offset")
    mask: Mask
    offset: int | Array

    def __init__(self, mask: Mask, offset: int | Array) -> None:
        self._set(mask=mask, offset=offset)

    def _leaf_dims(self, name: str) -> str:
        return offset_dims(getattr(self, name))

    def _validate(self, q_len: int, kv_len: int) -> None:
        self.mask._validate(kv_len, kv_len)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        # The positions of a block of queries lie in one block of the whole sequence, or in two.
        whole = _whole(grid)
        rows = (grid.xp.clip(x // grid.block_q, 0, whole.nq - 1) for x in position_bounds(grid, self.offset, i))
        first, last = (self.mask._classify(whole, row, j) for row in rows)
        return grid.code((first == EMPTY) & (last == EMPTY), (first == FULL) & (last == FULL), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return self.mask._evaluate(_whole(grid), grid.xp.maximum(positions(grid, self.offset, q), 0), k)

    def _partial_bound(self, grid: Grid) -> int:
        return grid.nq * grid.nk


def _whole(grid: Grid) -> Grid:
    return Grid(grid.kv_len, grid.kv_len, grid.block_q, grid.block_kv, grid.xp)


def has_given_offset(mask: Mask) -> bool:
    """Whether a part of the mask has an offset other than the int 0."""
    children = mask._children()
    offset = getattr(mask, "offset", 0)
    return any(map(has_given_offset, children)) if children else is_array(offset) or offset != 0
