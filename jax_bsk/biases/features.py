"""`PositionBias`: a bias of low rank, a product of features of the query's and of the key's position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.biases.base import Bias
from jax_bsk.biases.terms import Call, Terms, check_dims
from jax_bsk.core import inputs


class PositionBias(Bias):
    """A bias of low rank: query_features . key_features is added to the logits, untouched by the scale.

    Features are appended to queries and keys, so head size and features together are at most the largest head size
    that kernels take; in 16-bit types the features are rounded as queries are. Under a soft cap the two products must
    stay apart, which only "xla" does.

    Args:
      query_features: Floating [B|1, T, N|1, F] (of unbatched calls [T, N|1, F]); differentiable.
      key_features: Floating [B|1, S, N|1, F]. Features of each key/value head, [B|1, S, K, F], are taken, too.
        Features of N > K heads take N / K times as many places as F.

    Examples:
      Distances in the plane as -|p_q - p_k|^2 = 2 p_q . p_k - |p_q|^2 - |p_k|^2: features of four numbers.

      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.biases import PositionBias
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> place = jax.random.normal(jax.random.key(1), (1, 64, 1, 2))
      >>> square, one = (place**2).sum(-1, keepdims=True), jnp.ones((1, 64, 1, 1))
      >>> of_queries = jnp.concatenate([2 * place, -square, -one], -1)
      >>> of_keys = jnp.concatenate([place, one, square], -1)
      >>> sparse_attention(q, k, v, PositionBias(of_queries, of_keys), implementation="xla").shape
      (1, 64, 2, 16)
    """

    _leaves = ("query_features", "key_features")
    query_features: Any
    key_features: Any

    def __init__(self, query_features: ArrayLike, key_features: ArrayLike) -> None:
        self._set(
            query_features=inputs.floating(query_features, "query_features"),
            key_features=inputs.floating(key_features, "key_features"),
        )

    def _terms(self, call: Call) -> Terms:
        of_queries, of_keys = jnp.asarray(self.query_features), jnp.asarray(self.key_features)
        examples, features = (1, call.batch), of_queries.shape[-1]
        of_queries = check_dims(
            of_queries,
            (("B|1", examples), ("T", call.own[0]), ("N|1", (1, call.heads)), ("F", features)),
            "query_features of PositionBias",
            not call.unbatched,
        )
        of_keys = check_dims(
            of_keys,
            (("B|1", examples), ("S", call.own[1]), ("N|K|1", (1, call.kv_heads, call.heads)), ("F", features)),
            "key_features of PositionBias",
            not call.unbatched,
        )
        return Terms(query_features=of_queries.astype(call.stats), key_features=of_keys.astype(call.stats))


def features_of_heads(terms: Terms, batch: int, heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Features to be appended to queries [B, T, N, .] and to keys [B, S, K, .].

    Where each query head has key features of its own, a key has those of all heads of its group side by side, and a
    query zeros in the places of the others'.
    """
    of_queries, of_keys = terms.query_features, terms.key_features
    group, size = heads // max(kv_heads, 1), of_queries.shape[-1]
    of_queries = jnp.broadcast_to(of_queries, (batch, of_queries.shape[1], heads, size))
    if of_keys.shape[2] in (1, kv_heads):
        return of_queries, jnp.broadcast_to(of_keys, (batch, of_keys.shape[1], kv_heads, size))
    of_keys = jnp.broadcast_to(of_keys, (batch, *of_keys.shape[1:]))
    of_keys = of_keys.reshape(*of_keys.shape[:2], kv_heads, group * size)
    own = jnp.eye(group, dtype=of_queries.dtype)[None, None, None, :, :, None]
    spread = of_queries.reshape(*of_queries.shape[:2], kv_heads, group, 1, size) * own
    return spread.reshape(*of_queries.shape[:2], heads, group * size), of_keys


def appended_size(terms: Terms, heads: int, kv_heads: int) -> int:
    """How many numbers `features_of_heads` gives each query and key."""
    if terms.query_features is None:
        return 0
    size = terms.query_features.shape[-1]
    return size if terms.key_features.shape[2] in (1, kv_heads) else size * (heads // kv_heads)
