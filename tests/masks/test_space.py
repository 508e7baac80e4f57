"""Masks of tokens on a grid: neighborhoods, sliding tiles and shifted windows, against their papers' definitions."""

from __future__ import annotations

import math
import time

import jax
import numpy as np
import pytest

import jax_bsk.masks as m
from tests.masks import definitions
from tests.masks.definitions import check

NEIGHBORHOODS = {
    "one axis": m.NeighborhoodMask(100, 7),
    "one axis, even": m.NeighborhoodMask(100, 8),
    "one axis, causal": m.NeighborhoodMask(100, 9, causal=True),
    "one axis, dilated": m.NeighborhoodMask(103, 5, dilation=7),
    "one axis, dilated and causal": m.NeighborhoodMask(103, 6, dilation=4, causal=True),
    "one axis, stride": m.NeighborhoodMask(101, 8, stride=8),
    "one axis, stride, dilated": m.NeighborhoodMask(101, 9, stride=4, dilation=3),
    "one axis, stride, causal": m.NeighborhoodMask(101, 9, stride=4, causal=True),
    "the whole axis": m.NeighborhoodMask((3, 40), (3, 5)),
    "two axes": m.NeighborhoodMask((17, 13), (5, 4)),
    "two axes, tiles": m.NeighborhoodMask((16, 24), (5, 7), tile=(4, 8)),
    "two axes, cut tiles": m.NeighborhoodMask((17, 13), (5, 4), tile=(4, 8)),
    "two axes, causal in one": m.NeighborhoodMask((17, 13), (5, 4), causal=(True, False), dilation=(1, 3)),
    "three axes": m.NeighborhoodMask((6, 7, 9), (3, 4, 5)),
    "three axes, all at once": m.NeighborhoodMask(
        (6, 9, 8), (3, 4, 2), dilation=(2, 1, 4), stride=(1, 3, 2), causal=(False, True, False), tile=(2, 3, 4)
    ),
    "among other tokens": m.NeighborhoodMask((10, 8), 3, start=9),
}


@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhood(name):
    mask = NEIGHBORHOODS[name]
    where = {} if mask.start is None else {"length": 120, "start": mask.start}
    dense = definitions.neighborhood(
        mask.shape, mask.kernel, mask.dilation, mask.stride, mask.causal, mask.tile, **where
    )
    for block_size in (32, 64):
        check(mask, dense, block_size)


@pytest.mark.parametrize("seed", range(12))
def test_random_neighborhood(seed):
    rng = np.random.default_rng(seed)
    axes = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(1, (200, 20, 9)[axes - 1], axes))
    dilation = tuple(int(rng.integers(1, n // 2 + 2)) for n in shape)
    dilation = tuple(min(d, n) for d, n in zip(dilation, shape, strict=True))
    kernel = tuple(int(rng.integers(1, n // d + 1)) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(int(rng.integers(1, k + 1)) if rng.random() < 0.5 else 1 for k in kernel)
    causal = tuple(bool(rng.random() < 0.3) for _ in shape)
    tile = None if rng.random() < 0.5 else tuple(int(rng.integers(1, n + 1)) for n in shape)
    mask = m.NeighborhoodMask(shape, kernel, dilation=dilation, stride=stride, causal=causal, tile=tile)
    check(mask, definitions.neighborhood(shape, kernel, dilation, stride, causal, tile), int(rng.choice([32, 64])))


def test_every_query_has_as_many_keys_as_the_kernel():
    counts = m.NeighborhoodMask((11, 12), (3, 4), dilation=(2, 3)).bind(132, block_size=32).to_dense().sum(-1)
    assert (counts == 12).all()


TILES = {
    "two axes": m.SlidingTileMask((16, 24), (8, 12), (4, 4)),
    "three axes": m.SlidingTileMask((4, 8, 12), (2, 6, 8), (2, 2, 4)),
    "one axis": m.SlidingTileMask(96, 48, 16),
    "with text": m.SlidingTileMask((8, 12), (4, 12), 4, start=0),
}


@pytest.mark.parametrize("name", TILES)
def test_sliding_tiles(name):
    mask = TILES[name]
    assert mask.tile is not None
    where = {} if mask.start is None else {"length": 110, "start": mask.start}
    for block_size in (32, 64):
        check(mask, definitions.sliding_tiles(mask.shape, mask.window, mask.tile, **where), block_size)


def test_sliding_tiles_of_whole_blocks_need_no_bits():
    bound = m.SlidingTileMask((12, 16, 16), (6, 16, 8), (6, 8, 8)).bind(12 * 256)
    assert bound.bit_tiles.shape[2] == 0
    assert bound.element_density == bound.density == 0.25


SWIN = {
    "without shift": m.ShiftedWindowMask((8, 12), 4),
    "shifted": m.ShiftedWindowMask((8, 12), 4, shift=2),
    "shifted in one axis": m.ShiftedWindowMask((8, 12), (4, 6), shift=(0, 3)),
    "video": m.ShiftedWindowMask((4, 8, 6), (2, 4, 3), shift=(1, 2, 1)),
}


@pytest.mark.parametrize("name", SWIN)
def test_shifted_windows(name):
    mask = SWIN[name]
    for block_size in (32, 64):
        check(mask, definitions.swin(mask.shape, mask.window, mask.shift), block_size)


def test_shifted_windows_of_any_size():
    """Grids that windows do not divide, which Swin pads: windows are cut. In tiles, the same windows lie together."""
    dense = definitions.on_grid((7, 11), None, lambda axis, q, k: (q - 1) // 3 == (k - 1) // 3)
    check(m.ShiftedWindowMask((7, 11), 3, shift=1), dense, 32)
    check(
        m.ShiftedWindowMask((8, 16), 4, tile=(4, 8)),
        definitions.on_grid((8, 16), (4, 8), lambda a, q, k: q // 4 == k // 4),
        32,
    )


def test_joined_with_text_and_traced_parts():
    video, text = (4, 6, 5), 16
    tokens = math.prod(video)
    space = m.NeighborhoodMask(video, (3, 3, 5), start=0)
    dense = definitions.neighborhood(video, (3, 3, 5), (1,) * 3, (1,) * 3, (False,) * 3, length=tokens + text, start=0)
    dense[tokens:] = dense[:, tokens:] = True
    joined = space | m.GlobalMask(range(tokens, tokens + text))
    np.testing.assert_array_equal(joined.bind(tokens + text, block_size=32).to_dense()[0, 0], dense)
    ids = np.repeat([0, 1], [70, tokens + text - 70])
    bind = jax.jit(lambda ids: (joined & m.SegmentMask(ids)).bind(tokens + text, block_size=32))
    np.testing.assert_array_equal(bind(ids).to_dense()[0, 0], dense & (ids[:, None] == ids))


def test_tiles_of_a_block_visit_fewer_blocks():
    start = time.process_time()
    rows, tiles = (m.NeighborhoodMask((256, 256), 13, tile=tile).bind(256 * 256) for tile in (None, (8, 16)))
    assert time.process_time() - start < 2, "measured 0.03 s"
    assert [int(x.row_offsets[0, 0, -1]) for x in (rows, tiles)] == [13_312, 4_324]


def test_equality_and_text():
    a, b = (m.NeighborhoodMask((8, 8), 3, causal=True) for _ in range(2))
    assert a == b != m.NeighborhoodMask((8, 8), 3)
    assert hash(a) == hash(b)
    assert repr(a) == "NeighborhoodMask((8, 8), (3, 3), causal=(True, True))"
    assert repr(m.SlidingTileMask((8, 8), 4, 2, start=0)) == "SlidingTileMask((8, 8), (4, 4), (2, 2), start=0)"
    assert repr(m.ShiftedWindowMask((8, 8), 4, shift=2)) == "ShiftedWindowMask((8, 8), (4, 4), shift=(2, 2))"


BAD = [
    (lambda: m.NeighborhoodMask((), 3), ValueError, "shape must have at least one axis"),
    (lambda: m.NeighborhoodMask((8, 0), 3), ValueError, r"shape\[1\] must be at least 1, given 0"),
    (lambda: m.NeighborhoodMask((8, 8), 9), ValueError, r"kernel\[0\] \* dilation\[0\] must be at most shape\[0\]=8"),
    (lambda: m.NeighborhoodMask((8, 8), 3, dilation=(1, 3)), ValueError, r"given 3 \* 3; give a smaller kernel"),
    (lambda: m.NeighborhoodMask((8, 8), (3, 3, 3)), ValueError, r"kernel must be an int or one per axis of shape"),
    (lambda: m.NeighborhoodMask(8, 3, stride=4), ValueError, r"stride\[0\] must be at most kernel\[0\]=3, given 4"),
    (lambda: m.NeighborhoodMask(8, 3, causal=1), ValueError, "causal must be a bool"),  # pyright: ignore
    (lambda: m.NeighborhoodMask(8, 1.5), TypeError, r"kernel\[0\] must be an int"),  # pyright: ignore
    (lambda: m.NeighborhoodMask((8, 8), 3).bind(70), ValueError, "has 64 tokens, got q_len=70; .* give start"),
    (lambda: m.NeighborhoodMask((8, 8), 3, start=7).bind(70), ValueError, "64 tokens from start=7 on, got q_len=70"),
    (lambda: m.SlidingTileMask((8, 8), 4, 3), ValueError, r"must be multiples of tile\[0\]=3"),
    (lambda: m.SlidingTileMask((8, 8), 16, 4), ValueError, "the window at most the shape"),
    (lambda: m.ShiftedWindowMask((8, 8), 4, shift=4), ValueError, r"shift\[0\] must be less than window\[0\]=4"),
    (lambda: m.ShiftedWindowMask((8, 8), 4).bind(64, 60), ValueError, "got kv_len=60"),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
