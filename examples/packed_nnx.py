"""The model of `packed_training.py` in Flax NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from rotary import rotary

if TYPE_CHECKING:
    from packed_training import Apply, Config


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, attention: Callable[..., jax.Array], rngs: nnx.Rngs):
        width, heads = config.width, (config.heads, config.head_dim)
        self.attention = attention
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(width, heads, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        normed = self.norm_1(x)
        query, key = rotary(self.query(normed), positions), rotary(self.key(normed), positions)
        x = x + self.out(self.attention(query, key, self.value(normed), mask=mask))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Model(nnx.Module):
    """Predicts the next byte: tokens [B, T] to logits [B, T, 256]."""

    def __init__(self, config: Config, attention: Callable[..., jax.Array], rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.width, rngs=rngs)
        self.layers = nnx.List([Layer(config, attention, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.head(self.norm(x)).astype(jnp.float32)


def make(config: Config, attention: Callable[..., jax.Array]) -> tuple[Any, Apply]:
    """Initial parameters, and the function (params, tokens, positions, mask) -> logits."""
    graphdef, params = nnx.split(Model(config, attention, nnx.Rngs(config.seed)))

    def apply(params: Any, tokens: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, positions, mask)

    return params, apply
