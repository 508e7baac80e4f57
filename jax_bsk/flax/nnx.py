"""Sparse self-attention as a Flax NNX module; the other ready modules are here, too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init

from jax_bsk.flax._attention_fn import Implementation, attend, default_head_dim, promote
from jax_bsk.flax._nnx_dense import BlockSparseDense as BlockSparseDense
from jax_bsk.flax._nnx_nsa import NSASelfAttention as NSASelfAttention
from jax_bsk.flax._nnx_sparsek import SparseKSelfAttention as SparseKSelfAttention
from jax_bsk.masks import BlockMask, Mask


class SparseSelfAttention(nnx.Module):
    """Multi-head self-attention whose cost follows its mask.

    The parameters have the names and shapes of `flax.nnx.MultiHeadAttention`'s (query, key, value, out), and `sinks`
    where asked for.

    Args:
      num_heads: Query heads.
      in_features: Size of the input.
      mask: What may attend to what, for each call; a lazy mask is bound to the length of each input. None: everything.
      num_kv_heads: Key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default.
      head_dim: Size of a head; in_features / num_heads by default.
      out_features: Size of the output; in_features by default.
      sinks: Whether each head learns a logit that joins its softmax's denominator, starting at 0.
      scale, logits_soft_cap, implementation: As in `jax_bsk.sparse_attention`.
      use_bias: Whether the projections add a bias.
      dtype: Of the computation; by default what inputs and parameters promote to. Softmax and sums are float32.
      param_dtype: Of the parameters.
      kernel_init, bias_init: Initializers of the projections.
      rngs: Random streams for the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        mask: Mask | BlockMask | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        sinks: bool = False,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        implementation: Implementation | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Any = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        head_dim = default_head_dim(head_dim, in_features, num_heads)
        kv_heads = num_kv_heads or num_heads
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.dtype = dtype
        self.query = linear(in_features, (num_heads, head_dim))
        self.key = linear(in_features, (kv_heads, head_dim))
        self.value = linear(in_features, (kv_heads, head_dim))
        self.out = linear((num_heads, head_dim), out_features or in_features, axis=(-2, -1))
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype)) if sinks else nnx.data(None)
        # The mask lives in a function: as an attribute its arrays would join the module's state, to be traced by jit
        # and saved in checkpoints; known beforehand, a mask is cheaper.
        self._attend = functools.partial(
            attend, mask=mask, scale=scale, logits_soft_cap=logits_soft_cap, implementation=implementation
        )

    def __call__(
        self,
        inputs: jax.Array,
        mask: Mask | BlockMask | jax.Array | None = None,
        *,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: [*batch, length, in_features].
          mask: Combined by `&` with the module's: a lazy mask (traced segment ids, say), or an array broadcastable to
            [*batch, heads, length, length].
          lengths: Integers [*batch]: tokens of each example; those beyond are not attended to and attend to nothing.

        Returns:
          [*batch, length, out_features].
        """
        query, key, value = promote(self.query(inputs), self.key(inputs), self.value(inputs), self.dtype)
        sinks = None if self.sinks is None else self.sinks[...]
        return self.out(self._attend(query, key, value, call_mask=mask, lengths=lengths, sinks=sinks))
