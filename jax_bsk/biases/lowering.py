"""From what a user gives as bias to the terms that implementations take: sums, and tile numbers of the lists' shape."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.biases.base import BiasSum, as_bias
from jax_bsk.biases.terms import Call, Terms
from jax_bsk.core.arrays import known
from jax_bsk.masks import BlockMask


def lower(bias: Any, call: Call, lists: BlockMask) -> tuple[Terms, BlockMask]:
    """The terms of a bias, and the lists that its tile numbers belong to.

    Args:
      bias: A `Bias`, an array, or None.
      call: The call.
      lists: Its block lists.

    Returns:
      The terms, and the lists: each head's or example's own where only the tile numbers are.

    Raises:
      ValueError: The bias is one of distances, and the mask that of a plan.
    """
    if bias is None:
        return Terms(), lists
    bias = as_bias(bias)
    terms = Terms()
    for part in bias.parts if isinstance(bias, BiasSum) else (bias,):
        found = part._terms(call)
        if lists.planned and found.distances is not None:
            raise ValueError(
                f"{type(part).__name__} counts the tokens of the call, which are in the order of context.plan and not "
                "in the sequence's; give RelativeBias as bias.in_order(plan.mask, plan.positions), and AlibiBias under "
                "a causal mask as the array jnp.outer(slopes, plan.positions)[:, None], which has the same differences "
                "in each row"
            )
        terms = _plus(terms, found, call)
    if 0 in call.sizes:  # no pair
        terms = terms._replace(dense=None, distances=None, tiles=None, numbers=None)
    if terms.tiles is None or lists.capacity == 0 or terms.tiles.shape[2] == 0:  # no tile that an entry could add
        return terms._replace(tiles=None, numbers=None), lists
    lead = lists.kv_blocks.shape[:2]
    if terms.numbers is None:
        own = np.arange(lists.capacity, dtype=np.int32)
        return terms._replace(numbers=np.array(np.broadcast_to(own, (*lead, lists.capacity)))), lists
    wanted = np.broadcast_shapes(lead, terms.numbers.shape[:2])
    return terms._replace(numbers=_spread(terms.numbers, wanted)), _with_lead(lists, wanted)


def _plus(a: Terms, b: Terms, call: Call) -> Terms:
    def total(x: Any, y: Any) -> Any:
        if x is None or y is None:
            return x if y is None else y
        return x.astype(call.stats) + y.astype(call.stats)

    tiles, numbers = _tiles(a, b)
    features = [
        total(x, y) if x is None or y is None else _side_by_side(x, y)
        for x, y in ((a.query_features, b.query_features), (a.key_features, b.key_features))
    ]
    return Terms(total(a.dense, b.dense), total(a.distances, b.distances), tiles, numbers, *features)


def _side_by_side(x: Any, y: Any) -> Any:
    shape = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(z, (*shape, z.shape[-1])) for z in (x, y)], axis=-1)


def _tiles(a: Terms, b: Terms) -> tuple[Any, Any]:
    """The sum of two terms of tiles: of equal numbers tile by tile, otherwise a tile per entry."""
    if a.tiles is None or b.tiles is None:
        return (a.tiles, a.numbers) if b.tiles is None else (b.tiles, b.numbers)
    if _same(a.numbers, b.numbers) and a.tiles.shape[2] == b.tiles.shape[2]:
        return a.tiles + b.tiles, a.numbers
    return _of_entries(a) + _of_entries(b), None


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays of numbers, or None, are known to be equal."""
    if a is b:
        return True
    if a is None or b is None:
        return False
    x, y = known(a), known(b)
    return x is not None and y is not None and np.array_equal(x, y)


def _of_entries(terms: Terms) -> Any:
    """A tile per entry."""
    if terms.numbers is None:
        return terms.tiles
    count, numbers = terms.tiles.shape[2], jnp.asarray(terms.numbers)
    lead = np.broadcast_shapes(numbers.shape[:2], terms.tiles.shape[:2])
    numbers = jnp.broadcast_to(numbers, (*lead, numbers.shape[2]))[..., None, None]
    tiles = jnp.broadcast_to(terms.tiles, (*lead, *terms.tiles.shape[2:]))
    found = jnp.take_along_axis(tiles, jnp.clip(numbers, 0, max(count - 1, 0)), axis=2) if count else 0
    return jnp.where(numbers < 0, 0, found)


def _spread(x: Any, lead: tuple[int, ...]) -> Any:
    """An array of lists with these leading dimensions."""
    if x.shape[:2] == lead:
        return x
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(np.broadcast_to(x, (*lead, *x.shape[2:])))
    return jnp.broadcast_to(x, (*lead, *x.shape[2:]))


def _with_lead(lists: BlockMask, lead: tuple[int, ...]) -> BlockMask:
    if lists.kv_blocks.shape[:2] == lead:
        return lists
    return BlockMask(
        row_offsets=_spread(lists.row_offsets, lead),
        kv_blocks=_spread(lists.kv_blocks, lead),
        tiles=_spread(lists.tiles, lead),
        bit_tiles=lists.bit_tiles,
        col_offsets=None,
        q_blocks=None,
        col_tiles=None,
        block_q=lists.block_q,
        block_kv=lists.block_kv,
        q_len=lists.q_len,
        kv_len=lists.kv_len,
    )
