"""The plainest selection: the k best of given block scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask, Mask
from jax_bsk.selection.candidates import candidates_of
from jax_bsk.selection.choice import choose_top_k
from jax_bsk.selection.inputs import positive


def from_topk(
    scores: ArrayLike,
    k: int,
    *,
    q_len: int,
    kv_len: int | None = None,
    block_size: int | tuple[int, int] = 128,
    mask: Mask | None = None,
    own_block: bool = False,
    always: Mask | None = None,
) -> BlockMask:
    """The k key blocks of highest score for each query block, in lists made on the device.

    Does what `BlockMask.from_topk` does for traced scores with less: a native call makes the lists (sorts of rows where
    there is none, and of float64 scores), and the bit tiles of a `mask` that is known and shared are made on the host
    (one for a causal mask).

    Args:
      scores: [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk], real, for the blocks of q_len queries and kv_len keys. Of
        equal scores the lower block is taken. Blocks of score -inf or NaN are never chosen. Not differentiated.
      k: number of blocks per row, static, at least 1; rows with fewer blocks to choose from have those.
      q_len, kv_len, block_size: as in `BlockMask.from_mask`.
      mask: lazy mask of the elements: blocks it leaves empty are never chosen, chosen ones are masked by it. With
        `CausalMask()`: the best blocks at or before the query block's own. It may hold traced arrays and differ per
        example and head; `CausalMask() & SegmentMask(ids)` chooses within documents.
      own_block: always take the blocks with the keys at the positions of the row's queries (the diagonal), whatever
        their score. They count among the k, and where they are more than k, all are taken.
      always: lazy mask whose blocks are always chosen, where `mask` leaves them open, and counted likewise:
        `LocalMask((512, 0)) | GlobalMask(4)` is a window and the first tokens as sinks. They are visited as whole
        blocks.

    Returns:
      A `BlockMask` with the leading dimensions of the scores and the masks, and room for k blocks per row (for all that
      `mask` may leave open where `always` is traced): the lists cannot overflow.

    Raises:
      TypeError, ValueError: a shape, type or size does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk.masks import CausalMask
      >>> from jax_bsk.selection import from_topk
      >>> scores = jnp.array([[0.0, 9.0, 0.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
      >>> from_topk(scores, 1, q_len=96, block_size=32, mask=CausalMask()).kv_blocks.tolist()
      [[[0, 0, 1]]]
    """
    array = jnp.asarray(scores)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"scores are real numbers, got {array.dtype}{array.shape}; cast them, e.g. to float32")
    k = positive(k, "k")
    lead = (1, 1, *array.shape[:-2])[-2:]  # scores shared by examples or heads take the masks' number of them
    batch, heads = (None if n == 1 else n for n in lead)
    known = candidates_of(mask, q_len, kv_len, block_size, batch=batch, heads=heads)
    if array.ndim not in (2, 3, 4) or array.shape[-2:] != known.tiles.shape[-2:]:
        nq, nk = known.tiles.shape[-2:]
        raise ValueError(
            f"scores are [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk] with (nq, nk) = ({nq}, {nk}), got {array.shape}"
            "; score each pair of blocks"
        )
    array = jax.lax.stop_gradient(array.reshape((1,) * (4 - array.ndim) + array.shape))
    array = array.astype(statistics_dtype(array.dtype))
    required = known.required_groups(known.own_groups() if own_block else None, always, batch, heads)
    return choose_top_k(array, k, required, known)
