"""What is known of a selection before its scores are: the grid, which blocks may be chosen, and their bit tiles."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, of_rank
from jax_bsk.masks import BlockMask, FullMask, Mask, as_block_mask
from jax_bsk.masks.algebra.mask import AndMask
from jax_bsk.masks.grid import Grid
from jax_bsk.selection.inputs import positive

# Numbers of bit tiles that stand for a block with no element attended, and with every one.
EMPTY, FULL = -2, -1


class Required(NamedTuple):
    """The groups that are chosen whatever their score.

    Attributes:
      groups: bool [nq, groups] on the host, or [B|1, H|1, nq, groups]; None for none.
      most: int [nq], how many there are at most in each row; None where that is not known.
    """

    groups: Any
    most: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The blocks that may be chosen, by block.

    Blocks are chosen in groups of neighbours: those of a `selection_block` or a `moba_block`.

    Attributes:
      tiles: int32, number of the block's bit tile, `FULL` or `EMPTY`: [nq, nk] on the host, where all heads and
        examples share them, else [B|1, H|1, nq, nk], which may be traced.
      bit_tiles: uint32 [B|1, H|1, n, block_q, block_kv // 32]; a causal mask has one for all its diagonal blocks.
      q_len, kv_len: tokens.
      block_q, block_kv: tokens of a block.
      group: key blocks that are chosen together; the last group may have fewer.
      most: int [nq], how many blocks of each row may be open, whatever traced arrays hold; None: those that are.
    """

    tiles: Array
    bit_tiles: Array
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    group: int
    most: np.ndarray | None = None

    @property
    def is_shared(self) -> bool:
        """Whether all heads and examples have the same ones, which are known on the host."""
        return self.tiles.ndim == 2

    @functools.cached_property
    def open_groups(self) -> Any:
        """bool [.., nq, ceil(nk / group)]: groups with a block that is not empty."""
        return any_in_groups(self.tiles != EMPTY, self.group)

    def own_groups(self) -> np.ndarray:
        """bool [nq, groups]: groups that hold the key at the position of one of the block's queries."""
        size = self.group * self.block_kv
        nq, nk = self.tiles.shape[-2:]
        groups = np.arange(-(-nk // self.group))
        begin = np.arange(nq)[:, None] * self.block_q
        last = np.minimum(begin + self.block_q, self.q_len) - 1
        return (groups * size <= last) & ((groups + 1) * size > begin)

    def required_groups(
        self, required: np.ndarray | None, always: Mask | None, batch: int | None, heads: int | None
    ) -> Required:
        """The groups `required`, and what `always` adds to them.

        Args:
          required: bool [nq, groups], or None for none.
          always: mask whose blocks are always chosen where they are open, or None.
          batch, heads: those of the lists.
        """
        if always is None:
            return Required(required, None if required is None else required.sum(1))
        blocks = self.blocks_of(always, batch, heads)
        added = any_in_groups(both(blocks, self.tiles != EMPTY), self.group)
        groups = added if required is None else either(added, required)
        if not isinstance(blocks, np.ndarray):
            return Required(groups, None)
        most = any_in_groups(blocks, self.group)
        return Required(groups, (most if required is None else most | required).sum(1))

    def blocks_of(self, always: Mask, batch: int | None, heads: int | None) -> Any:
        """bool [nq, nk] on the host, or [B|1, H|1, nq, nk]: the blocks that `always` visits."""
        sized = checked(always, "always", batch, heads)
        grid = self.grid
        block_size = (grid.block_q, grid.block_kv)
        if _is_shared(sized, grid):
            bound = as_block_mask(always, grid.q_len, grid.kv_len, batch=1, heads=1, block_size=block_size)
            return _host_table(bound) != EMPTY
        return _traced_table(BlockMask.from_mask(sized, grid.q_len, grid.kv_len, block_size=block_size)) != EMPTY

    @property
    def grid(self) -> Grid:
        """The grid of the lists."""
        return Grid(self.q_len, self.kv_len, self.block_q, self.block_kv)

    def capacity(self, width: int | np.ndarray) -> int:
        """Number of entries that lists of at most `width` groups per row can have."""
        most = (np.asarray(self.tiles) != EMPTY).sum(1) if self.most is None else self.most
        return max(1, int(np.minimum(most, width * self.group).sum()))


def any_in_groups(blocks: Any, group: int) -> Any:
    """bool [.., nq, ceil(nk / group)]: whether any of a group's blocks [.., nq, nk] is set."""
    xp = np if isinstance(blocks, np.ndarray) else jnp
    *lead, nk = blocks.shape
    groups = -(-nk // group)
    padded = xp.pad(blocks, [(0, 0)] * len(lead) + [(0, groups * group - nk)])
    return padded.reshape(*lead, groups, group).any(-1)


def both(a: Any, b: Any) -> Any:
    """`a & b` of booleans [nq, n] or [B|1, H|1, nq, n]."""
    rank = max(a.ndim, b.ndim)
    return of_rank(a, rank) & of_rank(b, rank)


def either(a: Any, b: Any) -> Any:
    """`a | b`, likewise."""
    return ~both(~a, ~b)


def candidates_of(
    mask: Mask | None,
    q_len: int,
    kv_len: int | None,
    block_size: int | tuple[int, int],
    group_size: int | None = None,
    *,
    batch: int | None = 1,
    heads: int | None = 1,
) -> Candidates:
    """The blocks that a mask leaves to choose from.

    Args:
      mask: lazy mask, which may hold traced arrays and differ per head and example; None attends to everything.
      q_len, kv_len, block_size: as in `BlockMask.from_mask`.
      group_size: keys that are chosen together, a multiple of the key block; None for one block.
      batch, heads: those of the lists; None for as many as the mask has.

    Raises:
      TypeError, ValueError: as `BlockMask.from_mask`; for a mask of other heads or examples, and a group_size that is
        no multiple.
    """
    mask = FullMask() if mask is None else mask
    kv_len = q_len if kv_len is None else kv_len
    sized = checked(mask, "mask", batch, heads)
    if isinstance(block_size, list):
        block_size = (block_size[0], block_size[1])
    parts = sized.masks if isinstance(sized, AndMask) else (sized,)
    # Every part that is known is: how many blocks the others leave open follows from it, and is a part of shapes.
    known = [part for part in parts if _is_shared(part, Grid(q_len, kv_len, 128, 128))]
    shared = len(known) == len(parts)
    part = mask if shared else AndMask(*known) if known else FullMask()
    bound: BlockMask = as_block_mask(part, q_len, kv_len, batch=1, heads=1, block_size=block_size)
    tiles, bit_tiles, most = _host_table(bound), np.asarray(bound.bit_tiles), None
    if not shared:
        most = (tiles != EMPTY).sum(1)
        whole = BlockMask.from_mask(sized, q_len, kv_len, block_size=block_size)
        tiles, bit_tiles = _traced_table(whole), whole.bit_tiles
    group = 1
    if group_size is not None:
        group, rest = divmod(positive(group_size, "group_size"), bound.block_kv)
        if rest:
            raise ValueError(
                f"keys chosen together are a multiple of the key block {bound.block_kv}, got {group_size}; "
                "change one of them"
            )
    return Candidates(tiles, bit_tiles, q_len, kv_len, bound.block_q, bound.block_kv, group, most)


def restricted(own: Mask | None, mask: Mask | None) -> Mask | None:
    """A selection's own mask and that of its caller, both of which may be None."""
    if own is None or mask is None:
        return own if mask is None else mask
    # Checked here, as the algebra's own refusal does not name the argument.
    return own & mask if isinstance(mask, Mask) else mask


def checked(mask: Mask, name: str, batch: int | None, heads: int | None) -> Mask:
    """A lazy mask that knows the sizes of the lists.

    Raises:
      TypeError: it is no lazy mask.
      ValueError: it has other examples or heads.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"{name} is a jax_bsk.masks.Mask or None, got {type(mask).__name__}; pass a lazy mask")
    sized = mask._sized(batch, heads)
    for what, given, expected in (("examples", sized.batch, batch), ("heads", sized.heads, heads)):
        if expected is not None and given not in (1, expected):
            raise ValueError(
                f"{name} has {given} {what}, the lists of the selection have {expected}; it must be that or 1 (query "
                "heads that share a list share a mask)"
            )
    return sized


def _is_shared(mask: Mask, grid: Grid) -> bool:
    """Whether a mask is known on the host and the same for all heads and examples."""
    return mask.batch == 1 and mask.heads == 1 and not mask._is_traced(grid)


def _host_table(bound: BlockMask) -> np.ndarray:
    """int32 [nq, nk] of a shared mask: number of the block's bit tile, `FULL` or `EMPTY`."""
    tiles = np.full((bound.nq, bound.nk), EMPTY, np.int32)
    offsets, ids = np.asarray(bound.row_offsets)[0, 0], np.asarray(bound.kv_blocks)[0, 0]
    rows = np.repeat(np.arange(bound.nq), np.diff(offsets))
    tiles[rows, ids[: offsets[-1]]] = np.asarray(bound.tiles)[0, 0, : offsets[-1]]
    return tiles


def _traced_table(bound: BlockMask) -> jax.Array:
    """int32 [B|1, H|1, nq, nk] of any mask; a tile that found no room has the number of the tiles there are."""
    nq, nk, n_tiles = bound.nq, bound.nk, bound.bit_tiles.shape[2]

    def one(offsets: jax.Array, ids: jax.Array, tiles: jax.Array) -> jax.Array:
        entry = jnp.arange(ids.shape[0], dtype=jnp.int32)
        rows = jnp.searchsorted(offsets[1:], entry, side="right", method="sort").astype(jnp.int32)
        empty = jnp.full((nq, nk), EMPTY, jnp.int32)
        return empty.at[rows, jnp.where(rows < nq, ids, nk)].set(jnp.clip(tiles, FULL, n_tiles), mode="drop")

    lists = [jnp.asarray(x) for x in (bound.row_offsets, bound.kv_blocks, bound.tiles)]
    return explicit_mesh.call(jax.vmap(jax.vmap(one)), lists, ["bh"] * 3)
