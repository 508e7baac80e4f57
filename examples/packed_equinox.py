"""The model of `packed_training.py` in Equinox.

As is usual there, the model is written for one sequence and mapped over the batch by `jax.vmap`. The mask is mapped
with it: a lazy mask is a pytree whose document ids are its leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from rotary import rotary

if TYPE_CHECKING:
    from packed_training import Apply, Config


class Layer(eqx.Module):
    """A pre-norm transformer layer."""

    norm_1: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    norm_2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    attention: Callable[..., jax.Array] = eqx.field(static=True)

    def __init__(self, config: Config, attention: Callable[..., jax.Array], key: jax.Array):
        width, inner = config.width, config.heads * config.head_dim
        keys = jax.random.split(key, 6)
        self.norm_1, self.norm_2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.query, self.key, self.value = (eqx.nn.Linear(width, inner, use_bias=False, key=k) for k in keys[:3])
        self.out = eqx.nn.Linear(inner, width, use_bias=False, key=keys[3])
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[4])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[5])
        self.heads, self.attention = config.heads, attention

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        normed = jax.vmap(self.norm_1)(x)
        query, key, value = (
            jax.vmap(linear)(normed).reshape(x.shape[0], self.heads, -1)
            for linear in (self.query, self.key, self.value)
        )
        attended = self.attention(rotary(query, positions), rotary(key, positions), value, mask=mask)
        x = x + jax.vmap(self.out)(attended.reshape(x.shape[0], -1))
        return x + jax.vmap(lambda token: self.down(jax.nn.gelu(self.up(self.norm_2(token)))))(x)


class Model(eqx.Module):
    """Predicts the next byte: tokens [T] to logits [T, 256]."""

    embedding: eqx.nn.Embedding
    layers: list[Layer]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, config: Config, attention: Callable[..., jax.Array], key: jax.Array):
        first, last, *keys = jax.random.split(key, config.layers + 2)
        self.embedding = eqx.nn.Embedding(256, config.width, key=first)
        self.layers = [Layer(config, attention, key) for key in keys]
        self.norm = eqx.nn.LayerNorm(config.width)
        self.head = eqx.nn.Linear(config.width, 256, key=last)

    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x)).astype(jnp.float32)


def make(config: Config, attention: Callable[..., jax.Array]) -> tuple[Any, Apply]:
    """Initial parameters, and the function (params, tokens, positions, mask) -> logits."""
    params, static = eqx.partition(Model(config, attention, jax.random.key(config.seed)), eqx.is_array)

    def apply(params: Any, tokens: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(tokens, positions, mask)

    return params, apply
