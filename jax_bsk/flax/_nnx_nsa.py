"""Native sparse attention as a Flax NNX module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.compositions.nsa import nsa_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._nsa import attend_gated
from jax_bsk.masks import Mask


class NSASelfAttention(nnx.Module):
    """Causal multi-head self-attention that calls `jax_bsk.nsa_attention` (NSA, arXiv 2502.11089).

    The parameters are those of `SparseSelfAttention` (query, key, value, out) and `gate`, a dense layer of 3 num_heads
    outputs. Its sigmoids are the gates: for each head those of the compressed, the selected and the window branch, side
    by side. The mean compresses keys and values.

    Args:
      num_heads: Number of query heads.
      in_features: Size of the input.
      num_kv_heads: Number of key/value heads, which divides num_heads (grouped-query attention); default num_heads.
      head_dim: Size of a head; the default is in_features / num_heads.
      out_features: Size of the output; the default is in_features.
      attention_fn: Function `jax_bsk.nsa_attention`, or a `functools.partial` of it with other options (window=256).
      use_bias: Whether the projections add a bias.
      dtype: Type of the computation; the default is what inputs and parameters promote to. Gates, softmax and sums are
        float32.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernels of the projections.
      bias_init: Initializer of the biases of the projections.
      rngs: Random streams for the parameters.

    Examples:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_bsk.flax
      >>> options = functools.partial(jax_bsk.nsa_attention, window=32, top_k=2, block_size=32, implementation="cpu")
      >>> layer = jax_bsk.flax.nnx.NSASelfAttention(2, 32, attention_fn=options, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 32))).shape
      (1, 128, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        attention_fn: Callable[..., jax.Array] = nsa_attention,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Callable[..., Any] = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
        head_dim = default_head_dim(head_dim, in_features, num_heads)
        kv_heads = num_kv_heads or num_heads
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "use_bias": use_bias,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.dtype = dtype
        self.attention_fn = attention_fn
        self.query = nnx.LinearGeneral(in_features, (num_heads, head_dim), **common)
        self.key = nnx.LinearGeneral(in_features, (kv_heads, head_dim), **common)
        self.value = nnx.LinearGeneral(in_features, (kv_heads, head_dim), **common)
        self.gate = nnx.Linear(in_features, 3 * num_heads, **common)
        self.out = nnx.LinearGeneral((num_heads, head_dim), out_features or in_features, axis=(-2, -1), **common)

    def __call__(self, inputs: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: Array [*batch, length, in_features].
          mask: Lazy mask of the tokens besides causality, or None: `SegmentMask(ids)` keeps to documents, whose ids
            [batch, length] may be traced (batch is the product of all leading dimensions).

        Returns:
          Array [*batch, length, out_features].
        """
        projected = self.query(inputs), self.key(inputs), self.value(inputs), self.gate(inputs)
        return self.out(attend_gated(self.attention_fn, *projected, self.dtype, mask))
