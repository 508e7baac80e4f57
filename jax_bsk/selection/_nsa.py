"""The selection branch of NSA: native sparse attention (arXiv 2502.11089)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.scalars import logits_scale
from jax_bsk.masks import BlockMask, CausalMask, Mask
from jax_bsk.masks.builders.elements import elements
from jax_bsk.selection.candidates import Candidates, candidates_of, checked, restricted
from jax_bsk.selection.choice import choose_top_k, for_query_heads
from jax_bsk.selection.inputs import by_query_block, compress, grouped, positive, query_and_key


def nsa(
    query: ArrayLike,
    key: ArrayLike,
    *,
    compressed_key: ArrayLike | None = None,
    top_k: int = 16,
    compression_block: int = 32,
    compression_stride: int = 16,
    selection_block: int = 64,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    block_size: int | tuple[int, int] = 64,
    scale: float | None = None,
    mask: Mask | None = None,
    always: Mask | None = None,
) -> BlockMask:
    """Blocks that attention over compressed keys finds important: NSA's selection (Yuan et al., arXiv 2502.11089).

    Compressed key i stands for the keys [i d, i d + l), l the `compression_block` and d the `compression_stride`. Each
    query attends to the compressed keys that end at or before it (equation 8). A selection block's importance is the
    probability of the compressed keys that overlap it, once for each stretch of d keys they share with it (equation 9),
    summed over the query heads of the group (equation 10), which thus share a list. Chosen are the `initial_blocks`
    first blocks, the `local_blocks` up to the query's own, and the most important others, `top_k` in all. Defaults are
    the paper's: l = 32, d = 16, blocks of 64, n = 16 with 1 initial and 2 local ones.

    Differs from the paper: there each query chooses, here each block of queries does, by the sum of its queries'
    importance. The paper compresses by a learned function, trained through its compressed branch: give its result as
    `compressed_key`; without it, keys are compressed by their mean. `jax_bsk.nsa_attention` is the whole of NSA: this
    selection, the compressed and the sliding-window branch.

    Args:
      query: BTNH or TNH, floating; query t stands at position t. Causal.
      key: BSKH or SKH, of query's type, K dividing N.
      compressed_key: [B, C, K, H] ([C, K, H]) with C = (S - l) // d + 1 (0 where S < l), or None.
      top_k: number of selection blocks per row, at least 1; where the required ones are more, all of them.
      compression_block, compression_stride: l and d; d divides l.
      selection_block: keys that are chosen together, a multiple of the key block and of d.
      initial_blocks, local_blocks: selection blocks that are always chosen, 0 or more; the local ones are the own
        block of the row's last query and those before it (where the row's queries are of several, all of these too).
      block_size: block size of the lists, as in `BlockMask.from_mask`.
      scale: factor of the logits, 1 / sqrt(H) by default.
      mask: lazy mask that restricts the choice, or None: blocks that it leaves empty are never chosen, and the elements
        of the others are masked by it, besides causality. It may hold traced arrays (`SegmentMask(ids)` of documents)
        and differ per example and list.
      always: lazy mask, or None: blocks that it visits are always chosen, where `mask` leaves them open.
        `LocalMask((512, 0)) | GlobalMask(4)` is a window and the first tokens as sinks. They are visited as whole
        selection blocks, count among the `top_k`, and where they are more, all of them are taken.
        Queries attend to the compressed keys whose first and last token they attend to.

    Returns:
      A causal `BlockMask` [B, N], equal for the heads of a group ([B, 1] with one key/value head), without gradient.

    Raises:
      TypeError, ValueError: an argument does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk.selection import nsa
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 8))
      >>> nsa(q, k, top_k=3).row_offsets[0, 0].tolist()
      [0, 1, 3, 6, 9]
    """
    q, k = query_and_key(query, key)
    top_k = positive(top_k, "top_k")
    length = positive(compression_block, "compression_block")
    stride = positive(compression_stride, "compression_stride")
    batch, lists = q.shape[0], k.shape[2]
    allowed = restricted(CausalMask(), mask)
    known = candidates_of(allowed, q.shape[1], k.shape[1], block_size, selection_block, batch=batch, heads=lists)
    if length % stride or selection_block % stride:
        raise ValueError(
            f"compression_stride divides compression_block and selection_block, got {stride}, {length} and "
            f"{selection_block}; choose a divisor of both"
        )
    required = known.required_groups(_required(known, initial_blocks, local_blocks), always, batch, lists)
    inside = None if mask is None else checked(mask, "mask", batch, lists)
    compressed = jax.lax.stop_gradient(compress(k, length, stride, compressed_key, "compressed_key"))
    scores = _importance(q, compressed, known, (length, stride), logits_scale(scale, q.shape[3]), inside)
    return for_query_heads(choose_top_k(scores, top_k, required, known), q.shape[2])


def _importance(
    query: jax.Array,
    compressed: jax.Array,
    known: Candidates,
    stretch: tuple[int, int],
    scale: float,
    mask: Mask | None,
) -> jax.Array:
    """[B, K, nq, groups]: equations 8 to 10, summed over the queries of a block.

    Args:
      stretch: l and d.
      mask: mask of the tokens, besides causality.
    """
    length, stride = stretch
    batch, q_len, heads, _ = query.shape
    count, kv_heads = compressed.shape[1:3]
    nq, groups = known.open_groups.shape[-2:]
    if count == 0:
        return jnp.zeros((batch, kv_heads, nq, groups), statistics_dtype(query.dtype))
    blocks = jnp.pad(grouped(query, kv_heads), [(0, 0), (0, nq * known.block_q - q_len), (0, 0), (0, 0), (0, 0)])
    blocks = blocks.reshape(batch, nq, known.block_q, *blocks.shape[2:])
    ends = np.arange(count, dtype=np.int32)[None] * stride + length - 1
    inside = statistics_dtype(query.dtype)

    def row(i: jax.Array, queries: jax.Array) -> jax.Array:
        position = i * known.block_q + jnp.arange(known.block_q, dtype=jnp.int32)
        seen = of_rank((ends <= position[:, None]) & (position < q_len)[:, None], 5)
        if mask is not None:
            first, last = (elements(mask, known.grid, position, x) for x in (ends[0] - (length - 1), ends[0]))
            seen = seen & (first & last)[:, :, None]
        logits = jnp.einsum("btknh,bckh->bkntc", queries.astype(inside), compressed.astype(inside)) * scale
        highest = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(logits - jnp.where(highest > -jnp.inf, highest, 0)), 0)
        total = weights.sum(-1, keepdims=True)
        return (weights / jnp.where(total > 0, total, 1)).sum((2, 3))  # over the group and the queries

    probability = by_query_block(row, blocks, batch * heads * known.block_q * count)
    # Compressed key i covers the cells i .. i + l / d - 1 of d keys, a selection block l' / d cells of its own.
    parts = length // stride
    cells_each = known.group * known.block_kv // stride
    cells = sum(
        (jnp.pad(probability, [(0, 0)] * 3 + [(n, parts - 1 - n)]) for n in range(parts)),
        jnp.zeros((), probability.dtype),
    )
    cells = jnp.pad(cells, [(0, 0)] * 3 + [(0, groups * cells_each - cells.shape[-1])])
    return cells.reshape(*cells.shape[:3], groups, cells_each).sum(-1)


def _required(known: Candidates, initial: int, local: int) -> np.ndarray:
    """bool [nq, groups]: the first blocks, and those up to the own ones."""
    if initial < 0 or local < 0:
        raise ValueError(f"initial_blocks and local_blocks are 0 or more, got {initial} and {local}; 0 requires none")
    own = known.own_groups()
    groups = np.arange(own.shape[1])
    required = np.broadcast_to(groups < initial, own.shape)
    if local:
        last = np.where(own, groups, -1).max(1, initial=-1)[:, None]
        required = required | own | ((groups > last - local) & (groups <= last))
    return required
