"""`sparsek_attention`: attention to a sliding window and to key blocks of the highest scores (arXiv 2406.16747).

The module stands above `attention` and `selection` on the path of a call: it makes scores, mask and gates, and leaves
the attention itself to `sparse_attention`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dispatch import Implementation
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import Mask
from jax_bsk.selection import sparsek
from jax_bsk.selection.choice import for_query_heads, repeat_heads
from jax_bsk.selection.inputs import query_and_key

# Unit of positions, in tokens. With it slopes are numbers near 1, which the steps of an optimizer fit.
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
    mask: Mask | None = None,
    always: Mask | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes causal attention to a window and to the key blocks of highest score (SparseK, arXiv 2406.16747).

    The score of key s does not depend on the query. It is a linear function of the token x and of the position (section
    3.1 of the paper): `u_s = w x_s + a s`. The caller computes the product with w
    (`SparseKSelfAttention` in `jax_bsk.flax` is the whole layer); a is the `slope`. Scores that rise with the position
    let new keys replace old ones without ever greater products. By these scores `jax_bsk.selection.sparsek` selects
    `top_k` key blocks before the window of each query block, and gives each selected block a gate:

        o_t = sum of P_ts v_s over the window + sum of g_is P_ts v_s over the selected keys

    P is the softmax over both sets together, and g_is the gate of key s's block for query block i. In the forward pass
    gates are 1 ("straight-through") or SparseK's soft numbers ("soft"); either way their gradient trains the scores.
    Cost grows linearly with the length, except for one comparison of all pairs of key blocks, (length / 128)^2 per
    head; `candidates` bounds that as well.

    There are three differences from the paper. In the paper each query selects keys; here each block of queries selects
    blocks of keys by the mean of their scores. Gates multiply after the softmax, so a key with a small gate still has
    its share of the denominator. The slope is a factor that may be learned.

    Dimensions: B batch size, T query length, S key/value length, N query heads, K key/value heads (K divides N),
    H head size.

    Args:
      query: BTNH or TNH array of a type that `sparse_attention` takes; query t stands at position t.
      key: BSKH or SKH array of query's type.
      value: BSKH or SKH array of query's type; its head size may differ from key's.
      scores: Floating array of one score per key and head: [B, S, K] ([S, K]) makes one selection per key/value head,
        [B, S, N] one per query head, [B, S, 1] one for all heads. A block with a score of -inf is never selected.
      slope: Increase of the score per 1,024 tokens: a floating number, or one per head of scores. None is 0.
      top_k: Number of selected key blocks of each query block, as in `jax_bsk.selection.sparsek`.
      window: Number of tokens of the sliding window, as in `jax_bsk.selection.sparsek`.
      gate: Kind of gate in the forward pass: "straight-through" or "soft".
      candidates: Number of key blocks of highest score that thresholds are computed from, at least top_k, as in
        `jax_bsk.selection.sparsek`. None takes all blocks.
      block_size: Block size of the mask: a number, or (query, key/value).
      scale: Factor of the logits, as in `sparse_attention`.
      mask: Lazy mask of the tokens besides causality, or None: `SegmentMask(ids)` keeps to documents, whose ids may be
        traced. See `jax_bsk.selection.sparsek`.
      always: Lazy mask of the blocks that are always visited, as in `jax_bsk.selection.sparsek`.
      implementation: Implementation of the attention, as in `sparse_attention`.

    Returns:
      BTNH (TNH) array of query's type with value's head size.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax
      >>> from jax_bsk import sparsek_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 16))
      >>> scores = jax.random.normal(jax.random.key(1), (1, 256, 2))
      >>> options = dict(top_k=2, window=64, block_size=32, implementation="cpu")
      >>> sparsek_attention(q, k, v, scores, **options).shape
      (1, 256, 2, 16)
      >>> gradient = jax.grad(lambda scores: sparsek_attention(q, k, v, scores, **options).sum())(scores)
      >>> bool((gradient != 0).any())
      True
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

    chosen, gates = sparsek(
        _with_slope(u, slope),
        top_k=top_k,
        window=window,
        gate=gate,
        candidates=candidates,
        q_len=q.shape[1],
        block_size=block_size,
        mask=mask,
        always=always,
    )
    if gates.shape[1] == kv_heads and kv_heads not in (1, heads):
        (gates,) = repeat_heads([gates], heads // kv_heads)
    out = sparse_attention(
        q,
        k,
        v,
        mask=for_query_heads(chosen, heads),
        gates=gates.astype(statistics_dtype(q.dtype)),
        scale=scale,
        implementation=implementation,
    )
    return out[0] if unbatched else out


def _with_slope(scores: jax.Array, slope: ArrayLike | None) -> jax.Array:
    """Returns the scores [B, S, G] with the slope added, in float32 (float64 for float64)."""
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
