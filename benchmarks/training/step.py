"""The training step: forward, backward and AdamW, as one function of what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from .config import Config

Step = Callable[[Any, Any, jax.Array, jax.Array, Any], tuple[Any, Any, jax.Array]]


def optimizer_of(config: Config) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=0.1)


def step_of(graph: Any, config: Config, **loss_options: Any) -> Step:
    """From parameters, the optimizer's state, tokens, targets and operand to the first two after a step and the loss.

    Args:
      graph: What `nnx.split` says of the `Decoder` beside its parameters.
      config: Sizes of the run.
      **loss_options: Arguments of `Decoder.loss`.
    """
    optimizer = optimizer_of(config)

    def loss_of(parameters: Any, tokens: jax.Array, targets: jax.Array, operand: Any) -> jax.Array:
        return nnx.merge(graph, parameters).loss(tokens, targets, operand, **loss_options)

    def step(
        parameters: Any, state: Any, tokens: jax.Array, targets: jax.Array, operand: Any
    ) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, tokens, targets, operand)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    return step
