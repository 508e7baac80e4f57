"""The matrices that every contender of a case gets."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BSR
from jax_bsk.qa.benchmarking.matmul.cases import Config, Operation


class Operands:
    """Random matrices of a config, and whatever a framework keeps of them in its own form.

    The blocks of W have a variance that leaves products with it as large as what they are made of, so that calls can
    be chained.

    Attributes:
      config: sizes and pattern.
      matrix: W as a `BSR` on the device.
      host: the same with the lists on the host.
      dense: W with its zeros, [size, size], made of the same numbers by itself.
      kept: which blocks are stored, bool [rows of blocks, columns of blocks].
      x, dy: dense [size, size].
      copies: of the frameworks.
    """

    def __init__(self, config: Config, seed: int):
        size, block, dtype = config.size, config.block, jnp.dtype(config.dtype)
        count = size // block
        rng = np.random.default_rng([seed, size, block, config.stored_blocks])
        chosen = np.sort(rng.choice(count**2, config.stored_blocks, replace=False))
        self.config = config
        self.kept = np.zeros((count, count), bool)
        self.kept.flat[chosen] = True
        indptr = np.searchsorted(chosen, np.arange(count + 1) * count).astype(np.int32)

        full, self.x, self.dy = _numbers(jax.random.fold_in(jax.random.key(seed), size), size, dtype)
        scale = jnp.asarray(1 / math.sqrt(max(1.0, size * config.density)), dtype)
        self.dense = _masked(full, self.kept, scale)
        indices, blocks = (chosen % count).astype(np.int32), _blocks(full, chosen, scale, block)
        self.host = BSR(blocks, indptr, indices, (size, size))
        self.matrix: BSR = jax.device_put(self.host.with_traced_lists())
        jax.block_until_ready((self.matrix, self.dense, self.x, self.dy))
        self.copies: dict[str, Any] = {}

    def moving(self, operation: Operation) -> jax.Array:
        """The dense operand that changes from call to call: X, or dY of a gradient."""
        return self.x if operation in (Operation.FORWARD, Operation.LAYER) else self.dy

    def random_weights(self) -> jax.Array:
        """Random numbers in every place of W, made on need; as large as leaves products with them as they are."""
        if "random weights" not in self.copies:
            full, scale = _numbers(jax.random.key(0), self.config.size, self.x.dtype)[0], self.config.size**-0.5
            self.copies["random weights"] = full * jnp.asarray(scale, full.dtype)
        return self.copies["random weights"]

    def factors(
        self, operation: Operation, weights: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, bool, bool]:
        """The two dense matrices whose product the operation is, and which of them is to be transposed.

        Args:
          operation: the product.
          weights: in place of W.
        """
        w = self.dense if weights is None else weights
        return {
            Operation.FORWARD: (w, self.x, False, False),
            Operation.LAYER: (self.x, w, False, False),
            Operation.DENSE_GRADIENT: (w, self.dy, True, False),
            Operation.DATA_GRADIENT: (self.dy, self.x, False, True),
        }[operation]


# One program each for what does not depend on the sparsity: on a GPU compiling takes longer than all they compute.


@functools.partial(jax.jit, static_argnums=(1, 2))
def _numbers(key: jax.Array, size: int, dtype: Any) -> tuple[jax.Array, ...]:
    """W without its zeros, X and dY."""
    return tuple(jax.random.normal(key, (size, size), dtype) for key in jax.random.split(key, 3))


@jax.jit
def _masked(full: jax.Array, kept: jax.Array, scale: jax.Array) -> jax.Array:
    block = full.shape[0] // kept.shape[0]
    return jnp.where(jnp.repeat(jnp.repeat(kept, block, 0), block, 1), full * scale, jnp.zeros((), full.dtype))


@functools.partial(jax.jit, static_argnums=3)
def _blocks(full: jax.Array, chosen: jax.Array, scale: jax.Array, block: int) -> jax.Array:
    count = full.shape[0] // block
    tiled = full.reshape(count, block, count, block)
    return tiled[chosen // count, :, chosen % count] * scale
