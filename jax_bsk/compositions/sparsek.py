"""`sparsek_attention`: attention to a sliding window and to key blocks chosen by scores that learn (arXiv 2406.16747).

Above `attention.py` and `selection` on the path of a call: it chooses keys and gates, and computes no attention itself.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.selection import sparsek
from jax_bsk.selection.choice import for_query_heads, repeat_heads
from jax_bsk.selection.inputs import query_and_key

# Positions are counted in so many tokens: slopes are numbers near 1, and an optimizer's steps fit them.
SLOPE_TOKENS = 1024


def sparsek_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    scores: ArrayLike,
    *,
    slope: ArrayLike | None = None,
    top_k: int = 8,
    window: int = 512,
    gate: Literal["straight-through", "soft"] = "straight-through",
    candidates: int | None = None,
    block_size: int | tuple[int, int] = 128,
    scale: float | None = None,
    implementation: Literal["cpu", "cuda", "xla"] | None = None,
) -> jax.Array:
    r"""Causal attention to a window and to the key blocks of highest score: SparseK attention (Lou et al., 2406.16747).

    Each key s has an importance that no query takes part in, a linear function of its token x and of its position
    (section 3.1 of the paper): :math:`u_s = w \cdot x_s + a s`. The product with w is for the caller to make
    (`SparseKSelfAttention` in `jax_bsk.flax` is the whole layer), a is the `slope`: scores that rise with the position
    let new keys take the place of old ones without w having to make them ever greater. By these scores
    `jax_bsk.selection.sparsek` chooses `top_k` key blocks before each query block's window, and gives them gates:

    .. math:: o_t = \sum_{s \in \mathrm{window}} P_{ts} v_s + \sum_{s \in \mathrm{chosen}} g_{is} P_{ts} v_s

    P the softmax over both together, g the gate of the key's block for the query's. In the forward pass all gates are 1
    (straight-through), or SparseK's soft numbers; either way their gradient trains the scores. The cost is linear in
    the length, but for the thresholds of blocks: see `jax_bsk.selection.sparsek` and its `candidates`.

    Differs from the paper: there each query chooses among keys, here each block of queries among blocks of keys, by the
    mean of their scores. Gates multiply after the softmax, by which a key with a small gate still takes its part of the
    denominator. The slope is a factor that may be learned.

    Letters: B batch, T query length, S key/value length, N query heads, K key/value heads (K divides N), H head size.

    Args:
      query: BTNH or TNH, a type that `sparse_attention` takes; query t stands at position t.
      key: BSKH or SKH, of query's type.
      value: BSKH or SKH, of query's type; its head size may differ from key's.
      scores: [B, S, K] ([S, K]), floating: one choice for the query heads of a key/value head; or [B, S, N], one a
        query head; or [B, S, 1], one in all. A block with a score of -inf is never chosen.
      slope: what the score rises by in 1,024 tokens, a number or one a head of scores, floating; None for 0.
      top_k, window, gate, candidates, block_size: as in `jax_bsk.selection.sparsek`.
      scale, implementation: as in `sparse_attention`.

    Returns:
      BTNH (TNH) of query's type, with value's head size.

    Raises:
      TypeError, ValueError, UnsupportedError: an argument does not fit.
    """
    q, k, v, u = (jnp.asarray(x) for x in (query, key, value, scores))
    unbatched = q.ndim == 3
    if unbatched:
        q, k, v, u = q[None], k[None], v[None], u[None]
    query_and_key(q, k)  # checks them
    heads, kv_heads = q.shape[2], k.shape[2]
    if u.ndim != 3 or u.shape[:2] != k.shape[:2] or u.shape[2] not in (1, kv_heads, heads):
        expected = " or ".join(str((*k.shape[:2], n)) for n in dict.fromkeys((kv_heads, heads)))
        raise ValueError(f"scores has one number a key and key/value or query head, shape {expected}, got {u.shape}")

    mask, gates = sparsek(
        _with_slope(u, slope),
        top_k=top_k,
        window=window,
        gate=gate,
        candidates=candidates,
        q_len=q.shape[1],
        block_size=block_size,
    )
    if gates.shape[1] == kv_heads and kv_heads not in (1, heads):
        (gates,) = repeat_heads([gates], heads // kv_heads)
    out = sparse_attention(
        q,
        k,
        v,
        mask=for_query_heads(mask, heads),
        gates=gates.astype(statistics_dtype(q.dtype)),
        scale=scale,
        implementation=implementation,
    )
    return out[0] if unbatched else out


def _with_slope(scores: jax.Array, slope: ArrayLike | None) -> jax.Array:
    """[B, S, G] scores, in float32 (float64 for float64)."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores is a floating-point array, got {scores.dtype}; cast it, e.g. scores.astype('float32')")
    scores = scores.astype(statistics_dtype(scores.dtype))
    if slope is None:
        return scores
    array = jnp.asarray(slope)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.shape not in ((), scores.shape[2:]):
        raise ValueError(
            f"slope is a floating-point number or one a head of scores, shape {scores.shape[2:]}, got "
            f"{array.dtype}{array.shape}"
        )
    positions = jnp.arange(scores.shape[1], dtype=scores.dtype)[None, :, None] / SLOPE_TOKENS
    return scores + positions * of_rank(array.astype(scores.dtype), 3)
