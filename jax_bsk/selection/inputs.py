"""What selections share: checks of query and key, means over blocks, and scores in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Elements of a piece of token-level scores, of all examples and heads together.
CHUNK_ELEMENTS = 2**24


def query_and_key(query: ArrayLike, key: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """BTNH and BSKH arrays without gradients: what is chosen has none."""
    q, k = jnp.asarray(query), jnp.asarray(key)
    for x, name in ((q, "query"), (k, "key")):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} is a floating-point array, got {x.dtype}; cast it, e.g. {name}.astype('float32')")
    if q.ndim == 3 and k.ndim == 3:
        q, k = q[None], k[None]
    shapes = f"query {q.shape}, key {k.shape}"
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"query is BTNH and key BSKH, or TNH and SKH, got {shapes}; give both a batch or none")
    if q.dtype != k.dtype:
        raise TypeError(f"key is of query's type {q.dtype}, got {k.dtype}; cast one of them")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"query and key have the same batch and head size, got {shapes}; repeat or project one of them"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query's heads are a multiple of key's (grouped-query attention), got {shapes}; repeat key")
    if not q.shape[3]:
        raise ValueError(f"the head size is at least 1, got {shapes}; give query and key a last dimension")
    return jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)


def statistics_dtype(x: jax.Array) -> jnp.dtype:
    """Type of scores: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def block_means(x: jax.Array, block: int) -> jax.Array:
    """[B, blocks, N, H] means over blocks of tokens of [B, T, N, H]; the last block's over the tokens there are."""
    batch, length, heads, size = x.shape
    blocks = -(-length // block)
    padded = jnp.pad(x, [(0, 0), (0, blocks * block - length), (0, 0), (0, 0)]).astype(statistics_dtype(x))
    sums = padded.reshape(batch, blocks, block, heads, size).sum(2)
    tokens = jnp.minimum(length - jnp.arange(blocks) * block, block).astype(sums.dtype)
    return sums / tokens[None, :, None, None]


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, N / K, H]."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[3])


def by_query_block(function: Callable[[jax.Array, jax.Array], jax.Array], query: jax.Array, elements: int) -> jax.Array:
    """`function(i, query[:, i])` for each block i of query [B, nq, ...], stacked at axis -2; several at a time.

    Args:
      function: gives [B, heads, units] for one block.
      query: [B, nq, ...].
      elements: the most elements that the function holds for one block.
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
    """What stands for each stretch [i d, i d + l) of keys or values that is all there: what is given, or the mean.

    Args:
      x: [B, S, K, H].
      length, stride: l and d; d divides l.
      given: [B, C, K, H] ([C, K, H]) with C = (S - l) // d + 1 (0 where S < l), or None.
      name: of what is given, for errors.

    Returns:
      [B, C, K, H], of the type of what is given; means are in float32 (float64 for float64).
    """
    batch, keys, heads, size = x.shape
    count, parts = max(0, (keys - length) // stride + 1), length // stride
    if given is None:
        # Of sums over d keys, which neighbours share.
        cells = x[:, : keys // stride * stride].astype(statistics_dtype(x))
        cells = cells.reshape(batch, keys // stride, stride, heads, size).sum(2)
        return sum((cells[:, n : n + count] for n in range(parts)), jnp.zeros((), cells.dtype)) / length
    array = jnp.asarray(given)
    array = array[None] if array.ndim == 3 else array
    expected = (batch, count, heads, size)
    if array.shape != expected:
        raise ValueError(f"{name} has shape {expected} for {keys} tokens, got {array.shape}; make one per window")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} is a floating-point array, got {array.dtype}; cast it, e.g. {name}.astype('float32')")
    return array
