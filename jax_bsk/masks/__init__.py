"""Masks as data: a lazy algebra of masks, and `BlockMask`, the block lists and bit tiles that kernels read."""

from jax_bsk.masks import _export
from jax_bsk.masks.algebra.block_diagonal import BlockDiagonalMask
from jax_bsk.masks.algebra.block_diffusion import BlockDiffusionMask
from jax_bsk.masks.algebra.column_ranges import ColumnRangeMask
from jax_bsk.masks.algebra.data_masks import ArrayMask, BlockArrayMask, SegmentMask
from jax_bsk.masks.algebra.function_mask import FunctionMask
from jax_bsk.masks.algebra.mask import AndMask as _AndMask
from jax_bsk.masks.algebra.mask import Mask, MultiHeadMask
from jax_bsk.masks.algebra.mask import NotMask as _NotMask
from jax_bsk.masks.algebra.mask import OrMask as _OrMask
from jax_bsk.masks.algebra.neighborhood import NeighborhoodMask
from jax_bsk.masks.algebra.ordered import TakenMask as _TakenMask
from jax_bsk.masks.algebra.packed import PackedMask
from jax_bsk.masks.algebra.patterns import (
    BigBirdMask,
    CausalMask,
    ChunkedMask,
    DilatedMask,
    FullMask,
    GlobalMask,
    LocalMask,
    PrefixLMMask,
)
from jax_bsk.masks.algebra.row_ranges import RowRangeMask
from jax_bsk.masks.algebra.slices import SliceMask
from jax_bsk.masks.algebra.space_windows import ShiftedWindowMask, SlidingTileMask
from jax_bsk.masks.algebra.tree import TreeMask
from jax_bsk.masks.algebra.vertical_slash import VerticalSlashMask
from jax_bsk.masks.block_mask import BlockMask
from jax_bsk.masks.block_mask import RunBlockMask as _RunBlockMask
from jax_bsk.masks.convert import as_block_mask
from jax_bsk.masks.token_order import TokenOrder

__all__ = [
    "ArrayMask",
    "BigBirdMask",
    "BlockArrayMask",
    "BlockDiagonalMask",
    "BlockDiffusionMask",
    "BlockMask",
    "CausalMask",
    "ChunkedMask",
    "ColumnRangeMask",
    "DilatedMask",
    "FullMask",
    "FunctionMask",
    "GlobalMask",
    "LocalMask",
    "Mask",
    "MultiHeadMask",
    "NeighborhoodMask",
    "PackedMask",
    "PrefixLMMask",
    "RowRangeMask",
    "SegmentMask",
    "ShiftedWindowMask",
    "SliceMask",
    "SlidingTileMask",
    "TokenOrder",
    "TreeMask",
    "VerticalSlashMask",
    "as_block_mask",
]

# Lazy masks know nothing of their block lists: `Mask.bind` is made known here.
Mask._from_mask = BlockMask.from_mask

_public = (value for name, value in globals().copy().items() if name in __all__ and isinstance(value, type))
_export.register(*_public, _RunBlockMask, _AndMask, _OrMask, _NotMask, _TakenMask)
