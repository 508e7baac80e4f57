"""Sparse self-attention as a Flax NNX module; the module also exports the other ready layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init
from jax.typing import DTypeLike

from jax_bsk.core.dispatch import Implementation
from jax_bsk.flax._attention_fn import attend, default_head_dim, promote
from jax_bsk.flax._cache import Cache, attend_cached
from jax_bsk.flax._nnx_dense import BlockSparseDense as BlockSparseDense
from jax_bsk.flax._nnx_nsa import NSASelfAttention as NSASelfAttention
from jax_bsk.flax._nnx_sparsek import SparseKSelfAttention as SparseKSelfAttention
from jax_bsk.masks import BlockMask, Mask


class SparseSelfAttention(nnx.Module):
    """Multi-head self-attention that computes only the blocks its mask visits.

    The parameters have the names and shapes of `flax.nnx.MultiHeadAttention` (query, key, value, out), with `sinks`
    where asked for.

    Args:
      num_heads: Number of query heads.
      in_features: Size of the input.
      mask: Mask of every call; a lazy mask is bound to the length of each input. None lets all tokens attend to all.
      num_kv_heads: Number of key/value heads, which divides num_heads (grouped-query attention); default num_heads.
      head_dim: Size of a head; the default is in_features / num_heads.
      out_features: Size of the output; the default is in_features.
      sinks: Whether each head learns a logit, 0 at first, that joins the denominator of its softmax.
      scale: Factor of the logits, as in `jax_bsk.sparse_attention`.
      logits_soft_cap: Bound of the logits, as in `jax_bsk.sparse_attention`.
      implementation: Implementation, as in `jax_bsk.sparse_attention`.
      decode: Whether calls append their tokens to a cache, which `init_cache` makes, and attend to all tokens of it, as
        with Flax's layers. A call may have one token or several, and the masks, which must be lazy, are bound to their
        positions. No token attends to a later one, whatever the mask. An example whose tokens pass the
        cache's end yields NaN.
      use_bias: Whether the projections add a bias.
      dtype: Type of the computation; the default is what inputs and parameters promote to. Softmax and sums are
        float32.
      param_dtype: Type of the parameters.
      kernel_init: Initializer of the kernels of the projections.
      bias_init: Initializer of the biases of the projections.
      rngs: Random streams for the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_bsk.flax
      >>> from jax_bsk.masks import CausalMask
      >>> layer = jax_bsk.flax.nnx.SparseSelfAttention(2, 32, CausalMask(), implementation="cpu", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 64, 32))).shape
      (1, 64, 32)
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
        decode: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = lecun_normal(),  # noqa: B008  (initializers are pure functions)
        bias_init: Callable[..., Any] = zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
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
        self.decode = decode
        self.query = linear(in_features, (num_heads, head_dim))
        self.key = linear(in_features, (kv_heads, head_dim))
        self.value = linear(in_features, (kv_heads, head_dim))
        self.out = linear((num_heads, head_dim), out_features or in_features, axis=(-2, -1))
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype)) if sinks else nnx.data(None)
        # The mask is held by functions. As an attribute, its arrays would join the module's state, which jit traces
        # and checkpoints save; and a mask with known values is cheaper.
        options = {
            "mask": mask,
            "scale": scale,
            "logits_soft_cap": logits_soft_cap,
            "implementation": implementation,
        }
        self._attend = functools.partial(attend, **options)
        self._attend_cached = functools.partial(attend_cached, dtype=dtype, **options)
        self.cached_key: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[jax.Array] | None = nnx.data(None)

    def init_cache(self, input_shape: tuple[int, ...], dtype: DTypeLike | None = None) -> None:
        """Makes an empty cache for decoding, or empties the one there is.

        The cache is in the variables cached_key and cached_value [*batch, max_length, num_kv_heads, head_dim], and
        cache_index, the number of tokens of each example so far, int32 [*batch].

        Args:
          input_shape: (*batch, max_length, in_features).
          dtype: Type of the cached keys and values; the default is the layer's `dtype`, or that of its parameters.
        """
        if dtype is None:
            dtype = self.key.param_dtype if self.dtype is None else self.dtype
        kinds = (jax.ShapeDtypeStruct((*input_shape[:-1], *x.out_features), dtype) for x in (self.key, self.value))
        self.cached_key, self.cached_value, self.cache_index = map(nnx.Cache, Cache.empty(*kinds))

    def __call__(
        self,
        inputs: jax.Array,
        mask: Mask | BlockMask | jax.Array | None = None,
        *,
        lengths: jax.Array | None = None,
        decode: bool | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: Array [*batch, length, in_features].
          mask: Mask of this call, which is combined with the module's by `&`: a lazy mask (traced segment ids, say), or
            an array that broadcasts to [*batch, heads, length, length]; with a cache the last length is the cache's.
          lengths: Integers [*batch], the number of tokens of each example in this call. Tokens beyond it take no part
            in attention and are not cached, and their output is the bias of the projection alone.
          decode: Whether this call uses the cache; the default is the layer's `decode`.

        Returns:
          Array [*batch, length, out_features].
        """
        query, key, value = promote(self.query(inputs), self.key(inputs), self.value(inputs), self.dtype)
        sinks = None if self.sinks is None else self.sinks[...]
        options = {"call_mask": mask, "lengths": lengths, "sinks": sinks}
        if not (self.decode if decode is None else decode):
            return self.out(self._attend(query, key, value, **options))
        variables = self._cache_variables()
        if any(variable is None for variable in variables):
            raise ValueError(
                "decode=True needs a cache, and there is none; call init_cache((*batch, length, features))"
            )
        cache = Cache(*(variable[...] for variable in variables))
        out, cache = self._attend_cached(query, key, value, cache, **options)
        for variable, array in zip(variables, cache, strict=True):
            variable[...] = array
        return self.out(out)

    def _cache_variables(self) -> tuple[Any, Any, Any]:
        return self.cached_key, self.cached_value, self.cache_index
