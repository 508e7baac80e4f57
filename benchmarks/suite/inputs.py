"""The tensors that every contender of a shape gets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


class Inputs:
    """Random query, key and value [B, S, H, D], and whatever a framework keeps of them in its own form."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, seed: int):
        keys = jax.random.split(jax.random.key(seed), 3)
        make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.dtype(dtype)))
        self.arrays: tuple[jax.Array, ...] = jax.block_until_ready(tuple(make(key) for key in keys))
        self.copies: dict[str, Any] = {}
