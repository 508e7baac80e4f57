"""A pre-norm decoder of Flax NNX with tied embeddings; all that differs between the runs is `attend`.

On several devices also `place`: what is done to the features between layers, a sharding constraint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_bsk

from .attentions import Attend
from .config import Config

Place = Callable[[jax.Array], jax.Array]


class Layer(nnx.Module):
    """Attention and a feed-forward network of four times the width, each on a branch."""

    def __init__(self, config: Config, attend: Attend, rngs: nnx.Rngs, place: Place = lambda x: x):
        width = config.width

        def linear(features: int, out: int) -> nnx.Linear:
            return nnx.Linear(features, out, use_bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)

        self.attend, self.place, self.heads = attend, place, config.heads
        self.norm_1 = nnx.RMSNorm(width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.norm_2 = nnx.RMSNorm(width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: jax.Array, operand: Any) -> jax.Array:
        normed = self.norm_1(x)
        query, key, value = (
            project(normed).reshape(*x.shape[:2], self.heads, -1) for project in (self.query, self.key, self.value)
        )
        x = self.place(x + self.out(self.attend(query, key, value, operand).reshape(x.shape)))
        return self.place(x + self.down(nnx.gelu(self.up(self.norm_2(x)))))


class Decoder(nnx.Module):
    """From tokens [B, S] to features [B, S, width], and from those to the loss."""

    def __init__(self, config: Config, attend: Attend, rngs: nnx.Rngs, place: Place = lambda x: x):
        dtype, init = jnp.dtype(config.dtype), nnx.initializers.normal(0.02)
        self.config, self.place = config, place
        self.tokens = nnx.Embed(config.vocabulary, config.width, dtype=dtype, embedding_init=init, rngs=rngs)
        if config.learned_positions:
            self.positions = nnx.Embed(config.length, config.width, dtype=dtype, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([Layer(config, attend, rngs, place) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)

    def features(self, tokens: jax.Array, operand: Any, shards: int = 1, place: Place = lambda x: x) -> jax.Array:
        if self.config.ordered_embedding:
            table, dtype = self.tokens.embedding[...], jnp.dtype(self.config.dtype)
            x: Any = _look_up(table, tokens, dtype, lambda y: self.in_steps(place(y), shards))
        else:
            x = self.tokens(tokens)
        if self.config.learned_positions:
            x = x + self.positions(jnp.arange(tokens.shape[1]))
        x = self.place(x)
        for layer in self.layers:
            x = _again(layer, x, operand) if self.config.remat else layer(x, operand)
        return self.norm(x)

    def loss(
        self, tokens: jax.Array, targets: jax.Array, operand: Any, shards: int = 1, place: Place = lambda x: x
    ) -> jax.Array:
        """Mean cross entropy, float32, from logits of a few tokens at a time.

        Args:
          tokens: int32 [B, S].
          targets: int32 [B, S].
          operand: What the attention is given.
          shards: Number of devices that the sequence is split over in the loss. Each goes through its own tokens.
          place: What is done to the features [B, S, width] before the loss.
        """
        x = self.in_steps(place(self.features(tokens, operand, shards, place)), shards)
        targets = self.in_steps(targets, shards)
        embedding = self.tokens.embedding[...].astype(x.dtype)

        @jax.checkpoint
        def some(total: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            features, wanted = both
            logits = jnp.matmul(features, embedding.T, preferred_element_type=jnp.float32)
            log_probabilities = jax.nn.log_softmax(logits)
            return total - jnp.take_along_axis(log_probabilities, wanted[..., None], -1).sum(), None

        total, _ = jax.lax.scan(some, jnp.float32(0), (x, targets))
        return total / targets.size

    def in_steps(self, x: jax.Array, shards: int) -> jax.Array:
        """Tokens [B, S, ...] as [steps, B, shards, chunk, ...]: a step has as many of each example and device."""
        batch, length = x.shape[:2]
        chunk = min(max(1, self.config.loss_chunk // (batch * shards)), length // shards)
        return jnp.moveaxis(x.reshape(batch, shards, -1, chunk, *x.shape[2:]), 2, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: jax.Array, tokens: jax.Array, dtype: Any, in_steps: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rows of the table, whose gradient is a product with one-hot rows: its sums have a fixed order on every device.

    The gradient of `jnp.take` is a scatter, which XLA adds with atomics on a GPU, in whatever order they come. Told to
    be deterministic (xla_gpu_exclude_nondeterministic_ops), it sorts every element of all rows.

    Args:
      table: [vocabulary, width].
      tokens: int32 [B, S].
      dtype: Type of the result.
      in_steps: From [B, S, ...] to [steps, B, shards, chunk, ...], so that few one-hot rows exist at a time.
    """
    return jnp.take(table.astype(dtype), tokens, axis=0)


def _look_up_forward(table: jax.Array, tokens: jax.Array, dtype: Any, in_steps: Any) -> tuple[jax.Array, Any]:
    return _look_up(table, tokens, dtype, in_steps), (table, tokens)


def _look_up_backward(dtype: Any, in_steps: Any, kept: Any, dx: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = kept

    def some(total: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens, dx = both
        rows = jax.nn.one_hot(tokens, len(table), dtype=dtype)
        return total + jnp.einsum("bscv,bscw->bsvw", rows, dx, preferred_element_type=jnp.float32), None

    steps = in_steps(tokens), in_steps(dx)
    total, _ = jax.lax.scan(some, jnp.zeros((*steps[0].shape[1:3], *table.shape), jnp.float32), steps)
    return total.sum((0, 1)).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _again(layer: Layer, x: jax.Array, operand: Any) -> jax.Array:
    """The layer, computed again in the backward."""
    graph, parameters = nnx.split(layer)
    # What jax.nn's attention keeps has no names, so of it nothing is kept.
    policy = jax.checkpoint_policies.save_only_these_names(*jax_bsk.RESIDUAL_NAMES)
    run = jax.checkpoint(lambda parameters, x, operand: nnx.merge(graph, parameters)(x, operand), policy=policy)
    return run(parameters, x, operand)
