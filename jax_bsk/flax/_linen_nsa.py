"""Native sparse attention as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, zeros_init

from jax_bsk.compositions.nsa import nsa_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._nsa import attend_gated


class NSASelfAttention(nn.Module):
    """Causal multi-head self-attention by `jax_bsk.nsa_attention` (NSA, arXiv 2502.11089).

    The parameters are those of `SparseSelfAttention` (query, key, value, out) and "gate", a dense layer of 3 num_heads
    outputs whose sigmoids are a head's gates of the compressed, the selected and the window branch, side by side. Keys
    and values are compressed by their mean.

    Attributes:
      num_heads: Query heads.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; features / num_heads by default.
      out_features: Size of the output; that of the input by default.
      attention_fn: `jax_bsk.nsa_attention`, or `functools.partial` of it with other options (window=256, top_k=8).
      use_bias: Whether the projections add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Gates, softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    attention_fn: Callable[..., jax.Array] = nsa_attention
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = lecun_normal()
    bias_init: Any = zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: [*batch, length, features].

        Returns:
          [*batch, length, out_features].
        """
        features = inputs.shape[-1]
        head_dim = default_head_dim(self.head_dim, features, self.num_heads)
        kv_heads = self.num_kv_heads or self.num_heads
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "use_bias": self.use_bias,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        heads = {"query": self.num_heads, "key": kv_heads, "value": kv_heads}
        query, key, value = (nn.DenseGeneral((n, head_dim), name=name, **common)(inputs) for name, n in heads.items())
        gate_logits = nn.Dense(3 * self.num_heads, name="gate", **common)(inputs)
        out = attend_gated(self.attention_fn, query, key, value, gate_logits, self.dtype)
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)
