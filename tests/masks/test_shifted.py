"""Masks of whole sequences for the few queries of a step of decoding, at positions known on the host and traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk.masks.algebra.shifted import at_positions, has_given_offset
from jax_bsk.masks.grid import Grid

T, S = 40, 100
STARTS = np.array([0, 33, 60], np.int32)
RNG = np.random.default_rng(0)
PAIRS = RNG.uniform(size=(3, 1, S, S)) < 0.3
IDS = np.sort(RNG.integers(0, 6, (3, S)), 1)
MASKS = {
    "full": m.FullMask(),
    "causal and ahead": m.CausalMask() & m.LocalMask((9, 2), offset=1),
    "chunked, prefix": m.ChunkedMask(7) | m.PrefixLMMask(5),
    "window with sinks": m.CausalMask() & (m.LocalMask((9, 0)) | m.GlobalMask(3)),
    "global tokens": m.GlobalMask([2, 41, 64, 99]),
    "dilated": ~m.DilatedMask(3, (20, 5)),
    "big bird": m.BigBirdMask(8, random_blocks=2),
    "function": m.FunctionMask(lambda q, k: (q * 7 + k * 3) % 5 < 2),
    "function of examples": m.FunctionMask(lambda b, h, q, k: (q + k + b) % 3 == 0, batch=3),
    "blocks": m.BlockArrayMask(RNG.uniform(size=(2, 4, 4)) < 0.5, 32),
    "segments": m.CausalMask() & m.SegmentMask(IDS[0], contiguous=True),
    "segments of examples": m.SegmentMask(IDS) & m.CausalMask(),
    "array": m.ArrayMask(PAIRS[0, 0]),
    "arrays of heads": m.ArrayMask(PAIRS[:2, 0]),
    "arrays of examples": m.ArrayMask(PAIRS),
    "heads": m.MultiHeadMask([m.CausalMask(), m.GlobalMask(4), m.DilatedMask(2) & m.LocalMask(9)]),
}


def rows(mask, starts):
    """The definition: rows of the mask of the whole sequence."""
    dense = np.asarray(mask.bind(S, block_size=32).to_dense())
    dense = np.broadcast_to(dense, (len(starts), *dense.shape[1:]))
    return np.stack([dense[b, :, start : start + T] for b, start in enumerate(starts)])


@pytest.mark.parametrize("name", MASKS)
def test_rows_of_the_whole_mask(name):
    mask = MASKS[name]
    bind = jax.jit(lambda mask, at: at_positions(mask, at, T, S).bind(T, S, block_size=32))
    expected = rows(mask, STARTS)
    np.testing.assert_array_equal(np.broadcast_to(bind(mask, jnp.asarray(STARTS)).to_dense(), expected.shape), expected)
    for start in (33, np.array(60, np.int32)):
        on_host = np.asarray(at_positions(mask, start, T, S).bind(T, S, block_size=32).to_dense())
        expected = rows(mask, [int(start)] * max(1, mask.batch))
        np.testing.assert_array_equal(np.broadcast_to(on_host, expected.shape), expected)


def test_a_position_that_all_examples_share():
    mask = MASKS["window with sinks"] & MASKS["segments of examples"] & MASKS["arrays of heads"] & MASKS["dilated"]
    bind = jax.jit(lambda at: at_positions(mask, at, T, S).bind(T, S, block_size=32))
    np.testing.assert_array_equal(bind(jnp.int32(33)).to_dense(), rows(mask, [33] * 3))


@pytest.mark.parametrize(
    "mask",
    [
        m.CausalMask(),
        m.NeighborhoodMask((10, 10), 3) | m.GlobalMask(2),
        m.PackedMask([0, 40, 100], within=m.CausalMask()),
        m.FunctionMask(lambda q, k: (q + k) % 3 > 0, within=m.LocalMask(9)),
    ],
)
def test_masks_of_reordered_tokens(mask):
    ordered = m.TokenOrder.tiles((10, 10), (4, 8)).mask(mask)
    found = at_positions(ordered, 33, T, S).bind(T, S, block_size=32).to_dense()
    np.testing.assert_array_equal(found, rows(ordered, [33]))


def test_parts_that_are_of_these_queries_stay():
    ids = m.SegmentMask(IDS[0, :T], IDS[0])
    pairs = m.ArrayMask(PAIRS[0, 0, :T])
    assert at_positions(ids & pairs, 33, T, S) == ids & pairs
    assert has_given_offset(ids & ~m.LocalMask(3, offset=jnp.int32(3)))
    assert has_given_offset(m.CausalMask(2))
    assert not has_given_offset(MASKS["window with sinks"] & ids)
    with pytest.raises(ValueError, match="offset for each query"):
        at_positions(m.CausalMask(np.zeros((1, T), np.int32)), 3, T, S)


def test_one_query_needs_room_for_few_tiles():
    """A window with sinks evaluates the tiles of its ends and of the last sink, whatever the cache's length."""
    grid = Grid(1, 2**15, 128, 128)
    traced = jax.eval_shape(
        lambda at: at_positions(MASKS["window with sinks"], at, 1, grid.kv_len).bind(1, grid.kv_len), jnp.int32(0)
    )
    assert traced.tiles.shape[-3] <= 5
