"""`nsa_attention`: native sparse attention, the gated sum of three calls of `sparse_attention`.

Above `attention.py` and `selection` on the path of a call: it chooses keys and masks, and computes no attention itself.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core.arrays import Array
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import LocalMask, Mask
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
    implementation: Literal["cpu", "cuda", "xla"] | None = None,
) -> jax.Array:
    r"""Causal attention of three branches: native sparse attention, NSA (Yuan et al., arXiv 2502.11089, equation 5).

    .. math:: o_t = g^{cmp}_t \, o^{cmp}_t + g^{slc}_t \, o^{slc}_t + g^{win}_t \, o^{win}_t

    Compressed: key and value i stand for the tokens [i d, i d + l), l the `compression_block` and d the
    `compression_stride`; a query attends to those that end at or before it, and has 0 where there is none. Selected:
    the tokens of the blocks that `jax_bsk.selection.nsa` chooses by attention over the same compressed keys. Window:
    the last `window` tokens, the query's own included. Defaults are the paper's (section 4.1): l = 32, d = 16, 16
    selected blocks of 64 with 1 initial and 2 local ones, a window of 512. Nothing of size T x S is made.

    Differs from the paper: there each query selects, here each block of queries does (see `jax_bsk.selection.nsa`).
    There a learned function compresses, here the mean does unless its results are given. There each branch has keys and
    values of its own, here all share `key` and `value`, but for what is given as compressed. The attention over
    compressed keys is computed twice, as output and (without gradient) as the importance of blocks.

    Letters: B batch, T query length, S key/value length, N query heads, K key/value heads (K divides N), H head size.

    Args:
      query: BTNH or TNH, a type that `sparse_attention` takes; query t stands at position t.
      key: BSKH or SKH, of query's type.
      value: BSKH or SKH, of query's type; its head size may differ from key's.
      gates: BTN3 (TN3), floating: the factors of the compressed, the selected and the window branch, in that order. The
        paper's are sigmoids of a function of the token.
      compressed_key: [B, C, K, H] ([C, K, H]) with C = (S - l) // d + 1 (0 where S < l), floating and rounded to
        query's type; None for means. Its gradient comes from the compressed branch alone.
      compressed_value: the same of values, with value's head size.
      window: tokens, at least 1.
      top_k, compression_block, compression_stride, selection_block, initial_blocks, local_blocks: as in
        `jax_bsk.selection.nsa`.
      block_size: of the selected blocks, as in `BlockMask.from_mask`; the other branches have `sparse_attention`'s.
      scale: of the logits, 1 / sqrt(H) by default.
      implementation: of all three calls, as in `sparse_attention`.

    Returns:
      BTNH (TNH) of query's type, with value's head size; the gated sum is made in float32 (float64 for float64).

    Raises:
      TypeError, ValueError, UnsupportedError: an argument does not fit.
    """
    q, k, v, g = (jnp.asarray(x) for x in (query, key, value, gates))
    unbatched = q.ndim == 3
    if unbatched:
        q, k, v, g = q[None], k[None], v[None], g[None]
    length = positive(compression_block, "compression_block")
    stride = positive(compression_stride, "compression_stride")
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}

    # First, as it checks query, key and value.
    windowed = sparse_attention(q, k, v, mask=LocalMask((positive(window, "window") - 1, 0)), **options)
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
    )
    selected = sparse_attention(q, k, v, mask=chosen, **options)
    ended = CompressedMask(length, stride)
    compressed = sparse_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=ended, **options)

    inside = statistics_dtype(q.dtype)
    branches = (compressed, selected, windowed)
    out = sum(
        (g[..., n, None].astype(inside) * branch.astype(inside) for n, branch in enumerate(branches)),
        jnp.zeros((), inside),
    ).astype(q.dtype)
    return out[0] if unbatched else out


class CompressedMask(Mask):
    """Attends where the stretch [k stride, k stride + length) of tokens that key k stands for ends at or before q."""

    length: int
    stride: int

    def __init__(self, length: int, stride: int) -> None:
        self._set(length=length, stride=stride)

    def _end(self, k: Array) -> Any:
        """The last token of key k."""
        return k * self.stride + (self.length - 1)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        q_low, q_high = grid.q_bounds(i)
        k_low, k_high = grid.kv_bounds(j)
        return grid.code(q_high < self._end(k_low), q_low >= self._end(k_high), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return q >= self._end(k)
