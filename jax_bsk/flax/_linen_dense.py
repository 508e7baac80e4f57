"""A dense layer with a block-sparse kernel as a Flax Linen module, which `linen` exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.core.dispatch import Implementation
from jax_bsk.flax._dense import BlockPattern, initial_blocks, pruned_dense, resolve_pattern, sparse_dense
from jax_bsk.matmul.pruning import Norm


class BlockSparseDense(nn.Module):
    """Dense layer y = x W + bias that stores, trains and multiplies only some blocks of its kernel W.

    The parameters are `kernel`, an array [stored blocks, bm, bk] of the blocks row by row, and `bias` [features]. The
    places of the blocks are a constant of the program and not saved with the parameters. A layer of equal sizes,
    `density`, `seed` and `block_size` has the same places; those of pruning or of a pattern can be saved as
    `block_pattern(in_features).mask`. Source: Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights" (2017).

    Attributes:
      features: Size of the output. Neither it nor the size of the input need be a multiple of the block.
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
        stored, so lecun_normal gives the variance 1 / (stored inputs of an output). `nn.with_partitioning` names the
        axes (blocks, bm, bk).
      bias_init: Initializer of the bias.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import jax_bsk.flax
      >>> layer = jax_bsk.flax.linen.BlockSparseDense(96, density=0.5, block_size=32)
      >>> out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((4, 64)))
      >>> out.shape, variables["params"]["kernel"].shape
      ((4, 96), (3, 32, 32))
    """

    features: int
    density: float | None = None
    pattern: Any = None
    block_size: int | tuple[int, int] | None = None
    seed: int = 0
    implementation: Implementation | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = lecun_normal()
    bias_init: Callable[..., Any] = zeros_init()

    def __post_init__(self) -> None:
        if self.pattern is not None:  # hashable from here on, as jit wants a module to be
            self.pattern = BlockPattern.of(self.pattern, self.block_size)
        super().__post_init__()

    @nn.nowrap
    def block_pattern(self, in_features: int) -> BlockPattern:
        """Returns the places of the blocks for inputs of that size, with `mask`, `density` and `matrix(kernel)`."""
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
        """Makes a layer of a trained dense layer by keeping its largest blocks.

        Args:
          dense: Dense layer. Its `precision` is not taken over, because sums are float32 anyway.
          params: Parameters of that layer, `kernel` [in_features, features] and `bias`. Partitioning names are dropped.
          density: Number of kept blocks / number of all blocks; `jax_bsk.pruning.magnitude_mask` keeps the largest.
          pattern: Places of the blocks that are kept, in place of a density.
          block_size: Side of a block, or (rows, columns), as for the layer.
          norm: Norm of a block: "l2", "l1" or "max".
          implementation: Implementation of the layer.

        Returns:
          The layer and its parameters. Outputs are those of the dense layer with zeros in the other blocks.

        Raises:
          ValueError: The layer has a product of its own, or `magnitude_mask` refuses the kernel.
          TypeError: The parameters are traced.
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
