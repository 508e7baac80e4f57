"""What the Linen and the NNX module of native sparse attention share; needs nothing of Flax itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.flax._attention_fn import promote


def attend_gated(
    attention_fn: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate_logits: jax.Array,
    dtype: Any = None,
) -> jax.Array:
    """Native sparse attention over any leading dimensions, with gates that are sigmoids.

    Args:
      attention_fn: `jax_bsk.nsa_attention`, or a partial of it.
      query: [*batch, T, N, H].
      key, value: [*batch, T, K, H].
      gate_logits: [*batch, T, 3 N], a head's three side by side.
      dtype: of the computation, or None for what query, key and value promote to.

    Returns:
      [*batch, T, N, H].
    """
    query, key, value = promote(query, key, value, dtype)
    gates = jax.nn.sigmoid(gate_logits.astype(jnp.promote_types(gate_logits.dtype, jnp.float32)))
    gates = gates.reshape(*query.shape[:-1], 3)
    batch = query.shape[:-3]
    out = attention_fn(*(x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value, gates)))
    return out.reshape(*batch, *out.shape[-3:])
