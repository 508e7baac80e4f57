"""SparseK attention as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import constant, lecun_normal, zeros_init

from jax_bsk.compositions.sparsek import sparsek_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._sparsek import attend_scored, score_dtype


class SparseKSelfAttention(nn.Module):
    """Causal multi-head self-attention by `jax_bsk.sparsek_attention` (SparseK attention, arXiv 2406.16747).

    The parameters are those of `SparseSelfAttention` (query, key, value, out), and what scores the keys: "score", a
    dense layer with one output a head of scores, without a bias, which would change no choice; and "slope", by which
    each head's scores rise in 1,024 tokens. Both learn by the gates' gradients. Scores are float32 or wider.

    Attributes:
      num_heads: Query heads.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; features / num_heads by default.
      out_features: Size of the output; that of the input by default.
      score_heads: Choices: num_kv_heads, shared by the query heads of each (by default), num_heads, or 1.
      attention_fn: `jax_bsk.sparsek_attention`, or `functools.partial` of it with other options (window=256, top_k=4).
      use_bias: Whether the projections of queries, keys, values and output add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Gates, softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections, that of the scores included.
      slope_init: Initializer of the slopes.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    score_heads: int | None = None
    attention_fn: Callable[..., jax.Array] = sparsek_attention
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = lecun_normal()
    bias_init: Any = zeros_init()
    slope_init: Any = constant(0.1)

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
        kernel: dict[str, Any] = {"param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
        common = {**kernel, "dtype": self.dtype, "use_bias": self.use_bias, "bias_init": self.bias_init}
        heads = {"query": self.num_heads, "key": kv_heads, "value": kv_heads}
        query, key, value = (nn.DenseGeneral((n, head_dim), name=name, **common)(inputs) for name, n in heads.items())
        choices = self.score_heads or kv_heads
        exact = score_dtype(self.dtype, self.param_dtype)
        scores = nn.Dense(choices, use_bias=False, dtype=exact, name="score", **kernel)(inputs)
        slope = self.param("slope", self.slope_init, (choices,), self.param_dtype)
        out = attend_scored(self.attention_fn, query, key, value, scores, slope, self.dtype)
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)
