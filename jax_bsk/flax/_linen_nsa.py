"""Native sparse attention as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.compositions.nsa import nsa_attention
from jax_bsk.flax._attention_fn import default_head_dim
from jax_bsk.flax._nsa import attend_gated
from jax_bsk.masks import Mask


class NSASelfAttention(nn.Module):
    """Causal multi-head self-attention that calls `jax_bsk.nsa_attention` (NSA, arXiv 2502.11089).

    The parameters are those of `SparseSelfAttention` (query, key, value, out) and "gate", a dense layer of 3 num_heads
    outputs. Its sigmoids are the gates: for each head those of the compressed, the selected and the window branch, side
    by side. The mean compresses keys and values.

    Attributes:
      num_heads: Number of query heads.
      num_kv_heads: Number of key/value heads, which divides num_heads (grouped-query attention); default num_heads.
      head_dim: Size of a head; the default is features / num_heads.
      out_features: Size of the output; the default is that of the input.
      attention_fn: Function `jax_bsk.nsa_attention`, or a `functools.partial` of it with other options (window=256).
      use_bias: Whether the projections add a bias.
      dtype: Type of the computation; the default is what inputs and parameters promote to. Gates, softmax and sums are
        float32.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernels of the projections.
      bias_init: Initializer of the biases of the projections.

    Examples:
      >>> import functools
      >>> import jax, jax.numpy as jnp
      >>> import jax_bsk.flax
      >>> options = functools.partial(jax_bsk.nsa_attention, window=32, top_k=2, block_size=32, implementation="cpu")
      >>> layer = jax_bsk.flax.linen.NSASelfAttention(2, attention_fn=options)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 128, 32)))[0].shape
      (1, 128, 32)
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    attention_fn: Callable[..., jax.Array] = nsa_attention
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = lecun_normal()
    bias_init: Callable[..., Any] = zeros_init()

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
        out = attend_gated(self.attention_fn, query, key, value, gate_logits, self.dtype, mask)
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)
