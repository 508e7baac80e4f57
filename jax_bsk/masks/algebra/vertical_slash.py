"""`VerticalSlashMask`: some keys that all later queries see, and some distances at which each query sees a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import int32
from jax_bsk.masks.algebra._ranges import checked_integers, leading_dims
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import OWN, Grid, alike, in_blocks, min_max

__all__ = ["VerticalSlashMask"]


class VerticalSlashMask(Mask):
    """Causal, at vertical lines and slashes: the pattern of MInference (Jiang et al., arXiv 2407.02490, section 3).

    Query q attends to the keys k <= q with k in `vertical` or q - k in `slash`. Numbers outside of the lengths select
    nothing, so -1 fills lists that differ in length.

    Args:
      vertical: positions of keys, integers [n], [B|1, n] or [B|1, H|1, n] with H query heads, host or traced.
      slash: distances of keys from the query, likewise; 0 is the query's own position.

    Raises:
      TypeError, ValueError: where one is none of these.

    Examples:
      >>> from jax_bsk.masks import VerticalSlashMask
      >>> VerticalSlashMask([0], [0, 2]).bind(4, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """

    _data_fields = ("vertical", "slash")
    _coarse_bounds = True
    vertical: Array
    slash: Array

    def __init__(self, vertical: ArrayLike | Sequence[int], slash: ArrayLike | Sequence[int]) -> None:
        self._set(vertical=_positions(vertical, "vertical"), slash=_positions(slash, "slash"))

    def _leaf_dims(self, name: str) -> str:
        return leading_dims(getattr(self, name))

    def _columns(self, grid: Grid) -> Any:
        """Boolean [kv_len]: keys of vertical lines."""
        return _flags(self.vertical, grid.kv_len, grid)

    def _distances(self, grid: Grid) -> Any:
        """Boolean [q_len]: distances of slashes."""
        return _flags(self.slash, grid.q_len, grid)

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        xp = grid.xp
        (q_low, q_high), (k_low, k_high) = grid.q_bounds(i), grid.kv_bounds(j)
        every, some = min_max(grid, self._columns(grid), grid.nk, grid.block_kv)
        before = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(self._distances(grid), dtype=np.int32)])
        # Distances in the block are those of [low, high]; how many of them have a slash.
        low, high = xp.clip(q_low - k_high, 0, grid.q_len), xp.clip(q_high - k_low + 1, 0, grid.q_len)
        slashes = xp.where(high > low, before[high] - before[xp.minimum(low, high)], 0)
        future = q_high < k_low
        full = (q_low >= k_high) & (every[j] | (slashes == high - low))
        return grid.code(future | ~(some[j] | (slashes > 0)), full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        column = self._columns(grid)[grid.clip_kv(k)]
        if isinstance(q, np.ndarray) and isinstance(k, np.ndarray) and _are_runs(q, k):
            slash = _along_diagonals(self._distances(grid), q, k)
        else:
            slash = self._distances(grid)[grid.xp.clip(q - k, 0, grid.q_len - 1)]
        return (q >= k) & (column | slash)

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        distance = i.astype(np.int64) * grid.block_q - j.astype(np.int64) * grid.block_kv
        each, which = np.unique(distance, return_inverse=True)
        # The slashes in a block: of the distances from that of its first query and last key on.
        span = grid.block_q + grid.block_kv - 1
        flags = np.concatenate([np.zeros(span, bool), self._distances(grid), np.zeros(span, bool)])
        starts = np.clip(each - (grid.block_kv - 1) + span, 0, flags.size - span)
        slashes = alike(flags[starts[:, None] + np.arange(span)])
        columns = alike(in_blocks(self._columns(grid), grid.nk, grid.block_kv))
        # From a distance of a block on, the diagonal is not in it.
        return columns[j], slashes[which.ravel()], np.clip(distance, -grid.block_q, grid.block_kv)

    def _repr_arguments(self) -> list[str]:
        return [short(self.vertical), short(self.slash)]


def _are_runs(q: np.ndarray, k: np.ndarray) -> bool:
    """Whether indices are those of whole blocks, [n, queries, 1] and [n, 1, keys], each one more than that before."""
    if q.ndim != 3 or q.shape[2] != 1 or k.shape[1] != 1 or q.shape[0] != k.shape[0]:
        return False
    return all(x.size and (x == x[:, :1] + np.arange(x.shape[1])).all() for x in (q[:, :, 0], k[:, 0]))


def _along_diagonals(flags: np.ndarray, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """`flags[q - k]` of whole blocks, without an index for each pair, which takes 4 times as long."""
    queries, keys = q.shape[1], k.shape[2]
    span = queries + keys - 1
    padded = np.concatenate([np.zeros(span, bool), flags, np.zeros(span, bool)])
    starts = np.clip(q[:, 0, 0] - k[:, 0, -1] + span, 0, padded.size - span)
    of_block = padded[starts[:, None] + np.arange(span)]  # by distance
    windows = np.lib.stride_tricks.sliding_window_view(of_block, keys, axis=1)
    return windows[:, :, ::-1]


def _positions(given: ArrayLike | Sequence[int], name: str) -> Array:
    return checked_integers(given, "VerticalSlashMask", name, "n")


def _flags(positions: Array, length: int, grid: Grid) -> Any:
    """Boolean [length]: which places are among the positions."""
    at = int32(positions, grid.xp)
    if grid.xp is np:
        flags = np.zeros(length, bool)
        flags[at[(at >= 0) & (at < length)]] = True
        return flags
    return jnp.zeros(length, bool).at[jnp.where(at < 0, length, at)].set(True, mode="drop")
