"""Common parts of the Linen and the NNX layer of SparseK attention, which need nothing of Flax itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_bsk.flax._attention_fn import promote
from jax_bsk.masks import Mask


def score_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> np.dtype:
    """Returns the type of scores, which decide a selection: float32 or wider, whatever the layer computes in."""
    return jnp.promote_types(param_dtype if dtype is None else dtype, jnp.float32)


def attend_scored(
    attention_fn: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scores: jax.Array,
    slope: jax.Array,
    dtype: DTypeLike | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """Computes SparseK attention over any leading dimensions.

    Args:
      attention_fn: Function `jax_bsk.sparsek_attention`, or a partial of it.
      query: Array [*batch, T, N, H].
      key: Array [*batch, T, K, H].
      value: Array [*batch, T, K, H].
      scores: Array [*batch, T, G] of the scores of the keys, without the slope.
      slope: Array [G].
      dtype: Type of the computation; None is what query, key and value promote to.
      mask: Lazy mask of the tokens, given to the function where it is not None.

    Returns:
      Array [*batch, T, N, H].
    """
    query, key, value = promote(query, key, value, dtype)
    batch = query.shape[:-3]
    flat = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    scores = scores.reshape(math.prod(batch), *scores.shape[-2:])
    options = {} if mask is None else {"mask": mask}
    out = attention_fn(*flat, scores, slope=slope.astype(scores.dtype), **options)
    return out.reshape(*batch, *out.shape[-3:])
