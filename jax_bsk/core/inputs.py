"""Checks of the arrays that attention and selections are given: query, key, value and other floating-point arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def floating(x: ArrayLike, name: str) -> jax.Array:
    """An argument as a JAX array.

    Raises:
      TypeError: it is not floating-point.
    """
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} is a floating-point array, got {array.dtype}; cast it, e.g. {name}.astype('float32')")
    return array


def check_query_key(query: jax.Array, key: jax.Array, value: jax.Array | None = None) -> None:
    """Checks that query BTNH, key BSKH and value BSKH fit each other; selections have no value.

    Raises:
      TypeError: a type is not query's.
      ValueError: a shape does not fit.
    """
    named = [(key, "key")] if value is None else [(key, "key"), (value, "value")]
    shapes = ", ".join(f"{name} {x.shape}" for x, name in [(query, "query"), *named])
    if any(x.ndim != 4 for x in (query, *(x for x, _ in named))):
        both = "key BSKH, or TNH and SKH both" if value is None else "key and value BSKH, or TNH and SKH all three"
        raise ValueError(f"query is BTNH and {both}, got {shapes}; add the batch, e.g. query[None]")
    for array, name in named:
        if array.dtype != query.dtype:
            raise TypeError(f"{name} is of query's type {query.dtype}, got {array.dtype}; cast one of them")
        if array.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} has query's batch size {query.shape[0]}, got {array.shape[0]} ({shapes}); repeat it with "
                "jnp.broadcast_to"
            )
    if value is not None and key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value have the same length and heads, got {shapes}; pad or cut one of them")
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key has query's head size {query.shape[3]}, got {key.shape[3]} ({shapes}); project both to one size"
        )
    for array, name in [(query, "query"), *named[1:]]:
        if array.shape[3] == 0:
            raise ValueError(f"{name}'s head size is at least 1, got 0 ({shapes}); give it a last dimension")
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads and (kv_heads == 0 or heads % kv_heads):
        repeated = " and ".join(name for _, name in named)
        raise ValueError(
            f"query's heads are a multiple of key's (grouped-query attention), got {heads} and {kv_heads} ({shapes}); "
            f"repeat {repeated}"
        )


def check_broadcasts(shape: tuple[int, ...], full: tuple[int, int, int, int], unbatched: bool, name: str) -> None:
    """Refuses an array with a dimension that is neither 1 nor that of `full`; the first dimensions may be missing."""
    if len(shape) <= len(full) and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False)):
        return
    batch, _, q_len, kv_len = full
    letters, wanted = ("NTS", full[1:]) if unbatched else ("BNTS", full)
    if shape == (batch, kv_len):
        remedy = f"numbers of each example's keys are {name}[:, None, None, :]"
    elif len(shape) == 3 and shape[0] == batch and shape[1] in (1, q_len) and shape[2] in (1, kv_len):
        remedy = f"numbers of each example are {name}[:, None]"
    elif shape == (batch, q_len):
        remedy = f"numbers of each example's queries are {name}[:, None, :, None]"
    else:
        remedy = f"give it dimensions of these sizes or 1, e.g. {name}[None]"
    raise ValueError(f"{name} broadcasts to {letters} = {wanted}, got shape {shape}; {remedy}")
