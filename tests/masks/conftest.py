"""Random masks with the dense booleans they stand for, written down independently of the package."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import jax_bsk.masks as m


def _leaf(rng: np.random.Generator, q_len: int, kv_len: int, batch: int, heads: int):
    """One random mask and its booleans [B|1, H|1, T, S]."""
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    span = max(q_len, kv_len)
    kind = rng.integers(18)
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
        dense, within = (q * a + k * b) % 17 < 5, None
        if rng.random() < 0.5:
            within, dense = m.LocalMask(span // 3), dense & (abs(q - k) <= span // 3)
        return m.FunctionMask(lambda q, k: (q * a + k * b) % 17 < 5, within=within), dense[None, None]
    return _from_elsewhere(kind, rng, q, k, batch, heads)


def _from_elsewhere(kind: int, rng: np.random.Generator, q: np.ndarray, k: np.ndarray, batch: int, heads: int):
    """Masks that test_space, test_ranges and test_lines compare with their definitions, for whole expressions."""
    q_len, kv_len = q.size, k.size
    if kind == 12:  # rows of 3 tokens, a window of 3 x 2 that is moved inward
        rows = min(q_len, kv_len) // 3
        if rows < 3:
            return m.FullMask(), np.ones((1, 1, q_len, kv_len), bool)
        inside = (q < 3 * rows) & (k < 3 * rows)
        near = abs(np.clip(q // 3, 1, rows - 2) - k // 3) <= 1
        column = np.clip(q % 3 - 1, 0, 1)
        dense = inside & near & (k % 3 >= column) & (k % 3 <= column + 1)
        return m.NeighborhoodMask((rows, 3), (3, 2), start=0), dense[None, None]
    if kind == 13:
        begin, length = rng.integers(-5, kv_len, (batch, q_len)), rng.integers(0, kv_len, (batch, q_len))
        dense = (begin[..., None] <= k) & (k < (begin + length)[..., None])
        return m.RowRangeMask(begin.astype(np.int32), (begin + length).astype(np.int32)), dense[:, None]
    if kind == 14:
        a, b, c, d = rng.integers(0, q_len + 1, (4, batch, heads, 1, kv_len)).astype(np.int32)
        dense = ~(((a <= q) & (q < b)) | ((c <= q) & (q < d)))
        return m.ColumnRangeMask(*(x[:, :, 0] for x in (a, b, c, d))), dense
    if kind == 15:
        lengths = np.diff(np.sort(np.concatenate([[0], rng.integers(0, min(q_len, kv_len) + 1, 4)])))
        ids = np.append(np.repeat(np.arange(4), lengths), np.full(max(q_len, kv_len), -1))
        dense = (ids[q] >= 0) & (ids[q] == ids[k]) & (k <= q) & (q - k <= 40)
        return m.BlockDiagonalMask(lengths.astype(np.int32), window=(40, 0)), dense[None, None]
    if kind == 16:
        columns, distances = rng.integers(-1, kv_len, (heads, 3)), rng.integers(-1, q_len, (heads, 5))
        hit = [np.isin(k, columns[h]) | np.isin(q - k, distances[h]) for h in range(heads)]
        return m.VerticalSlashMask(columns[None], distances[None]), ((k <= q) & np.stack(hit))[None]
    n = int(rng.integers(0, 4))
    q_ranges, kv_ranges = (np.sort(rng.integers(0, size + 1, (n, 2))) for size in (q_len, kv_len))
    kinds = rng.integers(0, 4, n)
    dense = np.zeros((q_len, kv_len), bool)
    for (a, b), (c, d), form in zip(q_ranges, kv_ranges, kinds, strict=True):
        causal, inverse = k - d <= q - b, k - c >= q - a
        form = (True, causal, inverse, causal & inverse)[form]
        dense |= (a <= q) & (q < b) & (c <= k) & (k < d) & form
    return m.SliceMask(q_ranges.astype(np.int32), kv_ranges.astype(np.int32), kinds), dense[None, None]


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
