"""Rotary positions (RoFormer, Su et al. 2021, arXiv 2104.09864), shared by the examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Turns pairs of features by angles that grow with the position.

    Products of turned queries and keys depend on the distance of their positions alone.

    Args:
      x: Array [..., T, heads, head size]; the head size is even.
      positions: Integers [..., T].
      base: Largest wavelength in tokens, divided by 2 pi.

    Returns:
      Array of x's shape and type; the angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = jnp.asarray([base ** (-n / half) for n in range(half)], jnp.float32)
    angles = jnp.einsum("...t,h->...th", positions.astype(jnp.float32), frequencies)[..., None, :]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
