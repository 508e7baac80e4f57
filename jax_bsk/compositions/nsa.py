"""`nsa_attention`: native sparse attention, the gated sum of three calls of `sparse_attention`.

The module stands above `attention` and `selection` on the path of a call: it makes keys and masks, and leaves the
attention itself to `sparse_attention`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core.arrays import Array
from jax_bsk.core.dispatch import Implementation
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import LocalMask, Mask
from jax_bsk.masks.algebra.ordered import keys_at
from jax_bsk.masks.grid import OWN, Grid
from jax_bsk.selection import nsa
from jax_bsk.selection.inputs import compress, positive


def nsa_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    gates: ArrayLike,
    *,
    compressed_key: ArrayLike | None = None,
    compressed_value: ArrayLike | None = None,
    window: int = 512,
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
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes causal attention of three branches: native sparse attention, NSA (arXiv 2502.11089, equation 5).

        o_t = g_t[0] compressed_t + g_t[1] selected_t + g_t[2] window_t

    - Compressed: key and value i stand for the tokens [i d, i d + l), where l is the `compression_block` and d the
      `compression_stride`. A query attends to those that end at or before it; where there is none, the branch is 0.
    - Selected: the query attends to the tokens of the blocks that `jax_bsk.selection.nsa` selects by attention over the
      same compressed keys.
    - Window: the query attends to the last `window` tokens, its own included.

    The defaults are the paper's (section 4.1): l = 32, d = 16, 16 selected blocks of 64 with 1 initial and 2 local
    ones, and a window of 512. No array of size T x S is made.

    There are three differences from the paper. In the paper each query selects blocks; here each block of queries does
    (see `jax_bsk.selection.nsa`). In the paper a learned function compresses; here the mean does, unless its results
    are given. In the paper each branch has keys and values of its own; here all branches share `key` and `value`,
    except for compressed ones that are given. The attention over compressed keys is computed twice: as output, and
    (without gradient) as the importance of blocks.

    Dimensions: B batch size, T query length, S key/value length, N query heads, K key/value heads (K divides N),
    H head size.

    Args:
      query: BTNH or TNH array of a type that `sparse_attention` takes; query t stands at position t.
      key: BSKH or SKH array of query's type.
      value: BSKH or SKH array of query's type; its head size may differ from key's.
      gates: BTN3 (TN3) floating factors of the compressed, the selected and the window branch, in that order. The
        paper's are sigmoids of a function of the token.
      compressed_key: Floating array [B, C, K, H] ([C, K, H]) with C = (S - l) // d + 1 (0 where S < l), which is
        rounded to query's type. None takes means. Its gradient comes from the compressed branch alone.
      compressed_value: Floating array [B, C, K, Hv] ([C, K, Hv]) with value's head size Hv. None takes means.
      window: Number of tokens of the window, at least 1.
      top_k: Number of selected blocks of each query block, initial and local ones included, at least 1.
      compression_block: Number l of tokens that one compressed key stands for.
      compression_stride: Number d of tokens between the beginnings of two compressed keys.
      selection_block: Number of tokens in a selected block.
      initial_blocks: Number of first blocks that are always selected.
      local_blocks: Number of blocks up to the query's own that are always selected.
      block_size: Block size of the selected branch's mask, as in `BlockMask.from_mask`. The other branches have
        `sparse_attention`'s default.
      scale: Factor of the logits; the default is 1 / sqrt(H).
      mask: Lazy mask of the tokens besides causality, or None, for all three branches: `SegmentMask(ids)` keeps to
        documents, whose ids may be traced. A query attends to the compressed keys whose first and last token it attends
        to. It may differ per example.
      always: Lazy mask of the blocks that are always selected, as in `jax_bsk.selection.nsa`.
      implementation: Implementation of all three calls, as in `sparse_attention`.

    Returns:
      BTNH (TNH) array of query's type with value's head size. The gated sum is computed in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import nsa_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 2, 16))
      >>> gates = jnp.full((1, 128, 2, 3), 1 / 3)
      >>> nsa_attention(q, k, v, gates, window=32, top_k=4, implementation="cpu").shape
      (1, 128, 2, 16)
    """
    q, k, v, g = (jnp.asarray(x) for x in (query, key, value, gates))
    unbatched = q.ndim == 3
    if unbatched:
        q, k, v, g = q[None], k[None], v[None], g[None]
    length = positive(compression_block, "compression_block")
    stride = positive(compression_stride, "compression_stride")
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}

    # First, as it checks query, key and value.
    near = LocalMask((positive(window, "window") - 1, 0))
    windowed = sparse_attention(q, k, v, mask=near if mask is None else near & mask, **options)
    if g.shape != (*q.shape[:3], 3) or not jnp.issubdtype(g.dtype, jnp.floating):
        raise ValueError(f"gates are floating-point numbers of shape {(*q.shape[:3], 3)}, got {g.dtype}{g.shape}")

    keys = compress(k, length, stride, compressed_key, "compressed_key")
    values = compress(v, length, stride, compressed_value, "compressed_value")
    chosen = nsa(
        q,
        k,
        compressed_key=keys,
        top_k=top_k,
        compression_block=length,
        compression_stride=stride,
        selection_block=selection_block,
        initial_blocks=initial_blocks,
        local_blocks=local_blocks,
        block_size=block_size,
        scale=scale,
        mask=mask,
        always=always,
    )
    selected = sparse_attention(q, k, v, mask=chosen, **options)
    ended: Mask = CompressedMask(length, stride)
    if mask is not None:
        first = np.arange(keys.shape[1], dtype=np.int32) * stride
        ended = ended & keys_at(mask, first, k.shape[1]) & keys_at(mask, first + (length - 1), k.shape[1])
    compressed = sparse_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=ended, **options)

    inside = statistics_dtype(q.dtype)
    branches = (compressed, selected, windowed)
    out = sum(
        (g[..., n, None].astype(inside) * branch.astype(inside) for n, branch in enumerate(branches)),
        jnp.zeros((), inside),
    ).astype(q.dtype)
    return out[0] if unbatched else out


class CompressedMask(Mask):
    """Lets query q attend to key k where the tokens [k stride, k stride + length) of that key end at or before q.

    Attributes:
      length: Number of tokens that one key stands for.
      stride: Number of tokens between the beginnings of two keys.
    """

    length: int
    stride: int

    def __init__(self, length: int, stride: int) -> None:
        self._set(length=length, stride=stride)

    def _end(self, k: Any) -> Any:
        """Returns the last token of key k."""
        return k * self.stride + (self.length - 1)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        q_low, q_high = grid.q_bounds(i)
        k_low, k_high = grid.kv_bounds(j)
        return grid.code(q_high < self._end(k_low), q_low >= self._end(k_high), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return q >= self._end(k)
