"""The model of `packed_training.py` in Flax Linen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from rotary import rotary

if TYPE_CHECKING:
    from packed_training import Apply, Config


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    config: Config
    attention: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        width, heads = self.config.width, (self.config.heads, self.config.head_dim)
        normed = nn.LayerNorm()(x)
        query, key, value = (
            nn.DenseGeneral(heads, use_bias=False, name=name)(normed) for name in ("query", "key", "value")
        )
        attended = self.attention(rotary(query, positions), rotary(key, positions), value, mask=mask)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(attended)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x))))


class Model(nn.Module):
    """Predicts the next byte: tokens [B, T] to logits [B, T, 256]."""

    config: Config
    attention: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, mask: Any) -> jax.Array:
        x = nn.Embed(256, self.config.width)(tokens)
        for _ in range(self.config.layers):
            x = Layer(self.config, self.attention)(x, positions, mask)
        return nn.Dense(256, name="head")(nn.LayerNorm()(x)).astype(jnp.float32)


def make(config: Config, attention: Callable[..., jax.Array]) -> tuple[Any, Apply]:
    """Initial parameters, and the function (params, tokens, positions, mask) -> logits."""
    model = Model(config, attention)
    tokens = jnp.zeros((1, 32), jnp.int32)
    # Parameters do not depend on the mask; without one, either attention function takes every key.
    params = jax.jit(lambda key: model.init(key, tokens, tokens, None))(jax.random.key(config.seed))

    def apply(params: Any, tokens: jax.Array, positions: jax.Array, mask: Any) -> Any:
        return model.apply(params, tokens, positions, mask)

    return params, apply
