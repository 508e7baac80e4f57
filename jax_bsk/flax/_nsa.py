"""Common parts of the Linen and the NNX layer of native sparse attention, which need nothing of Flax itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_bsk.flax._attention_fn import promote
from jax_bsk.masks import Mask


def attend_gated(
    attention_fn: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate_logits: jax.Array,
    dtype: DTypeLike | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """Computes native sparse attention over any leading dimensions, with gates that are sigmoids.

    Args:
      attention_fn: Function `jax_bsk.nsa_attention`, or a partial of it.
      query: Array [*batch, T, N, H].
      key: Array [*batch, T, K, H].
      value: Array [*batch, T, K, H].
      gate_logits: Array [*batch, T, 3 N]; the three logits of a head are side by side.
      dtype: Type of the computation; None is what query, key and value promote to.
      mask: Lazy mask of the tokens, given to the function where it is not None.

    Returns:
      Array [*batch, T, N, H].
    """
    query, key, value = promote(query, key, value, dtype)
    gates = jax.nn.sigmoid(gate_logits.astype(jnp.promote_types(gate_logits.dtype, jnp.float32)))
    gates = gates.reshape(*query.shape[:-1], 3)
    batch = query.shape[:-3]
    options = {} if mask is None else {"mask": mask}
    flat = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value, gates))
    out = attention_fn(*flat, **options)
    return out.reshape(*batch, *out.shape[-3:])
