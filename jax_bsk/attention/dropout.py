"""Which pairs a call drops, by the same bits as the kernels (`csrc/attention/dropout.h`), and the keys of its heads.

Beside `xla`, which asks for masks of blocks. A pair is dropped by a function of its head's key, its query and its key
alone. So the mask is the same in every implementation and order of blocks, in forward and backward, and on any mesh.

Pairs are taken four at a time, {q, q + 8} x {k, k + 8} of every 16 x 16. The four share a 32-bit word, of which each
has a byte.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_PER_PLACE = 0x9E3779B9
DROPPED_OF = 256  # a pair's byte is below the threshold: rates are multiples of 1 / 256


def threshold_of(rate: Any) -> int:
    """The share of pairs that are dropped, in 256ths: 0, or 1 to 255.

    Raises:
      TypeError: The rate has no value yet, or is no number.
      ValueError: It is not in [0, 1).
    """
    if isinstance(rate, Tracer | str) or np.ndim(rate) != 0:
        raise TypeError(
            f"dropout_rate is a Python number, got {type(rate).__name__}; make it a static argument of the jitted "
            "function (the kernels are told of it when the program is compiled)"
        )
    rate = float(rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate is in [0, 1), got {rate}; it is the share of probabilities that are dropped")
    return 0 if rate == 0 else min(max(round(rate * DROPPED_OF), 1), DROPPED_OF - 1)


def keys_of_heads(rng: Any, batch: int, heads: int) -> jax.Array:
    """uint32 [B, N], a word per example and head.

    Raises:
      ValueError: There is no key, or more than one.
      TypeError: It is not a key.
    """
    if rng is None:
        raise ValueError(
            "dropout_rng is a key of jax.random where dropout_rate > 0, got None; pass jax.random.key(seed)"
        )
    try:
        return jax.random.bits(rng, (batch, heads), np.uint32)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"dropout_rng is one key of jax.random, e.g. jax.random.key(seed), got {rng!r}: {error}"
        ) from error


def keys_from(keys: jax.Array, first: jax.Array) -> jax.Array:
    """The keys by which queries that are counted from query `first`, a multiple of 16, drop what they drop.

    Of a query a word has the head's key plus a multiple of its place, and places are counted from `first`, too.
    """
    return keys + np.uint32(_PER_PLACE) * _place(first)


def hash_word(x: jax.Array) -> jax.Array:
    """A bijective hash of 32 bits, `DropoutHash` in C++."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def query_words(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """What queries contribute to their words: of keys [..] and positions that broadcast to them."""
    return hash_word(keys + np.uint32(_PER_PLACE) * (_place(queries) + np.uint32(1)))


def key_words(positions: jax.Array) -> jax.Array:
    """What keys contribute to their words."""
    return hash_word(_place(positions) + np.uint32(0x85EBCA6B))


def pair_words(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """The words of pairs, `DropoutWord` in C++; both arguments broadcast to the pairs."""
    low, high = _product(*_product(of_queries, of_keys))
    return low ^ high


def factors(
    of_queries: jax.Array, of_keys: jax.Array, queries: jax.Array, keys: jax.Array, threshold: int, dtype: Any
) -> jax.Array:
    """The factor of each pair's probability, 0 where it is dropped; all arguments broadcast to the pairs."""
    word = pair_words(of_queries, of_keys)
    byte = (queries >> 3 & 1) + 2 * (keys >> 3 & 1)
    dropped = (word >> (8 * byte).astype(np.uint32)) & np.uint32(0xFF) < np.uint32(threshold)
    return jnp.where(dropped, jnp.zeros((), dtype), jnp.asarray(DROPPED_OF / (DROPPED_OF - threshold), dtype))


def dense_factors(keys: jax.Array, q_len: int, kv_len: int, threshold: int, dtype: Any = np.float32) -> jax.Array:
    """The factors of all pairs, [B, N, T, S], from the keys [B, N] of the heads: what tests compare with."""
    queries = jnp.arange(q_len, dtype=jnp.int32)[None, None, :, None]
    positions = jnp.arange(kv_len, dtype=jnp.int32)[None, None, None]
    of_queries = query_words(keys[:, :, None, None], queries)
    return factors(of_queries, key_words(positions), queries, positions, threshold, dtype)


def _product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high word of x y, by products of 16 bits: without x64 JAX has no integers of 64.

    `jax.lax.mulhi` would be the high one, but XLA of jax 0.10.2 and 0.11.2 cannot compile it in a program that is
    sharded over two GPUs ("Unable to convert MHLO to StableHLO").
    """
    half, low_bits = np.uint32(16), np.uint32(0xFFFF)
    x_low, x_high, y_low, y_high = x & low_bits, x >> half, y & low_bits, y >> half
    middle = x_high * y_low + (x_low * y_low >> half)
    other = x_low * y_high + (middle & low_bits)
    return x * y, x_high * y_high + (middle >> half) + (other >> half)


def _place(positions: jax.Array) -> jax.Array:
    """The number of a position among those that share its words: 8 of every 16."""
    return (positions >> 4 << 3 | positions & 7).astype(np.uint32)
