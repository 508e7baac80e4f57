"""What selections share: checks of query and key, means over blocks, and scores in parts of bounded memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.inputs import check_query_key, floating

# Elements of a part of token-level scores, of all examples and heads together.
CHUNK_ELEMENTS = 2**24


def query_and_key(query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """BTNH and BSKH arrays without gradients, as what is chosen has none.

    Raises:
      TypeError, ValueError: as `core.inputs.check_query_key`.
    """
    q, k = floating(query, "query"), floating(key, "key")
    if q.ndim == 3 and k.ndim == 3:
        q, k = q[None], k[None]
    check_query_key(q, k)
    return jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)


def positive(value: SupportsIndex, name: str) -> int:
    """A number that decides shapes, as a Python int.

    Raises:
      TypeError: it is no int.
      ValueError: it is less than 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is an int (it decides shapes), got {value!r}; pass a Python int") from None
    if number < 1:
        raise ValueError(f"{name} is at least 1, got {number}; choose 1 or more")
    return number


def block_means(x: jax.Array, block: int) -> jax.Array:
    """[B, blocks, N, H] means over blocks of tokens of [B, T, N, H]; the last block's over the tokens there are."""
    batch, length, heads, size = x.shape
    blocks = -(-length // block)
    padded = jnp.pad(x, [(0, 0), (0, blocks * block - length), (0, 0), (0, 0)]).astype(statistics_dtype(x.dtype))
    sums = padded.reshape(batch, blocks, block, heads, size).sum(2)
    tokens = jnp.minimum(length - jnp.arange(blocks) * block, block).astype(sums.dtype)
    return sums / tokens[None, :, None, None]


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, N / K, H]."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[3])


def by_query_block(function: Callable[[jax.Array, jax.Array], jax.Array], query: jax.Array, elements: int) -> jax.Array:
    """`function(i, query[:, i])` for each block i of query [B, nq, ...], stacked at axis -2; several at a time.

    Args:
      function: function that gives [B, heads, groups] for one block.
      query: [B, nq, ...].
      elements: upper bound of the elements that the function holds for one block.
    """
    blocks = query.shape[1]
    numbers = jnp.arange(blocks, dtype=jnp.int32)
    together = max(1, min(blocks, CHUNK_ELEMENTS // max(elements, 1)))
    pairs = numbers, jnp.moveaxis(query, 1, 0)
    if together >= blocks:
        rows = jax.vmap(function)(*pairs)
    else:
        rows = jax.lax.map(lambda pair: function(*pair), pairs, batch_size=together)
    return jnp.moveaxis(rows, 0, -2)


def compress(x: jax.Array, length: int, stride: int, given: ArrayLike | None, name: str) -> jax.Array:
    """Compressed keys or values: one for each whole stretch [i d, i d + l), the given one or the mean.

    Args:
      x: [B, S, K, H].
      length, stride: l and d; d divides l.
      given: [B, C, K, H] ([C, K, H]) with C = (S - l) // d + 1 (0 where S < l), or None.
      name: name of the given array, for errors.

    Returns:
      [B, C, K, H], of the type of what is given; means are in float32 (float64 for float64).
    """
    batch, keys, heads, size = x.shape
    count, parts = max(0, (keys - length) // stride + 1), length // stride
    if given is None:
        # A mean is made of sums over d keys, which neighbours share.
        cells = x[:, : keys // stride * stride].astype(statistics_dtype(x.dtype))
        cells = cells.reshape(batch, keys // stride, stride, heads, size).sum(2)
        return sum((cells[:, n : n + count] for n in range(parts)), jnp.zeros((), cells.dtype)) / length
    array = floating(given, name)
    array = array[None] if array.ndim == 3 else array
    expected = (batch, count, heads, size)
    if array.shape != expected:
        raise ValueError(f"{name} has shape {expected} for {keys} tokens, got {array.shape}; make one per window")
    return array
