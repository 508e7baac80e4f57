"""Sparse self-attention as a Flax Linen module; the module also exports the other ready layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.core.dispatch import Implementation
from jax_bsk.flax._attention_fn import attend, default_head_dim, promote
from jax_bsk.flax._cache import Cache, attend_cached, empty_index
from jax_bsk.flax._linen_dense import BlockSparseDense as BlockSparseDense
from jax_bsk.flax._linen_nsa import NSASelfAttention as NSASelfAttention
from jax_bsk.flax._linen_sparsek import SparseKSelfAttention as SparseKSelfAttention
from jax_bsk.masks import BlockMask, Mask


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention that computes only the blocks its mask visits.

    The parameters have the names and shapes of `flax.linen.MultiHeadDotProductAttention` (query, key, value, out).
    Where `num_kv_heads` is not given, checkpoints of one fit the other.

    Attributes:
      num_heads: Number of query heads.
      mask: Mask of every call; a lazy mask is bound to the length of each input. None lets all tokens attend to all.
      num_kv_heads: Number of key/value heads, which divides num_heads (grouped-query attention); default num_heads.
      head_dim: Size of a head; the default is features / num_heads.
      out_features: Size of the output; the default is that of the input.
      sinks: Whether each head learns a logit (parameter "sinks", 0 at first) that joins the denominator of its softmax.
      scale: Factor of the logits, as in `jax_bsk.sparse_attention`.
      logits_soft_cap: Bound of the logits, as in `jax_bsk.sparse_attention`.
      implementation: Implementation, as in `jax_bsk.sparse_attention`.
      decode: Whether calls append their tokens to a cache and attend to all tokens of it, as with Flax's layers. `init`
        with inputs of the greatest length makes the collection "cache": cached_key and cached_value
        [*batch, max length, num_kv_heads, head_dim], and cache_index, the number of tokens of each example so far,
        int32 [*batch]. A call may have one token or several, and the masks, which must be lazy, are bound to their
        positions. No token attends to a later one, whatever the mask. An example whose tokens pass the
        cache's end yields NaN.
      use_bias: Whether the projections add a bias.
      dtype: Type of the computation; the default is what inputs and parameters promote to. Softmax and sums are
        float32.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernels of the projections.
      bias_init: Initializer of the biases of the projections.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import jax_bsk.flax
      >>> from jax_bsk.masks import CausalMask
      >>> layer = jax_bsk.flax.linen.SparseSelfAttention(2, CausalMask(), implementation="cpu")
      >>> out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 64, 32)))
      >>> out.shape, sorted(variables["params"])
      ((1, 64, 32), ['key', 'out', 'query', 'value'])
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
    decode: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = lecun_normal()
    bias_init: Callable[..., Any] = zeros_init()

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
          inputs: Array [*batch, length, features].
          mask: Mask of this call, which is combined with the module's by `&`: a lazy mask (traced segment ids, say), or
            an array that broadcasts to [*batch, heads, length, length]; with a cache the last length is the cache's.
          lengths: Integers [*batch], the number of tokens of each example in this call. Tokens beyond it take no part
            in attention and are not cached, and their output is the bias of the projection alone.

        Returns:
          Array [*batch, length, out_features].
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
        options: dict[str, Any] = {
            "call_mask": mask,
            "lengths": lengths,
            "sinks": sinks,
            "scale": self.scale,
            "logits_soft_cap": self.logits_soft_cap,
            "implementation": self.implementation,
        }
        if self.decode and (self.has_variable("cache", "cached_key") or not self.is_initializing()):
            out = self._decode(query, key, value, options)
        else:
            if self.decode:  # `init`: the lengths of these inputs are those of the cache
                self._cache(key, value)
            out = attend(query, key, value, self.mask, **options)
        return nn.DenseGeneral(self.out_features or features, axis=(-2, -1), name="out", **common)(out)

    def _cache(self, key: jax.Array, value: jax.Array) -> tuple[Any, Any, Any]:
        return (
            self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype),
            self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype),
            self.variable("cache", "cache_index", empty_index, key.shape),
        )

    def _decode(self, query: jax.Array, key: jax.Array, value: jax.Array, options: dict[str, Any]) -> jax.Array:
        if not self.has_variable("cache", "cached_key"):
            raise ValueError(
                "decode=True needs the collection 'cache', and none was given; make it by init(rng, inputs) with "
                "inputs of the greatest length, and pass it: apply({**params, 'cache': cache}, x, mutable=['cache'])"
            )
        variables = self._cache(key, value)
        cache = Cache(*(variable.value for variable in variables))
        out, cache = attend_cached(query, key, value, cache, self.mask, dtype=self.dtype, **options)
        for variable, array in zip(variables, cache, strict=True):
            variable.value = array
        return out
