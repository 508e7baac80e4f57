"""What is known of a selection before its data is: the grid, which blocks the mask leaves open, and their bit tiles."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import numpy as np

from jax_bsk.masks import BlockMask, FullMask, Mask, as_block_mask

EMPTY, FULL = -2, -1


@dataclasses.dataclass(frozen=True)
class Outline:
    """A mask that all heads and examples share, on the host, by block.

    Attributes:
      tiles: int32 [nq, nk], number of the block's bit tile, `FULL` or `EMPTY`.
      bit_tiles: uint32 [1, 1, n, block_q, block_kv // 32], shared: a causal mask has one for all its diagonal blocks.
      unit: key blocks that are chosen together.
    """

    tiles: np.ndarray
    bit_tiles: np.ndarray
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    unit: int

    @property
    def open_units(self) -> np.ndarray:
        """bool [nq, ceil(nk / unit)]: units with a block that is not empty."""
        nq, nk = self.tiles.shape
        units = -(-nk // self.unit)
        padded = np.full((nq, units * self.unit), EMPTY, np.int32)
        padded[:, :nk] = self.tiles
        return (padded.reshape(nq, units, self.unit) != EMPTY).any(-1)

    def own_units(self) -> np.ndarray:
        """bool [nq, units]: units that hold the key at the position of one of the block's queries."""
        size = self.unit * self.block_kv
        units = np.arange(self.open_units.shape[1])
        begin = np.arange(self.tiles.shape[0])[:, None] * self.block_q
        last = np.minimum(begin + self.block_q, self.q_len) - 1
        return (units * size <= last) & ((units + 1) * size > begin)

    def capacity(self, width: int) -> int:
        """Entries that lists of at most `width` units a row can have."""
        return max(1, int(np.minimum((self.tiles != EMPTY).sum(1), width * self.unit).sum()))


def outline(
    mask: Mask | None, q_len: int, kv_len: int | None, block_size: int | tuple[int, int], unit_size: int | None = None
) -> Outline:
    """The outline of a mask.

    Args:
      mask: one without traced arrays, and the same for all heads and examples; None attends to everything.
      q_len, kv_len, block_size: as in `BlockMask.from_mask`.
      unit_size: keys that are chosen together, a multiple of the key block; None for one block.

    Raises:
      TypeError, ValueError: as `BlockMask.from_mask`; for a traced mask, one per head or example, and a unit_size that
        is no multiple.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask is a jax_bsk.masks.Mask or None, got {type(mask).__name__}; pass a lazy mask")
    mask = FullMask() if mask is None else mask
    kv_len = q_len if kv_len is None else kv_len
    sized = mask._sized(None, None)
    if sized.batch != 1 or sized.heads != 1:
        raise ValueError(
            f"mask is one for all heads and examples, got {mask!r}; put what differs into the scores, as -inf"
        )
    if isinstance(block_size, list):
        block_size = (block_size[0], block_size[1])
    bound: BlockMask = as_block_mask(mask, q_len, kv_len, batch=1, heads=1, block_size=block_size)
    if bound.is_traced:
        raise TypeError(
            f"mask is known beforehand, got {mask!r} with traced arrays; put those into the scores, as -inf"
        )
    tiles = np.full((bound.nq, bound.nk), EMPTY, np.int32)
    offsets, ids = np.asarray(bound.row_offsets)[0, 0], np.asarray(bound.kv_blocks)[0, 0]
    rows = np.repeat(np.arange(bound.nq), np.diff(offsets))
    tiles[rows, ids[: offsets[-1]]] = np.asarray(bound.tiles)[0, 0, : offsets[-1]]
    unit = 1
    if unit_size is not None:
        unit, rest = divmod(positive(unit_size, "unit_size"), bound.block_kv)
        if rest:
            raise ValueError(
                f"keys chosen together are a multiple of the key block {bound.block_kv}, got {unit_size}; "
                "change one of them"
            )
    return Outline(tiles, np.asarray(bound.bit_tiles), q_len, kv_len, bound.block_q, bound.block_kv, unit)


def positive(value: Any, name: str) -> int:
    """A checked static count."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is an int (it decides shapes), got {value!r}; pass a Python int") from None
    if number < 1:
        raise ValueError(f"{name} is at least 1, got {number}; choose 1 or more")
    return number
