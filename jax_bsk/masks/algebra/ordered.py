"""A mask of reordered tokens: `TokenOrder.mask` makes it, of any mask of as many queries as keys.

Masks of data are reordered as data, also traced. Of the others the elements are those of the tokens that now stand
there, and the bounds of a block are those of the places of its tokens, where the mask is one of intervals.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import Array, is_traced
from jax_bsk.masks.algebra import _intervals
from jax_bsk.masks.algebra._intervals import Intervals
from jax_bsk.masks.algebra.data_masks import ArrayMask, SegmentMask
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
    if isinstance(mask, FullMask):
        return mask
    if isinstance(mask, AndMask | OrMask | NotMask | MultiHeadMask):
        return mask._map_fields(lambda child: ordered(child, order, places), lambda _, array: array)
    if isinstance(mask, SegmentMask):
        kv_ids = None if mask.kv_ids is None else _taken(mask.kv_ids, order)
        return SegmentMask(_taken(mask.q_ids, order), kv_ids)
    if isinstance(mask, ArrayMask):
        return ArrayMask(_taken(_taken(mask.array, order, -2), order))
    if isinstance(mask, GlobalMask) and not is_traced(places):
        tokens = np.arange(mask.tokens) if isinstance(mask.tokens, int) else np.asarray(mask.tokens, np.int64)
        return GlobalMask(np.asarray(places)[tokens[tokens < places.shape[0]]])
    return OrderedMask(mask, order)


def _taken(x: Any, order: Any, axis: int = -1) -> Any:
    xp: Any = np if isinstance(x, np.ndarray) and isinstance(order, np.ndarray) else jnp
    return xp.take(x, order, axis=axis)


class OrderedMask(Mask):
    """A mask of which query and key n are those that the mask has at `order[n]`."""

    _data_fields = ("mask", "order")
    _answers_alone = True
    mask: Mask
    order: Array

    def __init__(self, mask: Mask, order: Array) -> None:
        self._set(mask=mask, order=order)

    def _validate(self, q_len: int, kv_len: int) -> None:
        tokens = self.order.shape[0]
        if (q_len, kv_len) != (tokens, tokens):
            raise ValueError(
                f"mask is in an order of {tokens} tokens, got q_len={q_len}, kv_len={kv_len}; bind it to {tokens} "
                "queries and keys"
            )
        super()._validate(q_len, kv_len)

    def _places(self, grid: Grid) -> Intervals | None:
        """The intervals of the tokens in this order; None where the mask is not one of intervals."""
        found = self.mask._intervals(grid)
        return None if found is None else found.reordered(grid.xp.asarray(self.order))

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        found = self._places(grid)
        return grid.xp.full((1, 1), OWN, np.int8) if found is None else _intervals.classify(found, grid, i, j)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        order = grid.xp.asarray(self.order)
        return self.mask._evaluate(grid, order[grid.clip_q(q)], order[grid.clip_kv(k)])

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...] | None:
        found = self._places(grid)
        return None if found is None else _intervals.tile_key(found, grid, i, j)

    def _partial_bound(self, grid: Grid) -> int:
        return grid.nq * grid.nk  # the mask's own bound is for tokens in their own order


__all__ = ["OrderedMask", "ordered"]
