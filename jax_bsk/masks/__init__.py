"""Masks as data: a lazy algebra of masks, and `BlockMask`, the block lists and bit tiles that kernels read."""

from jax_bsk.masks import _export
from jax_bsk.masks.algebra import AndMask as _AndMask
from jax_bsk.masks.algebra import Mask, MultiHeadMask
from jax_bsk.masks.algebra import NotMask as _NotMask
from jax_bsk.masks.algebra import OrMask as _OrMask
from jax_bsk.masks.block_mask import BlockMask
from jax_bsk.masks.convert import as_block_mask
from jax_bsk.masks.data_masks import ArrayMask, BlockArrayMask, SegmentMask
from jax_bsk.masks.function_mask import FunctionMask
from jax_bsk.masks.patterns import (
    BigBirdMask,
    CausalMask,
    ChunkedMask,
    DilatedMask,
    FullMask,
    GlobalMask,
    LocalMask,
    PrefixLMMask,
)
from jax_bsk.masks.run_mask import RunBlockMask as _RunBlockMask

__all__ = [
    "ArrayMask",
    "BigBirdMask",
    "BlockArrayMask",
    "BlockMask",
    "CausalMask",
    "ChunkedMask",
    "DilatedMask",
    "FullMask",
    "FunctionMask",
    "GlobalMask",
    "LocalMask",
    "Mask",
    "MultiHeadMask",
    "PrefixLMMask",
    "SegmentMask",
    "as_block_mask",
]

_public = (value for name, value in globals().copy().items() if name in __all__ and isinstance(value, type))
_export.register(*_public, _RunBlockMask, _AndMask, _OrMask, _NotMask)
