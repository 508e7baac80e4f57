"""The tensors that every contender of a shape gets."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.passes import Pass


class Inputs:
    """Random tensors of a case's sizes, and whatever a framework keeps of them in its own form.

    Attributes:
      arrays: query [B, S, H, D], key and value [B, S, K, D].
      copies: of the frameworks.
    """

    def __init__(self, case: Case, seed: int):
        self._shape, self._dtype, self._seed = case.shape, jnp.dtype(case.dtype), seed
        *keys, _ = self._keys()
        shapes = case.shape, case.kv_shape, case.kv_shape
        arrays = tuple(self._draw(key, shape) for key, shape in zip(keys, shapes, strict=True))
        self.arrays: tuple[jax.Array, ...] = jax.block_until_ready(arrays)
        self.copies: dict[str, Any] = {}

    @functools.cached_property
    def cotangent(self) -> jax.Array:
        """Of the output, [B, S, H, D]; drawn where a pass asks for it."""
        return jax.block_until_ready(self._draw(self._keys()[-1], self._shape))

    def of(self, which: Pass) -> tuple[jax.Array, ...]:
        """What that pass starts from: query, key, value, and the cotangent unless it is the forward."""
        return self.arrays if which is Pass.FORWARD else (*self.arrays, self.cotangent)

    def _keys(self) -> list[jax.Array]:
        """Of query, key, value and cotangent."""
        key = jax.random.key(self._seed)
        return [*jax.random.split(key, 3), jax.random.fold_in(key, 3)]

    def _draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _normal(key, shape, self._dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)
