"""What is known of a selection before its data is: the grid, which blocks may be chosen, and their bit tiles."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_bsk.masks import BlockMask, FullMask, Mask, as_block_mask
from jax_bsk.selection.inputs import positive

# Numbers of bit tiles that stand for a block with no element attended, and with every one.
EMPTY, FULL = -2, -1


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The blocks that may be chosen: a mask that all heads and examples share, on the host, by block.

    Blocks are chosen in groups of neighbours: those of a `selection_block` or a `moba_block`.

    Attributes:
      tiles: int32 [nq, nk], number of the block's bit tile, `FULL` or `EMPTY`.
      bit_tiles: uint32 [1, 1, n, block_q, block_kv // 32], shared: a causal mask has one for all its diagonal blocks.
      q_len, kv_len: tokens.
      block_q, block_kv: tokens of a block.
      group: key blocks that are chosen together; the last group may have fewer.
    """

    tiles: np.ndarray
    bit_tiles: np.ndarray
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    group: int

    @property
    def open_groups(self) -> np.ndarray:
        """bool [nq, ceil(nk / group)]: groups with a block that is not empty."""
        nq, nk = self.tiles.shape
        groups = -(-nk // self.group)
        padded = np.full((nq, groups * self.group), EMPTY, np.int32)
        padded[:, :nk] = self.tiles
        return (padded.reshape(nq, groups, self.group) != EMPTY).any(-1)

    def own_groups(self) -> np.ndarray:
        """bool [nq, groups]: groups that hold the key at the position of one of the block's queries."""
        size = self.group * self.block_kv
        groups = np.arange(self.open_groups.shape[1])
        begin = np.arange(self.tiles.shape[0])[:, None] * self.block_q
        last = np.minimum(begin + self.block_q, self.q_len) - 1
        return (groups * size <= last) & ((groups + 1) * size > begin)

    def capacity(self, width: int) -> int:
        """Number of entries that lists of at most `width` groups per row can have."""
        return max(1, int(np.minimum((self.tiles != EMPTY).sum(1), width * self.group).sum()))


def candidates_of(
    mask: Mask | None, q_len: int, kv_len: int | None, block_size: int | tuple[int, int], group_size: int | None = None
) -> Candidates:
    """The blocks that a mask leaves to choose from.

    Args:
      mask: one without traced arrays, and the same for all heads and examples; None attends to everything.
      q_len, kv_len, block_size: as in `BlockMask.from_mask`.
      group_size: keys that are chosen together, a multiple of the key block; None for one block.

    Raises:
      TypeError, ValueError: as `BlockMask.from_mask`; for a traced mask, one per head or example, and a group_size that
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
    group = 1
    if group_size is not None:
        group, rest = divmod(positive(group_size, "group_size"), bound.block_kv)
        if rest:
            raise ValueError(
                f"keys chosen together are a multiple of the key block {bound.block_kv}, got {group_size}; "
                "change one of them"
            )
    return Candidates(tiles, np.asarray(bound.bit_tiles), q_len, kv_len, bound.block_q, bound.block_kv, group)
