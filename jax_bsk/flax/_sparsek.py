"""What the Linen and the NNX module of SparseK attention share; needs nothing of Flax itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.flax._attention_fn import promote


def score_dtype(dtype: Any, param_dtype: Any) -> Any:
    """Scores decide what is chosen: float32 at least, whatever the rest of the layer computes in."""
    return jnp.promote_types(param_dtype if dtype is None else dtype, jnp.float32)


def attend_scored(
    attention_fn: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scores: jax.Array,
    slope: jax.Array,
    dtype: Any = None,
) -> jax.Array:
    """SparseK attention over any leading dimensions.

    Args:
      attention_fn: `jax_bsk.sparsek_attention`, or a partial of it.
      query: [*batch, T, N, H].
      key, value: [*batch, T, K, H].
      scores: [*batch, T, G], of each key, without slope.
      slope: [G].
      dtype: of the computation, or None for what query, key and value promote to.

    Returns:
      [*batch, T, N, H].
    """
    query, key, value = promote(query, key, value, dtype)
    batch = query.shape[:-3]
    flat = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    scores = scores.reshape(math.prod(batch), *scores.shape[-2:])
    out = attention_fn(*flat, scores, slope=slope.astype(scores.dtype))
    return out.reshape(*batch, *out.shape[-3:])
