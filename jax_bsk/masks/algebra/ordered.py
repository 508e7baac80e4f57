"""Masks of reordered tokens (`TokenOrder.mask` makes them), and of some of the keys (`keys_at`).

Masks of data are reordered as data, also traced. Of the others the elements are those of the tokens that now stand
there, and the bounds of a block are those of the places of its tokens, where the mask is one of intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import Array, is_traced
from jax_bsk.masks.algebra import _places
from jax_bsk.masks.algebra._places import PlaceIntervals
from jax_bsk.masks.algebra.data_masks import ArrayMask, SegmentMask
from jax_bsk.masks.algebra.function_mask import FunctionMask
from jax_bsk.masks.algebra.mask import AndMask, Mask, MultiHeadMask, NotMask, OrMask
from jax_bsk.masks.algebra.patterns import FullMask, GlobalMask
from jax_bsk.masks.grid import OWN, Grid


def ordered(mask: Mask, order: Array, places: Array) -> Mask:
    """The mask of tokens of which number `order[n]` comes to place n.

    Args:
      mask: Mask of as many queries as keys.
      order: int32 [T], a permutation.
      places: int32 [T], its inverse: the place to which each token comes.
    """

    def of_part(part: Mask) -> Mask:
        if isinstance(part, SegmentMask):
            kv_ids = None if part.kv_ids is None else _taken(part.kv_ids, order)
            return SegmentMask(_taken(part.q_ids, order), kv_ids)
        if isinstance(part, ArrayMask):
            return ArrayMask(_taken(_taken(part.array, order, -2), order))
        if isinstance(part, GlobalMask) and not is_traced(places):
            tokens = np.arange(part.tokens) if isinstance(part.tokens, int) else np.asarray(part.tokens, np.int64)
            return GlobalMask(np.asarray(places)[tokens[tokens < places.shape[0]]])
        return TakenMask(part, order, order, (order.shape[0], order.shape[0]))

    return _by_part(mask, of_part)


def keys_at(mask: Mask, keys: np.ndarray, kv_len: int) -> Mask:
    """The mask of the keys at the places `keys` [C], ascending, of `kv_len`: key n of the result is key `keys[n]`."""

    def of_part(part: Mask) -> Mask:
        if isinstance(part, SegmentMask):
            kv_ids = part.q_ids if part.kv_ids is None else part.kv_ids
            return SegmentMask(part.q_ids, _taken(kv_ids, keys), contiguous=part.contiguous)
        if isinstance(part, ArrayMask):
            return ArrayMask(_taken(part.array, keys))
        return TakenMask(part, None, keys, (None, kv_len))

    return _by_part(mask, of_part)


def _by_part(mask: Mask, of_part: Callable[[Mask], Mask]) -> Mask:
    """`of_part` of the parts that operators combine, combined again."""
    if isinstance(mask, FullMask):
        return mask
    if isinstance(mask, FunctionMask) and mask.within is not None:
        mask = AndMask(*mask.parts())
    if isinstance(mask, AndMask | OrMask | NotMask | MultiHeadMask):
        return mask._map_fields(lambda child: _by_part(child, of_part), lambda _, array: array)
    return of_part(mask)


def _taken(x: Any, order: Any, axis: int = -1) -> Any:
    xp: Any = np if isinstance(x, np.ndarray) and isinstance(order, np.ndarray) else jnp
    return xp.take(x, order, axis=axis)


class TakenMask(Mask):
    """A mask whose query n is that at `queries[n]` of another one, and whose key n is that at `keys[n]`.

    Attributes:
      mask: The other one.
      queries, keys: int32 [T] and [S], or None for the same ones.
      lengths: Queries and keys of the other mask; None where they are the same.
    """

    _data_fields = ("mask", "queries", "keys")
    _joins = False
    mask: Mask
    queries: Array | None
    keys: Array | None
    lengths: tuple[int | None, int | None]

    def __init__(
        self, mask: Mask, queries: Array | None, keys: Array | None, lengths: tuple[int | None, int | None]
    ) -> None:
        self._set(mask=mask, queries=queries, keys=keys, lengths=lengths)

    def _validate(self, q_len: int, kv_len: int) -> None:
        expected = tuple(n if x is None else x.shape[0] for x, n in ((self.queries, q_len), (self.keys, kv_len)))
        if (q_len, kv_len) != expected:
            raise ValueError(
                f"mask has tokens in an order of {expected[1]}, got q_len={q_len}, kv_len={kv_len}; bind it to "
                f"{expected[0]} queries and {expected[1]} keys"
            )
        inner = [n if given is None else given for n, given in zip((q_len, kv_len), self.lengths, strict=True)]
        super()._validate(*inner)

    def _inner(self, grid: Grid) -> Grid:
        """The grid of the other mask."""
        q_len, kv_len = (n if x is None else x for n, x in zip((grid.q_len, grid.kv_len), self.lengths, strict=True))
        return dataclasses.replace(grid, q_len=q_len, kv_len=kv_len)

    def _places(self, grid: Grid) -> PlaceIntervals | None:
        """The intervals of the tokens taken; None where the mask is not one of intervals."""
        found = self.mask._as_places(self._inner(grid))
        if found is None:
            return None
        queries, keys = (None if x is None else grid.xp.asarray(x) for x in (self.queries, self.keys))
        return found.taken(queries, keys)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        found = self._places(grid)
        return grid.xp.full((1, 1), OWN, np.int8) if found is None else _places.classify(found, grid, i, j)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        q = q if self.queries is None else grid.xp.asarray(self.queries)[grid.clip_q(q)]
        k = k if self.keys is None else grid.xp.asarray(self.keys)[grid.clip_kv(k)]
        return self.mask._evaluate(self._inner(grid), q, k)

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...] | None:
        found = self._places(grid)
        return None if found is None else _places.tile_key(found, grid, i, j)

    def _partial_bound(self, grid: Grid) -> int:
        return grid.nq * grid.nk  # the mask's own bound is for tokens in their own order


__all__ = ["TakenMask", "keys_at", "ordered"]
