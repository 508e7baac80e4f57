"""A dense layer with a block-sparse kernel as a Flax Linen module; users find it in `linen`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.initializers import lecun_normal, zeros_init

from jax_bsk.flax._attention_fn import Implementation
from jax_bsk.flax._dense import BlockPattern, initial_blocks, pruned_dense, resolve_pattern, sparse_dense
from jax_bsk.matmul.pruning import Norm


class BlockSparseDense(nn.Module):
    """A dense layer of which only some blocks of the kernel are stored, trained and multiplied: y = x W + bias.

    The parameters are `kernel`, the blocks alone ([stored blocks, bm, bk], row by row), and `bias` [features]. Which
    blocks they are is a constant of the program and not saved with them: a layer made with equal `density`, `seed` and
    `block_size` has the same ones; those of pruning or of a pattern are saved as `block_pattern(in_features).mask`.

    Attributes:
      features: Size of the output; need not be a multiple of the block, and neither need that of the input.
      density: Stored blocks / all blocks, for blocks drawn at random so that rows have equally many, and columns
        (`jax_bsk.pruning.balanced_mask`). Either this or `pattern`.
      pattern: Which blocks are stored: a bool [rows of blocks, columns of blocks], or a `BSR` whose lists are taken.
      block_size: Of either side, or (rows, columns); 128 by default, as everywhere in jax_bsk, or the BSR's own. 64
        follows a pattern more finely, at a lower rate of products.
      seed: Of the random blocks. Layers of one size and seed have the same ones: give each layer its own.
      implementation: As in `jax_bsk.sparse_matmul`.
      use_bias: Whether a bias is added. An output of which no block is stored is the bias alone.
      dtype: Of the computation; by default what inputs and parameters promote to.
      param_dtype: Of the parameters.
      kernel_init: Initializer, called as for a dense layer with as many inputs and outputs as are stored: lecun_normal
        gives the variance 1 / stored inputs of an output. `nn.with_partitioning` names the axes (blocks, bm, bk).
      bias_init: Initializer of the bias.
    """

    features: int
    density: float | None = None
    pattern: Any = None
    block_size: int | tuple[int, int] | None = None
    seed: int = 0
    implementation: Implementation | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = lecun_normal()
    bias_init: Any = zeros_init()

    def __post_init__(self) -> None:
        if self.pattern is not None:  # hashable from here on, as jit wants a module to be
            self.pattern = BlockPattern.of(self.pattern, self.block_size)
        super().__post_init__()

    @nn.nowrap
    def block_pattern(self, in_features: int) -> BlockPattern:
        """The stored blocks for inputs of that size: `mask`, `density`, and `matrix(kernel)`, which is a `BSR`."""
        return resolve_pattern((in_features, self.features), self.density, self.pattern, self.block_size, self.seed)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to inputs [..., in_features]; returns [..., features]."""
        if jnp.ndim(inputs) < 1:
            raise ValueError(f"inputs are [..., in_features], got {jnp.shape(inputs)}")
        pattern = self.block_pattern(jnp.shape(inputs)[-1])
        kernel = self.param("kernel", self._init_kernel, pattern)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return sparse_dense(jnp.asarray(inputs), kernel, bias, pattern, self.dtype, self.implementation)

    @nn.nowrap
    def _init_kernel(self, key: jax.Array, pattern: BlockPattern) -> Any:
        boxes: list[meta.AxisMetadata] = []

        def draw(key, shape):
            drawn = self.kernel_init(key, shape, self.param_dtype)
            if not isinstance(drawn, meta.AxisMetadata):
                return drawn
            (value,) = jax.tree.leaves(drawn)  # `unbox` would lay the axes of the blocks upon this matrix
            boxes[:] = [drawn.replace_boxed(None)]
            return value

        data = initial_blocks(draw, key, pattern, self.param_dtype)
        return boxes[0].replace_boxed(data) if boxes else data

    @classmethod
    def from_dense(
        cls,
        dense: nn.Dense,
        params: Mapping[str, Any],
        density: float | None = None,
        *,
        pattern: Any = None,
        block_size: int | tuple[int, int] | None = None,
        norm: Norm = "l2",
        implementation: Implementation | None = None,
    ) -> tuple[Self, dict[str, Any]]:
        """A trained dense layer without all but its largest blocks.

        Args:
          dense: The layer. Its `precision` is not taken over: sums are float32 anyway.
          params: Its own parameters, `kernel` [in_features, features] and `bias`; partitioning names are dropped.
          density: How many blocks are kept, those of largest norm: `jax_bsk.pruning.magnitude_mask`.
          pattern, block_size, implementation: As for the layer; a pattern says which are kept, in place of a density.
          norm: Of a block: "l2", "l1" or "max".

        Returns:
          The layer and its parameters. Its outputs are those of the dense layer with zeros in the other blocks.

        Raises:
          ValueError: for a replaced product, and as `magnitude_mask`.
          TypeError: for traced parameters.
        """
        if dense.dot_general is not None or dense.dot_general_cls is not None:
            raise ValueError("dense has a dot_general of its own, which a block-sparse product does not use; remove it")
        params = meta.unbox(dict(params))
        if "kernel" not in params:
            raise ValueError(
                f'params are the layer\'s own, {{"kernel": .., "bias": ..}}, got {sorted(params)}; '
                'give variables["params"] (of a model: that of the layer)'
            )
        chosen, data = pruned_dense(params["kernel"], density, pattern, block_size, norm)
        layer = cls(
            dense.features,
            pattern=chosen,
            implementation=implementation,
            use_bias=dense.use_bias,
            dtype=dense.dtype,
            param_dtype=dense.param_dtype,
            kernel_init=dense.kernel_init,
            bias_init=dense.bias_init,
            name=dense.name,
        )
        return layer, {**params, "kernel": data}
