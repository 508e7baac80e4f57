"""Sparse self-attention as a Flax Linen module; the other ready modules are here, too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, zeros_init

from jax_bsk.flax._attention_fn import Implementation, attend, default_head_dim, promote
from jax_bsk.flax._linen_dense import BlockSparseDense as BlockSparseDense
from jax_bsk.flax._linen_nsa import NSASelfAttention as NSASelfAttention
from jax_bsk.flax._linen_sparsek import SparseKSelfAttention as SparseKSelfAttention
from jax_bsk.masks import BlockMask, Mask


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention whose cost follows its mask.

    The parameters have the names and shapes of `flax.linen.MultiHeadDotProductAttention` (query, key, value, out), so
    checkpoints of one fit the other where `num_kv_heads` is not given.

    Attributes:
      num_heads: Query heads.
      mask: What may attend to what, for each call; a lazy mask is bound to the length of each input. None: everything.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; features / num_heads by default.
      out_features: Size of the output; that of the input by default.
      sinks: Whether each head learns a logit that joins its softmax's denominator (parameter "sinks", starting at 0).
      scale, logits_soft_cap, implementation: As in `jax_bsk.sparse_attention`.
      use_bias: Whether the projections add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections.
    """

    num_heads: int
    mask: Mask | BlockMask | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    sinks: bool = False
    scale: float | None = None
    logits_soft_cap: float | None = None
    implementation: Implementation | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = lecun_normal()
    bias_init: Any = zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        mask: Mask | BlockMask | jax.Array | None = None,
        *,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: [*batch, length, features].
          mask: Combined by `&` with the module's: a lazy mask (traced segment ids, say), or an array broadcastable to
            [*batch, heads, length, length].
          lengths: Integers [*batch]: tokens of each example; those beyond are not attended to and attend to nothing.

        Returns:
          [*batch, length, out_features].
        """
        features = inputs.shape[-1]
        head_dim = default_head_dim(self.head_dim, features, self.num_heads)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "use_bias": self.use_bias,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }

        def project(name: str, heads: int) -> jax.Array:
            return nn.DenseGeneral((heads, head_dim), name=name, **common)(inputs)

        kv_heads = self.num_kv_heads or self.num_heads
        query, key, value = promote(
            project("query", self.num_heads), project("key", kv_heads), project("value", kv_heads), self.dtype
        )
        sinks = self.param("sinks", zeros_init(), (self.num_heads,), self.param_dtype) if self.sinks else None
        out = attend(
            query,
            key,
            value,
            self.mask,
            call_mask=mask,
            lengths=lengths,
            sinks=sinks,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
        )
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)
