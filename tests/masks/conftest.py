"""Random masks with the dense booleans they stand for, written down independently of the package."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk.qa.testing import mask_draws


def _leaf(rng: np.random.Generator, q_len: int, kv_len: int, batch: int, heads: int):
    """One random mask and its booleans [B|1, H|1, T, S]."""
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    span = max(q_len, kv_len)
    kind = rng.integers(13 + len(mask_draws.DRAWS))
    if kind == 0:
        return m.FullMask(), np.ones((1, 1, q_len, kv_len), bool)
    if kind == 1:
        offset = int(rng.integers(-span, span))
        return m.CausalMask(offset), (q + offset >= k)[None, None]
    if kind == 2:
        left, right = (None if rng.random() < 0.2 else int(w) for w in rng.integers(0, span, 2))
        dense = (k >= q - (span if left is None else left)) & (k <= q + (span if right is None else right))
        return m.LocalMask((left, right)), dense[None, None]
    if kind == 3:
        chunk = int(rng.integers(1, span + 1))
        return m.ChunkedMask(chunk), (q // chunk == k // chunk)[None, None]
    if kind == 4:
        prefix = int(rng.integers(0, kv_len + 2))
        return m.PrefixLMMask(prefix), ((k < prefix) | (q >= k))[None, None]
    if kind == 5:
        prefix = rng.integers(0, kv_len + 2, batch).astype(np.int32)
        dense = (k < prefix[:, None, None]) | (q >= k)
        return m.PrefixLMMask(prefix), dense[:, None]
    if kind == 6:
        tokens = rng.integers(0, span + 5, rng.integers(0, 5))
        return m.GlobalMask(tokens), (np.isin(q, tokens) | np.isin(k, tokens))[None, None]
    if kind == 7:
        dilation, window = int(rng.integers(1, 9)), int(rng.integers(0, span))
        return m.DilatedMask(dilation, window), (((q - k) % dilation == 0) & (abs(q - k) <= window))[None, None]
    if kind == 8:
        q_ids, kv_ids = (np.sort(rng.integers(0, 5, (batch, n)), -1).astype(np.int32) for n in (q_len, kv_len))
        return m.SegmentMask(q_ids, kv_ids, contiguous=True), (q_ids[:, :, None] == kv_ids[:, None])[:, None]
    if kind == 9:
        q_ids, kv_ids = (rng.integers(0, 3, n).astype(np.int32) for n in (q_len, kv_len))
        return m.SegmentMask(q_ids, kv_ids), (q_ids[:, None] == kv_ids)[None, None]
    if kind == 10:
        shape = (int(rng.choice([1, batch])), int(rng.choice([1, heads])), q_len, kv_len)
        dense = rng.random(shape) < rng.choice([0.001, 0.5, 0.9999])
        return m.ArrayMask(dense), dense
    if kind == 11:
        a, b = (int(x) for x in rng.integers(1, 20, 2))
        return m.FunctionMask(lambda q, k: (q * a + k * b) % 17 < 5), ((q * a + k * b) % 17 < 5)[None, None]
    names = list(mask_draws.DRAWS)
    if kind < 12 + len(names):
        mask, dense = mask_draws.DRAWS[names[kind - 12]](rng, q_len, kv_len)
        return mask, dense[None, None]
    # Arrays per example and head.
    ends = rng.integers(0, q_len + 1, (batch, heads, kv_len)).astype(np.int32)
    return m.ColumnRangeMask(ends), q < ends[:, :, None]


def _mask(rng: np.random.Generator, q_len: int, kv_len: int, batch: int, heads: int, depth: int):
    if depth == 0 or rng.random() < 0.15:
        return _leaf(rng, q_len, kv_len, batch, heads)
    kind = rng.integers(9)
    if kind == 8 and heads > 1:
        parts = [_mask(rng, q_len, kv_len, batch, 1, depth - 1) for _ in range(heads)]
        examples = max(d.shape[0] for _, d in parts)
        dense = [np.broadcast_to(d, (examples, 1, q_len, kv_len)) for _, d in parts]
        return m.MultiHeadMask([p for p, _ in parts]), np.concatenate(dense, 1)
    left, dense = _mask(rng, q_len, kv_len, batch, heads, depth - 1)
    if kind == 7:
        return ~left, ~dense
    right, other = _mask(rng, q_len, kv_len, batch, heads, depth - 1)
    return (left & right, dense & other) if kind < 4 else (left | right, dense | other)


@pytest.fixture
def random_mask():
    """`random_mask(rng, q_len, kv_len, batch=2, heads=3, depth=2)` -> (mask, bool [B|1, H|1, T, S])."""

    def make(rng, q_len, kv_len, batch=2, heads=3, depth=2):
        return _mask(rng, q_len, kv_len, batch, heads, depth)

    return make


@pytest.fixture
def random_sizes():
    """`random_sizes(rng)` -> (q_len, kv_len, block_size): non-multiples, unequal lengths, one token, oblong blocks."""

    def make(rng):
        q_len, kv_len = (int(n) for n in rng.integers(1, 400, 2))
        if rng.random() < 0.3:
            kv_len = q_len
        if rng.random() < 0.1:
            q_len = 1
        block_size = [32, 64, 128, (64, 128), (128, 32), (32, 96)][rng.integers(6)]
        return q_len, kv_len, block_size

    return make


@pytest.fixture
def assert_well_formed():
    """Asserts the layout that kernels rely on: offsets, order in each row, padding, tile numbers, dtypes."""

    def check(mask: m.BlockMask):
        capacity = mask.kv_blocks.shape[-1]
        for name in ("row_offsets", "kv_blocks", "tiles"):
            assert getattr(mask, name).dtype == np.int32, name
        assert mask.bit_tiles.dtype == np.uint32
        assert mask.bit_tiles.shape[3:] == (mask.block_q, mask.block_kv // 32)
        assert mask.tiles.shape == mask.kv_blocks.shape
        assert mask.row_offsets.shape == (*mask.kv_blocks.shape[:2], mask.nq + 1)
        for b in range(mask.kv_blocks.shape[0]):
            for h in range(mask.kv_blocks.shape[1]):
                offsets, ids, tiles = (np.asarray(x)[b, h] for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
                assert offsets[0] == 0
                assert offsets[-1] <= capacity
                assert (ids[offsets[-1] :] == -1).all()
                assert (tiles[offsets[-1] :] == -1).all()
                assert ((tiles >= -1) & (tiles < mask.bit_tiles.shape[2])).all()
                for begin, end in itertools.pairwise(offsets):
                    key = [(t < 0, i) for i, t in zip(ids[begin:end], tiles[begin:end], strict=True)]
                    assert key == sorted(set(key)), "partial ones first, then full ones, each ascending"
                    assert ((ids[begin:end] >= 0) & (ids[begin:end] < mask.nk)).all()

    return check
