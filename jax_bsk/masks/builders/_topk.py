"""The blocks of highest score for each query block, as booleans; `BlockMask.from_topk` makes lists of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, as_array, is_traced, of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks.algebra.mask import Mask, classify
from jax_bsk.masks.grid import EMPTY, FULL, Grid, row_chunks


def top_k(given: ArrayLike, k: int, grid: Grid, mask: Mask | None) -> tuple[Array, int, int]:
    """The `k` blocks of highest score in each row.

    Args:
      given: scores [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk], real, host or traced.
      k: number of blocks per row.
      grid: the grid of blocks.
      mask: a mask that rules blocks out, or None.

    Returns:
      Booleans of the scores' shape, the chosen blocks; and upper bounds of the numbers of entries and of bit tiles
      that they need with `mask`, per example and head.
    """
    scores: Any = as_array(given)
    if not (jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)):
        raise TypeError(f"scores must be real numbers, given {scores.dtype}{scores.shape}")
    if scores.ndim not in (2, 3, 4) or scores.shape[-2:] != (grid.nq, grid.nk):
        raise ValueError(
            f"scores must be [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk] with (nq, nk) = ({grid.nq}, {grid.nk}), "
            f"given shape {scores.shape}"
        )
    if not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an int (it decides shapes), given {type(k).__name__}")
    if not 1 <= k <= max(1, grid.nk):
        raise ValueError(f"k must be in [1, {grid.nk}] (the key blocks), given {k}")
    k = min(int(k), grid.nk)
    possible = np.ones((grid.nq, grid.nk), bool)
    partial = np.zeros((grid.nq, grid.nk), bool)
    if mask is not None:
        mask._validate(grid.q_len, grid.kv_len)
        # All heads and examples share what is ruled out here: what the host knows of the mask. What one head or a
        # traced part rules out beyond that is dropped after the choice.
        known = mask._known_on_host(grid)
        codes = np.concatenate([classify(known, grid, rows) for rows in row_chunks(grid)] or [np.zeros((0, grid.nk))])
        possible, partial = codes != EMPTY, (codes != EMPTY) & (codes != FULL)
    bound = int(np.minimum(possible.sum(1), k).sum())
    tiles = int(np.minimum(partial.sum(1), k).sum())
    if not is_traced(scores):
        return _top_k_host(np.asarray(scores).astype(np.float64), possible, k), max(1, bound), tiles
    low = scores.astype(statistics_dtype(scores.dtype))
    low = jnp.where(jnp.isnan(low) | of_rank(~possible, low.ndim), -jnp.inf, low)
    # Sorted, not `lax.top_k`, which XLA does not partition over examples and heads.
    numbers = jnp.arange(grid.nk, dtype=jnp.int32)
    block = jnp.zeros_like(low, jnp.int32) + of_rank(numbers, low.ndim)
    values, ids = jax.lax.sort((-low, block), num_keys=1, is_stable=True)
    chosen = (ids[..., :k, None] == of_rank(numbers, low.ndim + 1)) & (values < jnp.inf)[..., :k, None]
    return chosen.any(-2), max(1, bound), tiles


def _top_k_host(scores: np.ndarray, possible: np.ndarray, k: int) -> np.ndarray:
    scores = np.where(np.isnan(scores) | ~possible, -np.inf, scores)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen & (scores > -np.inf)
