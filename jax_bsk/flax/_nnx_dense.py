"""A dense layer with a block-sparse kernel as a Flax NNX module; users find it in `nnx`."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init

from jax_bsk.flax._attention_fn import Implementation
from jax_bsk.flax._dense import initial_blocks, pruned_dense, resolve_pattern, sparse_dense
from jax_bsk.matmul.bsr import BSR
from jax_bsk.matmul.pruning import Norm


class BlockSparseDense(nnx.Module):
    """A dense layer of which only some blocks of the kernel are stored, trained and multiplied: y = x W + bias.

    The parameters are `kernel`, the blocks alone ([stored blocks, bm, bk], row by row), and `bias` [out_features].
    Which blocks they are is a constant of the program and not saved with them: a layer made with equal `density`,
    `seed` and `block_size` has the same ones; those of pruning or of a pattern are saved as `pattern.mask`.

    Args:
      in_features, out_features: Sizes of input and output; need not be multiples of the block.
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
        gives the variance 1 / stored inputs of an output. `nnx.with_partitioning` names the axes (blocks, bm, bk).
      bias_init: Initializer of the bias.
      rngs: Random streams for the parameters.

    Attributes:
      pattern: The stored blocks: its `mask`, `density` and `block_size`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float | None = None,
        *,
        pattern: Any = None,
        block_size: int | tuple[int, int] | None = None,
        seed: int = 0,
        implementation: Implementation | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Any = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.implementation: Implementation | None = implementation
        self.use_bias, self.dtype, self.param_dtype = use_bias, dtype, param_dtype
        # Hashable and no array: as arrays the lists would join the module's state, to be traced and saved.
        self.pattern = resolve_pattern((in_features, out_features), density, pattern, block_size, seed)
        metadata: list[nnx.VariableMetadata] = []

        def draw(key, shape):
            drawn = kernel_init(key, shape, param_dtype)
            if not isinstance(drawn, nnx.VariableMetadata):
                return drawn
            metadata[:] = [dataclasses.replace(drawn, raw_value=None)]
            return drawn.raw_value

        data = initial_blocks(draw, rngs.params(), self.pattern, param_dtype)
        self.kernel = nnx.Param(dataclasses.replace(metadata[0], raw_value=data) if metadata else data)
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)

    @property
    def matrix(self) -> BSR:
        """The kernel [in_features, out_features] as a `BSR`."""
        return self.pattern.matrix(self.kernel[...])

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to inputs [..., in_features]; returns [..., out_features]."""
        bias = None if self.bias is None else self.bias[...]
        return sparse_dense(jnp.asarray(inputs), self.kernel[...], bias, self.pattern, self.dtype, self.implementation)

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        density: float | None = None,
        *,
        pattern: Any = None,
        block_size: int | tuple[int, int] | None = None,
        norm: Norm = "l2",
        implementation: Implementation | None = None,
    ) -> Self:
        """A trained linear layer without all but its largest blocks; `linear` itself stays as it is.

        Args:
          linear: The layer. Its `precision` is not taken over: sums are float32 anyway. Nor are partitioning names.
          density: How many blocks are kept, those of largest norm: `jax_bsk.pruning.magnitude_mask`.
          pattern, block_size, implementation: As for the layer; a pattern says which are kept, in place of a density.
          norm: Of a block: "l2", "l1" or "max".

        Returns:
          A layer whose outputs are those of `linear` with zeros in the other blocks.

        Raises:
          ValueError: for a replaced product, and as `magnitude_mask`.
          TypeError: for a traced kernel.
        """
        if linear.dot_general is not jax.lax.dot_general or getattr(linear, "preferred_element_type", None) is not None:
            raise ValueError(
                "linear has a dot_general or preferred_element_type of its own, which a block-sparse product does not "
                "use; remove it (the layer's dtype is that of its result)"
            )
        chosen, data = pruned_dense(linear.kernel[...], density, pattern, block_size, norm)
        layer = cls(
            linear.in_features,
            linear.out_features,
            pattern=chosen,
            implementation=implementation,
            use_bias=linear.use_bias,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            kernel_init=zeros_init(),
            rngs=nnx.Rngs(0),
        )
        layer.kernel = nnx.Param(data)
        if linear.bias is not None:
            layer.bias = nnx.Param(linear.bias[...])
        return layer
