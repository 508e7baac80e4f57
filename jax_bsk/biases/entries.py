"""Biases that belong to the entries of a `BlockMask`'s lists: a number or a tile of numbers per visited block."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.biases.base import Bias
from jax_bsk.biases.terms import Call, Terms, check_dims
from jax_bsk.core import inputs
from jax_bsk.core.arrays import as_array, is_array, known
from jax_bsk.masks import BlockMask


class BlockBias(Bias):
    """A number per visited block, added to the logits of all its pairs: what a gate is, before the softmax.

    A scorer that selects blocks can be trained through it. The call's mask is the `BlockMask` to whose lists the
    numbers belong.

    Args:
      values: Floating [B|1, N|1, capacity], number e of a head for entry e of that head's `kv_blocks` (for unbatched
        calls also [N|1, capacity]); numbers past the last entry are not read. Differentiable.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.biases import BlockBias
      >>> from jax_bsk.masks import CausalMask
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> mask = CausalMask().bind(64, block_size=32)
      >>> bias = BlockBias(jnp.zeros((1, 2, mask.capacity)))
      >>> sparse_attention(q, k, v, bias, mask, implementation="xla").shape
      (1, 64, 2, 16)
    """

    _leaves = ("values",)
    values: Any

    def __init__(self, values: ArrayLike) -> None:
        self._set(values=inputs.floating(values, "values"))

    def _terms(self, call: Call) -> Terms:
        mask = _own_mask(call, "BlockBias")
        values = check_dims(
            jnp.asarray(self.values),
            (("B|1", (1, call.batch)), ("N|1", (1, call.heads)), ("capacity", mask.capacity)),
            "values of BlockBias",
            not call.unbatched,
        )
        return Terms(tiles=values.astype(call.stats)[..., None, None])


class TileBias(Bias):
    """Tiles of numbers, one for each visited block that names it: dense where it is, absent elsewhere, shared if equal.

    For biases that are equal in many blocks (windows of Swin, cells of a graph) or present in few. The call's mask is
    the `BlockMask` to whose lists the numbers belong.

    Args:
      tiles: Floating [B|1, N|1, count, block_q, block_kv] (for unbatched calls also [N|1, ...]), element [q, k] for
        query q and key k of a block. A last dimension or two of 1 are shared inside the block. Differentiable.
      numbers: Integers [B|1, N|1, capacity], the tile of entry e of `kv_blocks`; a negative one adds nothing.
        [capacity] alone belongs to all. Where a traced one is no tile, the block's rows are NaN.

    Raises:
      ValueError: In the call: a known number is no tile, or a shape does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.biases import TileBias
      >>> from jax_bsk.masks import CausalMask
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> mask = CausalMask().bind(64, block_size=32)
      >>> same = np.where(mask.kv_blocks == 0, 0, -1)  # one tile for all blocks of the first keys
      >>> bias = TileBias(jnp.zeros((1, 1, 1, 32, 32)), same)
      >>> sparse_attention(q, k, v, bias, mask, implementation="xla").shape
      (1, 64, 2, 16)
    """

    _leaves = ("tiles", "numbers")
    tiles: Any
    numbers: Any

    def __init__(self, tiles: ArrayLike, numbers: ArrayLike) -> None:
        given = as_array(numbers)
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(f"numbers holds integers, got {given.dtype}; cast it, e.g. numbers.astype('int32')")
        self._set(tiles=inputs.floating(tiles, "tiles"), numbers=given)

    def _terms(self, call: Call) -> Terms:
        mask = _own_mask(call, "TileBias")
        tiles = jnp.asarray(self.tiles)
        tiles = check_dims(
            tiles,
            (
                ("B|1", (1, call.batch)),
                ("N|1", (1, call.heads)),
                ("count", tiles.shape[-3] if tiles.ndim > 2 else 0),
                ("block_q|1", (mask.block_q, 1)),
                ("block_kv|1", (mask.block_kv, 1)),
            ),
            "tiles of TileBias",
            not call.unbatched,
        ).astype(call.stats)
        numbers = self.numbers if is_array(self.numbers) else np.asarray(self.numbers)
        numbers = numbers[None, None] if numbers.ndim == 1 else numbers
        numbers = check_dims(
            cast(jax.Array, numbers),
            (("B|1", (1, call.batch)), ("N|1", (1, call.heads)), ("capacity", mask.capacity)),
            "numbers of TileBias",
            not call.unbatched,
        )
        count, values = tiles.shape[2], known(numbers)
        if values is None:
            # Kernels take the last tile for a number past it: a tile of NaN.
            wrong = jnp.full((*tiles.shape[:2], 1, *tiles.shape[3:]), jnp.nan, tiles.dtype)
            tiles = jnp.concatenate([tiles, wrong], axis=2)
            return Terms(tiles=tiles, numbers=_between(numbers, -1, count))
        if values.size and values.max() >= count:
            raise ValueError(
                f"numbers of TileBias are tiles, 0 to {count - 1}, or negative for none, got {values.max()}; give it "
                "more tiles"
            )
        return Terms(tiles=tiles, numbers=np.maximum(values, -1 if values.dtype.kind == "i" else 0).astype(np.int32))


def _between(x: jax.Array, least: int, most: int) -> jax.Array:
    """Integers of any type as int32, clipped before a wider type's could wrap."""
    bounds = np.iinfo(x.dtype)
    return jnp.clip(x, max(least, bounds.min), min(most, bounds.max)).astype(np.int32)


def _own_mask(call: Call, name: str) -> BlockMask:
    if call.mask is None:
        raise ValueError(
            f"{name} belongs to the entries of a BlockMask's lists, but the call has another mask; pass a BlockMask, "
            "e.g. mask=CausalMask().bind(q_len, kv_len)"
        )
    return call.mask
