"""A dense layer with a block-sparse kernel as a Flax NNX module, which `nnx` exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.core.dispatch import Implementation
from jax_bsk.flax._dense import initial_blocks, pruned_dense, resolve_pattern, sparse_dense
from jax_bsk.matmul.bsr import BSR
from jax_bsk.matmul.pruning import Norm


class BlockSparseDense(nnx.Module):
    """Dense layer y = x W + bias that stores, trains and multiplies only some blocks of its kernel W.

    The parameters are `kernel`, an array [stored blocks, bm, bk] of the blocks row by row, and `bias` [out_features].
    The places of the blocks are a constant of the program and not saved with the parameters. A layer of equal sizes,
    `density`, `seed` and `block_size` has the same places; those of pruning or of a pattern can be saved as
    `pattern.mask`. Source: Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights" (2017).

    Args:
      in_features: Size of the input, which need not be a multiple of the block.
      out_features: Size of the output, which need not be a multiple of the block.
      density: Number of stored blocks / number of all blocks. Blocks are drawn at random so that all rows have equally
        many, and all columns too (`jax_bsk.pruning.balanced_mask`). Either this or `pattern` is given.
      pattern: Places of the stored blocks: booleans [rows of blocks, columns of blocks], or a `BSR`, whose lists are
        taken.
      block_size: Side of a block, or (rows, columns). The default is that of a BSR given as `pattern`, else 128. Blocks
        of 64 follow a pattern more finely, and their products run at a lower rate.
      seed: Seed of the random blocks. Layers of one size and seed have the same blocks, so each layer needs its own
        seed.
      implementation: Implementation, as in `jax_bsk.sparse_matmul`.
      use_bias: Whether a bias is added. An output without stored blocks is the bias alone.
      dtype: Type of the computation; the default is what inputs and parameters promote to.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernel. It is called as for a dense layer with as many inputs and outputs as are
        stored, so lecun_normal gives the variance 1 / (stored inputs of an output). `nnx.with_partitioning` names the
        axes (blocks, bm, bk).
      bias_init: Initializer of the bias.
      rngs: Random streams for the parameters.

    Attributes:
      pattern: Places of the stored blocks, with `mask`, `density` and `block_size`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_bsk.flax
      >>> layer = jax_bsk.flax.nnx.BlockSparseDense(64, 96, density=0.5, block_size=32, rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer(jnp.ones((4, 64))).shape
      ((3, 32, 32), (4, 96))
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Callable[..., Any] = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.implementation: Implementation | None = implementation
        self.use_bias, self.dtype, self.param_dtype = use_bias, dtype, param_dtype
        # The pattern is hashable and no array: as arrays the lists would join the module's state, be traced and saved.
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
        """Makes a layer of a trained linear layer by keeping its largest blocks; `linear` itself stays as it is.

        Args:
          linear: Linear layer. Its `precision` (sums are float32 anyway) and its partitioning names are not taken over.
          density: Number of kept blocks / number of all blocks; `jax_bsk.pruning.magnitude_mask` keeps the largest.
          pattern: Places of the blocks that are kept, in place of a density.
          block_size: Side of a block, or (rows, columns), as for the layer.
          norm: Norm of a block: "l2", "l1" or "max".
          implementation: Implementation of the layer.

        Returns:
          A layer whose outputs are those of `linear` with zeros in the other blocks.

        Raises:
          ValueError: The layer has a product of its own, or `magnitude_mask` refuses the kernel.
          TypeError: The kernel is traced.
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
