"""Native sparse attention as a Flax NNX module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init

from jax_bsk.compositions.nsa import nsa_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._nsa import attend_gated


class NSASelfAttention(nnx.Module):
    """Causal multi-head self-attention by `jax_bsk.nsa_attention` (NSA, arXiv 2502.11089).

    The parameters are those of `SparseSelfAttention` (query, key, value, out) and `gate`, a dense layer of 3 num_heads
    outputs whose sigmoids are a head's gates of the compressed, the selected and the window branch, side by side. Keys
    and values are compressed by their mean.

    Args:
      num_heads: Query heads.
      in_features: Size of the input.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; in_features / num_heads by default.
      out_features: Size of the output; in_features by default.
      attention_fn: `jax_bsk.nsa_attention`, or `functools.partial` of it with other options (window=256, top_k=8).
      use_bias: Whether the projections add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Gates, softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections.
      rngs: Random streams for the parameters.
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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Any = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
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

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: [*batch, length, in_features].

        Returns:
          [*batch, length, out_features].
        """
        projected = self.query(inputs), self.key(inputs), self.value(inputs), self.gate(inputs)
        return self.out(attend_gated(self.attention_fn, *projected, self.dtype))
