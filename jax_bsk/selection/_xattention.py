"""XAttention: antidiagonal scoring of blocks (arXiv 2503.16428)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.scalars import logits_scale
from jax_bsk.masks import BlockMask, CausalMask, Mask
from jax_bsk.masks.builders.elements import elements
from jax_bsk.selection.candidates import Candidates, candidates_of, checked, restricted
from jax_bsk.selection.choice import choose_by_mass, for_query_heads
from jax_bsk.selection.inputs import by_query_block, grouped, positive, query_and_key


def xattention(
    query: ArrayLike,
    key: ArrayLike,
    *,
    stride: int = 8,
    threshold: ArrayLike = 0.9,
    initial_blocks: int = 1,
    block_size: int | tuple[int, int] = 128,
    is_causal: bool = True,
    share_group: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
    always: Mask | None = None,
) -> BlockMask:
    """The fewest blocks with `threshold` of the attention, by antidiagonals: XAttention (Xu et al., arXiv 2503.16428).

    The logits are cut into cells of stride x stride; a cell's logit is the sum of the logits on its antidiagonal, over
    the stride, which is one product of vectors of stride * H numbers. A softmax over the cells of each row estimates
    the attention, its sums over the cells of a block are the block's weight. For each query block the heaviest key
    blocks are taken until they have `threshold` of the row's weight. If causal, the own block and the `initial_blocks`
    first ones are always taken, and their weight counts first, as in the authors' code. Defaults: stride 8 (the paper
    has 8 and 16) and the authors' code's 0.9; the paper also tunes a threshold for each head.

    The paper chooses by blocks of queries, too. What differs: keys past the end of a length that is no multiple of the
    stride count as zeros in the last cell, query heads of a group may share a list, and there is no cap on the blocks.
    Cells on the diagonal are summed whole, keys after the query included, as in the authors' code.

    Args:
      query: BTNH or TNH, floating; query t stands at position t.
      key: BSKH or SKH, of query's type, K dividing N.
      stride: S, dividing both block sizes.
      threshold: a number or an array [N] ([K] with share_group) in [0, 1], may be traced: 1 takes every block with
        weight (up to rounding), 0 the required ones alone.
      initial_blocks: key blocks that are always chosen if causal, 0 or more.
      block_size: block size of the lists, as in `BlockMask.from_mask`.
      is_causal: keys after the query are masked. Without it no block is required.
      share_group: whether to make one list for the query heads of a key/value head, by the sum of their weights; else
        one list per query head.
      scale: factor of the logits, 1 / sqrt(H) by default.
      mask: lazy mask that restricts the choice, or None: blocks that it leaves empty are never chosen, and the elements
        of the others are masked by it, besides causality. It may hold traced arrays (`SegmentMask(ids)` of documents)
        and differ per example and list.
      always: lazy mask, or None: blocks that it visits are always chosen, where `mask` leaves them open.
        `LocalMask((512, 0)) | GlobalMask(4)` is a window and the first tokens as sinks. They are visited as whole
        blocks, and their weight counts first, too. A cell counts for a row where the cell's first query attends to its
        first key, or its last query to its last key.

    Returns:
      A `BlockMask` [B, N] ([B, 1] where all heads share), without gradient, with room for every block that causality
      leaves open: the lists cannot overflow.

    Raises:
      TypeError, ValueError: an argument does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk.selection import xattention
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 8))
      >>> xattention(q, k, threshold=1.0, block_size=64).row_offsets[0, 0].tolist()
      [0, 1, 3, 6, 10]
    """
    q, k = query_and_key(query, key)
    stride = positive(stride, "stride")
    batch, heads = q.shape[0], k.shape[2] if share_group else q.shape[2]
    allowed = restricted(CausalMask() if is_causal else None, mask)
    known = candidates_of(allowed, q.shape[1], k.shape[1], block_size, batch=batch, heads=heads)
    if known.block_q % stride or known.block_kv % stride:
        raise ValueError(
            f"stride divides the block sizes {known.block_q} and {known.block_kv}, got {stride}; choose a divisor"
        )
    if initial_blocks < 0:
        raise ValueError(f"initial_blocks is 0 or more, got {initial_blocks}; 0 requires none")
    fraction = _fraction(threshold, heads, statistics_dtype(q.dtype))
    inside = None if mask is None else checked(mask, "mask", batch, heads)
    weights = _weights(q, k, known, stride, is_causal, logits_scale(scale, q.shape[3]), inside)
    if share_group:
        weights = weights.reshape(weights.shape[0], heads, q.shape[2] // heads, *weights.shape[2:]).sum(2)
    required = known.own_groups()
    required = required | (np.arange(required.shape[1]) < initial_blocks) if is_causal else np.zeros_like(required)
    needed = known.required_groups(required, always, batch, heads)
    return for_query_heads(choose_by_mass(weights, fraction, needed.groups, known), q.shape[2])


def _fraction(threshold: ArrayLike, heads: int, dtype: jnp.dtype) -> jax.Array:
    """The threshold as [] or [heads, 1, 1]."""
    if not isinstance(threshold, Tracer | jax.Array):
        host = np.asarray(threshold)
        if host.dtype.kind not in "iuf" or not ((host >= 0) & (host <= 1)).all():
            raise ValueError(f"threshold is a number in [0, 1], or one per head, got {threshold!r}")
        threshold = host
    array = jax.lax.stop_gradient(jnp.asarray(threshold).astype(dtype))
    if array.shape not in ((), (heads,)):
        raise ValueError(f"threshold is a number or one per head, shape ({heads},), got shape {array.shape}")
    return array.reshape(-1, 1, 1) if array.ndim else array


def _weights(
    query: jax.Array,
    key: jax.Array,
    known: Candidates,
    stride: int,
    is_causal: bool,
    scale: float,
    mask: Mask | None,
) -> jax.Array:
    """[B, N, nq, nk]: estimated attention of each block."""
    (batch, q_len, heads, size), (_, kv_len, kv_heads, _) = query.shape, key.shape
    nq, nk = known.tiles.shape[-2:]
    rows, columns = known.block_q // stride, known.block_kv // stride
    inside = statistics_dtype(query.dtype)
    if 0 in (nq, nk):
        return jnp.zeros((batch, heads, nq, nk), inside)
    # ---- cells: keys of a cell in order, queries against it, so that their product is the antidiagonal ----
    keys = jnp.pad(key, [(0, 0), (0, nk * known.block_kv - kv_len), (0, 0), (0, 0)])
    keys = keys.reshape(batch, nk * columns, stride, kv_heads, size)
    queries = jnp.pad(grouped(query, kv_heads), [(0, 0), (0, nq * known.block_q - q_len), (0, 0), (0, 0), (0, 0)])
    queries = queries.reshape(batch, nq, rows, stride, kv_heads, heads // kv_heads, size)[:, :, :, ::-1]
    cell = np.arange(nk * columns, dtype=np.int32)[None]
    there = cell * stride < kv_len
    first_key, last_key = cell[0] * stride, np.minimum((cell[0] + 1) * stride, kv_len) - 1

    def row(i: jax.Array, queries: jax.Array) -> jax.Array:
        at = i * rows + jnp.arange(rows, dtype=jnp.int32)
        seen = of_rank(there & (cell <= at[:, None]) if is_causal else there, 5)
        if mask is not None:
            last = jnp.minimum((at + 1) * stride, q_len) - 1
            ends = elements(mask, known.grid, at * stride, first_key) | elements(mask, known.grid, last, last_key)
            # Of each query head [B|1, K, N / K, ...], of each key/value head where the group shares a list, or of all.
            groups = (kv_heads, -1) if ends.shape[1] == heads else (ends.shape[1], 1)
            seen = seen & ends.reshape(ends.shape[0], *groups, *ends.shape[2:])
        logits = jnp.einsum("brsknh,bcskh->bknrc", queries, keys, preferred_element_type=inside) * (scale / stride)
        highest = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(logits - jnp.where(highest > -jnp.inf, highest, 0)), 0)
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
        weights = jnp.where(of_rank((at * stride < q_len)[:, None], 5), weights, 0)
        blocks = weights.sum(3).reshape(*weights.shape[:3], nk, columns).sum(-1)
        return blocks.reshape(batch, heads, nk)

    return by_query_block(row, queries, batch * heads * rows * cell.size)
