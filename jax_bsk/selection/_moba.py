"""MoBA: mixture of block attention (arXiv 2502.13189), as a selection."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask, CausalMask, Mask
from jax_bsk.selection.candidates import candidates_of, restricted
from jax_bsk.selection.choice import choose_top_k, for_query_heads
from jax_bsk.selection.inputs import block_means, grouped, positive, query_and_key


def moba(
    query: ArrayLike,
    key: ArrayLike,
    *,
    top_k: int = 3,
    moba_block: int = 512,
    block_size: int | tuple[int, int] = 128,
    is_causal: bool = True,
    share_group: bool = False,
    mask: Mask | None = None,
    always: Mask | None = None,
) -> BlockMask:
    """Blocks of keys whose mean is nearest to the queries: MoBA (Lu et al., arXiv 2502.13189).

    The score of a block is the product of the query and the mean of the block's keys (equation 6); the `top_k` blocks
    of highest score are attended to (equation 5). The query's own block is always one of them, and blocks after it
    never are. Defaults are those of the paper's scaling experiments: blocks of 512 keys, top-3 (for contexts of a
    million tokens it has blocks of 4,096 and top-12).

    Differs from the paper: there each query chooses, here each block of queries does, by the mean of its queries'
    scores (the product with their mean). `block_size[0]` queries share a list, so smaller query blocks are nearer to
    the paper.

    Args:
      query: BTNH or TNH, floating; query t stands at position t.
      key: BSKH or SKH, of query's type, K dividing N.
      top_k: blocks of `moba_block` keys, the own one included, at least 1.
      moba_block: keys that are chosen together, a multiple of the key block; the last may be shorter.
      block_size: block size of the lists, as in `BlockMask.from_mask`.
      is_causal: keys after the query are masked; without it any block may be chosen, the own one always is.
      share_group: whether to make one list for the query heads of a key/value head, by the sum of their scores (one
        list in all where there is one key/value head); else one list per query head.
      mask: lazy mask that restricts the choice, or None: blocks that it leaves empty are never chosen, and the elements
        of the others are masked by it, besides causality. It may hold traced arrays (`SegmentMask(ids)` of documents)
        and differ per example and list.
      always: lazy mask, or None: blocks that it visits are always chosen, where `mask` leaves them open.
        `LocalMask((512, 0)) | GlobalMask(4)` is a window and the first tokens as sinks. They are visited as whole
        MoBA blocks, count among the `top_k`, and where they are more, all of them are taken.

    Returns:
      A `BlockMask` [B, N] ([B, 1] where all heads share), without gradient.

    Raises:
      TypeError, ValueError: an argument does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk.selection import moba
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 8))
      >>> moba(q, k, top_k=2, moba_block=64, block_size=64).row_offsets[0, 0].tolist()
      [0, 1, 3, 5, 7]
    """
    q, k = query_and_key(query, key)
    top_k = positive(top_k, "top_k")
    batch, heads = q.shape[0], k.shape[2] if share_group else q.shape[2]
    allowed = restricted(CausalMask() if is_causal else None, mask)
    known = candidates_of(allowed, q.shape[1], k.shape[1], block_size, moba_block, batch=batch, heads=heads)
    centers = grouped(block_means(q, known.block_q), k.shape[2])
    means = block_means(k, known.group * known.block_kv)
    if share_group:
        scores = jnp.einsum("biknh,bjkh->bkij", centers, means, preferred_element_type=statistics_dtype(q.dtype))
    else:
        scores = jnp.einsum("biknh,bjkh->bknij", centers, means, preferred_element_type=statistics_dtype(q.dtype))
        scores = scores.reshape(q.shape[0], q.shape[2], *scores.shape[3:])
    required = known.required_groups(known.own_groups(), always, batch, heads)
    return for_query_heads(choose_top_k(scores, top_k, required, known), q.shape[2])
