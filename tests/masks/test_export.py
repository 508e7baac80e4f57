"""Masks as arguments and results of exported functions."""

from __future__ import annotations

from typing import cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m

T = 64
IDS = np.arange(T, dtype=np.int32) // 9

MASKS = {
    "full": m.FullMask(),
    "causal": m.CausalMask(-3),
    "local": m.LocalMask((2**40, None)),
    "chunked": m.ChunkedMask(7),
    "prefix": m.PrefixLMMask(4),
    "prefix per example": m.PrefixLMMask(np.array([4, 5], np.int32)),
    "global": m.GlobalMask([3, 1]),
    "dilated": m.DilatedMask(2, (3, None)),
    "big bird": m.BigBirdMask(32),
    "segments": m.SegmentMask(IDS, contiguous=True),
    "array": m.ArrayMask(np.tri(T, dtype=bool)),
    "array of blocks": m.BlockArrayMask(np.eye(2, dtype=bool), 32),
    "neighborhood": m.NeighborhoodMask((8, 8), 3, causal=(True, False), tile=4),
    "sliding tiles": m.SlidingTileMask((8, 8), 4, 4),
    "shifted windows": m.ShiftedWindowMask((8, 8), 4, shift=2),
    "rows": m.RowRangeMask(0, IDS * 7),
    "columns": m.ColumnRangeMask(IDS * 3, upper_end=IDS),
    "slices": m.SliceMask([[0, 9], [9, 64]], [[0, 30], [20, 64]], "causal"),
    "sequences": m.BlockDiagonalMask([30, 34], window=(None, 0), prefix=3),
    "block diffusion": m.BlockDiffusionMask(T // 2, 8),
    "lines": m.VerticalSlashMask([3, 4], [0, 1, 9]),
    "tree": m.TreeMask(IDS * 3 - 1),
    "heads": m.MultiHeadMask([m.SegmentMask(IDS), m.CausalMask()]),
    "combined": m.CausalMask() & m.SegmentMask(IDS) | ~m.LocalMask(3),
    "blocks": (m.CausalMask() & m.SegmentMask(IDS)).bind(T, block_size=32),
    "blocks, transposed": m.CausalMask().bind(T, block_size=32).transpose(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_arguments_and_results(name):
    mask = MASKS[name]
    exported = jax.export.export(jax.jit(lambda mask, x: (mask, x + 1)))(mask, jnp.float32(1))
    restored = jax.export.deserialize(exported.serialize())
    same, two = restored.call(mask, jnp.float32(1))
    assert two == 2
    assert jax.tree.structure(same) == jax.tree.structure(mask)
    assert type(same) is type(mask)
    if not isinstance(mask, m.BlockMask):
        assert same == mask
    bound, expected = (x if isinstance(x, m.BlockMask) else x.bind(T, block_size=32) for x in (same, mask))
    np.testing.assert_array_equal(bound.to_dense(), expected.to_dense())


def test_a_mask_is_used_inside():
    """The ids are an argument, and so is the list that is made of them."""
    build = jax.jit(lambda mask: (mask & m.CausalMask()).bind(T, block_size=32))
    restored = jax.export.deserialize(jax.export.export(build)(m.SegmentMask(IDS)).serialize())
    other = m.SegmentMask(IDS // 2)
    np.testing.assert_array_equal(cast(m.BlockMask, restored.call(other)).to_dense(), build(other).to_dense())


def test_functions_cannot_be_serialised():
    mask = m.CausalMask() & m.FunctionMask(lambda q, k: q > k)
    exported = jax.export.export(jax.jit(lambda mask, x: x))(mask, jnp.float32(1))
    with pytest.raises(ValueError, match=r"FunctionMask is an argument .* Python function .*; make the mask inside"):
        exported.serialize()
