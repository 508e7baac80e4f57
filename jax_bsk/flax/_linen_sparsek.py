"""SparseK attention as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import constant, lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.compositions.sparsek import sparsek_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._sparsek import attend_scored, score_dtype
from jax_bsk.masks import Mask


class SparseKSelfAttention(nn.Module):
    """Causal multi-head self-attention that calls `jax_bsk.sparsek_attention` (SparseK attention, arXiv 2406.16747).

    The parameters are those of `SparseSelfAttention` (query, key, value, out) and two that score the keys: "score", a
    dense layer with one output per head of scores and no bias (a bias would change no selection), and "slope", by which
    each head's scores rise per 1,024 tokens. The gradients of the gates train both. Scores are float32 or wider.

    Attributes:
      num_heads: Number of query heads.
      num_kv_heads: Number of key/value heads, which divides num_heads (grouped-query attention); default num_heads.
      head_dim: Size of a head; the default is features / num_heads.
      out_features: Size of the output; the default is that of the input.
      score_heads: Number of selections: num_kv_heads (the default; the query heads of each share one), num_heads, or 1.
      attention_fn: Function `jax_bsk.sparsek_attention`, or a `functools.partial` of it with other options (top_k=4).
      use_bias: Whether the projections of queries, keys, values and output add a bias.
      dtype: Type of the computation; the default is what inputs and parameters promote to. Gates, softmax and sums are
        float32.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernels of all projections, that of the scores included.
      bias_init: Initializer of their biases.
      slope_init: Initializer of the slopes.

    Examples:
      >>> import functools
      >>> import jax, jax.numpy as jnp
      >>> import jax_bsk.flax
      >>> options = functools.partial(jax_bsk.sparsek_attention, window=32, block_size=32, implementation="cpu")
      >>> layer = jax_bsk.flax.linen.SparseKSelfAttention(2, attention_fn=options)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 128, 32)))[0].shape
      (1, 128, 32)
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    score_heads: int | None = None
    attention_fn: Callable[..., jax.Array] = sparsek_attention
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = lecun_normal()
    bias_init: Callable[..., Any] = zeros_init()
    slope_init: Callable[..., Any] = constant(0.1)

    @nn.compact
    def __call__(self, inputs: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: Array [*batch, length, features].
          mask: Lazy mask of the tokens besides causality, or None: `SegmentMask(ids)` keeps to documents, whose ids
            [batch, length] may be traced (batch is the product of all leading dimensions).

        Returns:
          Array [*batch, length, out_features].
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
        out = attend_scored(self.attention_fn, query, key, value, scores, slope, self.dtype, mask)
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)
