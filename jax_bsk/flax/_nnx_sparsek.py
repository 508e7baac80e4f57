"""SparseK attention as a Flax NNX module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import constant, lecun_normal, zeros_init

from jax_bsk.compositions.sparsek import sparsek_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._sparsek import attend_scored, score_dtype


class SparseKSelfAttention(nnx.Module):
    """Causal multi-head self-attention by `jax_bsk.sparsek_attention` (SparseK attention, arXiv 2406.16747).

    The parameters are those of `SparseSelfAttention` (query, key, value, out), and what scores the keys: `score`, a
    dense layer with one output a head of scores, without a bias, which would change no choice; and `slope`, by which
    each head's scores rise in 1,024 tokens. Both learn by the gates' gradients. Scores are float32 or wider.

    Args:
      num_heads: Query heads.
      in_features: Size of the input.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; in_features / num_heads by default.
      out_features: Size of the output; in_features by default.
      score_heads: Choices: num_kv_heads, shared by the query heads of each (by default), num_heads, or 1.
      attention_fn: `jax_bsk.sparsek_attention`, or `functools.partial` of it with other options (window=256, top_k=4).
      use_bias: Whether the projections of queries, keys, values and output add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Gates, softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections, that of the scores included.
      slope_init: Initializer of the slopes.
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
        score_heads: int | None = None,
        attention_fn: Callable[..., jax.Array] = sparsek_attention,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Any = zeros_init(),  # noqa: B008
        slope_init: Any = constant(0.1),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        head_dim = default_head_dim(head_dim, in_features, num_heads)
        kv_heads = num_kv_heads or num_heads
        kernel: dict[str, Any] = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        common = {**kernel, "dtype": dtype, "use_bias": use_bias, "bias_init": bias_init}
        choices = score_heads or kv_heads
        self.dtype = dtype
        self.attention_fn = attention_fn
        self.query = nnx.LinearGeneral(in_features, (num_heads, head_dim), **common)
        self.key = nnx.LinearGeneral(in_features, (kv_heads, head_dim), **common)
        self.value = nnx.LinearGeneral(in_features, (kv_heads, head_dim), **common)
        exact = score_dtype(dtype, param_dtype)
        self.score = nnx.Linear(in_features, choices, use_bias=False, dtype=exact, **kernel)
        self.slope = nnx.Param(slope_init(rngs.params(), (choices,), param_dtype))
        self.out = nnx.LinearGeneral((num_heads, head_dim), out_features or in_features, axis=(-2, -1), **common)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: [*batch, length, in_features].

        Returns:
          [*batch, length, out_features].
        """
        projected = self.query(inputs), self.key(inputs), self.value(inputs), self.score(inputs)
        return self.out(attend_scored(self.attention_fn, *projected, self.slope[...], self.dtype))
