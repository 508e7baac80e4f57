"""Attention over parts of a cache, put together by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core import inputs
from jax_bsk.core.dtypes import statistics_dtype


def merge_partials(
    outs: Sequence[ArrayLike] | jax.Array, lses: Sequence[ArrayLike] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges attention of the same queries over different keys into attention over all of these keys.

    Each partial result is an output and its log-sum-exp, as `return_residual=True` returns them. The weight of an
    output is exp(lse - the log-sum-exp of all). Weights and sums are float32 (float64 where an output or a log-sum-exp
    is), and are added in the order in which the partial results are given, so the same program gives the same bits.
    A key that is in two parts counts twice, and so does a sink: give sinks to one of the calls.

    Args:
      outs: Outputs [..., H] of one shape and type, or one array with the parts in front.
      lses: Log-sum-exps [...], float32 or float64. -inf is a part without keys, whatever its output holds. Where one is
        +inf (the log-sum-exp of a sink of +inf), only such parts count. NaN makes the result NaN.

    Returns:
      The output [..., H] in the type of `outs`, 0 where no part has keys; and the log-sum-exp [...] of all parts, -inf
      there.

    Raises:
      TypeError: An array has the wrong type.
      ValueError: There are no parts, as many outputs as log-sum-exps are not given, or a shape does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import decode
      >>> outs = jnp.array([[4.0], [7.0], [8.0]])  # three partial results of one query with head size 1
      >>> out, lse = decode.merge_partials(outs, jnp.array([0.0, -jnp.inf, 0.0]))
      >>> out.tolist(), round(float(lse), 4)
      ([6.0], 0.6931)
    """
    parts = [inputs.floating(x, "outs") for x in outs]
    weights = [inputs.floating(x, "lses") for x in lses]
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"outs and lses have one array per partial result, at least one, got {len(parts)} and {len(weights)}"
        )
    shapes = {x.shape for x in parts} | {(*x.shape, *parts[0].shape[-1:]) for x in weights}
    dtypes = {x.dtype for x in parts}
    if len(shapes) > 1 or parts[0].ndim < 1 or len(dtypes) > 1:
        raise ValueError(
            "outs have one shape [..., head size] and type, and lses have that shape without the head size, got outs "
            f"{[f'{x.dtype}{list(x.shape)}' for x in parts]} and lses {[list(x.shape) for x in weights]}"
        )
    dtype = statistics_dtype(*(x.dtype for x in (*parts, *weights)))
    weights = [x.astype(dtype) for x in weights]
    greatest = weights[0]
    for lse in weights[1:]:
        greatest = jnp.maximum(greatest, lse)
    # Equal ones are told apart from the difference, which is NaN for two infinities. NaN is equal to nothing.
    shares = [jnp.exp(jnp.where(lse == greatest, 0, lse - greatest)) for lse in weights]
    empty = [jnp.isneginf(lse) for lse in weights]
    shares = [jnp.where(none, 0, share) for none, share in zip(empty, shares, strict=True)]
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    out = jnp.zeros(parts[0].shape, dtype)
    for part, share, none in zip(parts, shares, empty, strict=True):
        out = out + jnp.where(none[..., None], 0, share[..., None] * part.astype(dtype))
    safe = jnp.where(total == 0, 1, total)
    return (out / safe[..., None]).astype(parts[0].dtype), jnp.where(total == 0, -jnp.inf, greatest + jnp.log(safe))
