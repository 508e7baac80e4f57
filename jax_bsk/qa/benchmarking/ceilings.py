"""What this device can do at best: the rate of a plain matrix product and of a plain copy, measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking.timing import interleaved

ROUNDS = 5


def matrix_product_rate(dtype: str, seed: int) -> float:
    """FLOP/s of a plain square matrix product of that type: the ceiling of what any attention may reach here."""
    size = 8192 if compat.default_platform() == "cuda" else 2048
    a, b = (jax.random.normal(k, (size, size), jnp.dtype(dtype)) for k in jax.random.split(jax.random.key(seed)))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _seconds(lambda n: product(a, b))


def copy_bandwidth() -> float:
    """Bytes/s read and written by a copy far larger than any cache: the ceiling of what memory gives."""
    count = (1 << 30) if compat.default_platform() == "cuda" else (1 << 26)
    x = jnp.arange(count // 4, dtype=jnp.uint32)
    copy = jax.jit(lambda x: x ^ jnp.uint32(1))  # one instruction an element, so that it is no alias of its argument
    return 2 * count / _seconds(lambda n: copy(x))


def _seconds(call) -> float:
    jax.block_until_ready(call(0))
    return interleaved({"call": call}, ROUNDS, queued=compat.default_platform() != "cpu")["call"].median
