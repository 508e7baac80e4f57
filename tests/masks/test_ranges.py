"""Masks of ranges: intervals per query and per key, slices, sequences one after another, block diffusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk.masks.algebra.mask import count_codes
from jax_bsk.masks.grid import Grid
from tests.masks import definitions
from tests.masks.definitions import check

LENGTHS = [(100, 100), (70, 130), (130, 65)]


@pytest.mark.parametrize("seed", range(8))
def test_rows(seed):
    rng = np.random.default_rng(seed)
    q_len, kv_len = LENGTHS[seed % 3]
    begin = rng.integers(-20, kv_len + 20, q_len)
    end = begin + rng.integers(-5, 60, q_len)
    if seed % 2:
        begin, end = np.sort(begin), np.sort(end)
    dense = definitions.pairs(q_len, kv_len, lambda q, k: begin[q] <= k < end[q])
    check(m.RowRangeMask(begin, end), dense, 32)
    # Endpoints of cuDNN's Flex Attention: [0, F0), [F1, F2).
    f = rng.integers(0, kv_len, (3, q_len))
    dense = definitions.pairs(q_len, kv_len, lambda q, k: k < f[0][q] or f[1][q] <= k < f[2][q])
    check(m.RowRangeMask(0, f[0]) | m.RowRangeMask(f[1], f[2]), dense, 64)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("arrays", [1, 2, 4])
def test_columns(seed, arrays):
    rng = np.random.default_rng([seed, arrays])
    q_len, kv_len = LENGTHS[seed % 3]
    lts, lte, uts, ute = rng.integers(0, q_len + 1, (4, kv_len))
    if seed % 2:  # documents: what FlashMask is made for
        lts = np.searchsorted(np.sort(rng.integers(0, q_len, 5)), np.arange(kv_len), side="right") * q_len // 6
        uts, ute = np.zeros(kv_len, int), np.arange(kv_len) // 2
    none, all_rows = np.zeros(kv_len, int), np.full(kv_len, q_len)
    if arrays == 1:
        mask, dense = m.ColumnRangeMask(lts), definitions.flashmask(q_len, kv_len, lts, all_rows, none, none, False)
    elif arrays == 2:  # without causal: LTS and UTE
        mask = m.ColumnRangeMask(lts, upper_end=ute)
        dense = definitions.flashmask(q_len, kv_len, lts, all_rows, none, ute, False)
    else:
        mask = m.ColumnRangeMask(lts, lte, uts, ute)
        dense = definitions.flashmask(q_len, kv_len, lts, lte, uts, ute, False)
    check(mask, dense, int(rng.choice([32, 64])))
    causal = definitions.flashmask(q_len, kv_len, lts, lte, none, none, True)
    check(m.CausalMask() & m.ColumnRangeMask(lts, lte), causal, 32)


@pytest.mark.parametrize("seed", range(12))
def test_slices(seed):
    rng = np.random.default_rng(seed)
    q_len, kv_len = LENGTHS[seed % 3]
    n = int(rng.integers(0, 9))
    q_ranges, kv_ranges = (np.sort(rng.integers(0, size + 1, (n, 2))).astype(np.int32) for size in (q_len, kv_len))
    if seed % 3 == 0 and n:  # a partition, as it is used
        ends = np.sort(rng.integers(0, q_len + 1, n))
        q_ranges = np.stack([np.append(0, ends[:-1]), ends], 1).astype(np.int32)
    kinds = rng.integers(0, 4, n)
    dense = definitions.slices(q_len, kv_len, q_ranges.tolist(), kv_ranges.tolist(), kinds.tolist())
    mask = m.SliceMask(q_ranges, kv_ranges, kinds)
    check(mask, dense, int(rng.choice([32, 64])))
    names = ["full", "causal", "inv_causal", "bi_causal"]
    same = m.SliceMask(q_ranges, kv_ranges, [names[kind] for kind in kinds])
    np.testing.assert_array_equal(same.bind(q_len, kv_len, block_size=32).to_dense()[0, 0], dense)
    if seed < 3:
        bind = jax.jit(lambda mask: mask.bind(q_len, kv_len, block_size=32))
        np.testing.assert_array_equal(bind(mask).to_dense()[0, 0], dense)


WINDOWS = [(None, None), (None, 0), (7, 0), (5, 3), (None, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_sequences(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    q_lengths = rng.integers(0, 40, n).astype(np.int32)
    kv_lengths = q_lengths if seed % 2 else rng.integers(0, 50, n).astype(np.int32)
    starts, given = np.cumsum(kv_lengths) - kv_lengths, None
    if seed % 4 >= 2:  # padded or gappy
        starts = given = (np.arange(n) * 55 + rng.integers(0, 5, n)).astype(np.int32)
    q_len = int(q_lengths.sum()) + int(rng.integers(1, 20))
    kv_len = int((starts + kv_lengths).max()) + int(rng.integers(1, 20))
    (left, right), align = WINDOWS[seed % 5], ("start", "end")[seed % 2 if seed % 3 else 0]
    prefix = np.zeros(n, np.int32) if left is not None else rng.integers(0, 30, n).astype(np.int32)
    mask = m.BlockDiagonalMask(
        q_lengths,
        None if kv_lengths is q_lengths else kv_lengths,
        kv_starts=given,
        window=(left, right),
        align=align,  # pyright: ignore[reportArgumentType]
        prefix=prefix if prefix.any() else 0,
    )
    dense = definitions.block_diagonal(q_len, kv_len, q_lengths, kv_lengths, starts, left, right, align, prefix)
    for block_size in (32, 64):
        check(mask, dense, block_size)
        grid = Grid(q_len, kv_len, block_size, block_size)
        assert count_codes(mask, grid)[1] <= mask._partial_bound(grid)
    if seed < 6:
        bind = jax.jit(lambda mask: mask.bind(q_len, kv_len, block_size=32))
        np.testing.assert_array_equal(bind(mask).to_dense()[0, 0], dense)


def test_sequences_differ_per_example():
    lengths = np.array([[30, 0, 34], [10, 50, 4]], np.int32)
    ids = np.stack([np.repeat(np.arange(3), row) for row in lengths])
    mask = m.BlockDiagonalMask(lengths, window=(None, 0))
    expected = (ids[:, None, :, None] == ids[:, None, None]) & np.tri(64, dtype=bool)
    np.testing.assert_array_equal(mask.bind(64, block_size=32).to_dense(), expected)
    bound = jax.jit(lambda mask: mask.bind(64, block_size=32))(mask)
    np.testing.assert_array_equal(bound.to_dense(), expected)
    long = jax.jit(lambda lengths: m.BlockDiagonalMask(lengths).bind(4096, block_size=32))(jnp.full(64, 64))
    assert long.bit_tiles.shape[2] == 5 * 128, "bit tiles at the ends of sequences alone"
    long.check()


def test_prefix_lm_by_document():
    documents, prefix = np.array([20, 44]), np.array([5, 30])
    start, own = np.array([0] * 20 + [20] * 44), np.repeat(prefix, documents)
    dense = definitions.pairs(64, 64, lambda q, k: start[q] == start[k] and (k <= q or k - start[k] < own[k]))
    check(m.BlockDiagonalMask(documents, window=(None, 0), prefix=prefix), dense, 32)


@pytest.mark.parametrize(("length", "block"), [(50, 8), (64, 16), (33, 33), (40, 1), (40, 100)])
def test_block_diffusion(length, block):
    for block_size in (32, 64):
        check(m.BlockDiffusionMask(length, block), definitions.block_diffusion(length, block), block_size)


def test_arrays_per_example_and_head():
    rng = np.random.default_rng(0)
    lts = rng.integers(0, 65, (2, 3, 64)).astype(np.int32)
    expected = lts[:, :, None] > np.arange(64)[:, None]
    mask = m.ColumnRangeMask(lts)
    assert (mask.batch, mask.heads) == (2, 3)
    np.testing.assert_array_equal(mask.bind(64, block_size=32).to_dense(), expected)
    bind = jax.jit(lambda mask: mask.bind(64, block_size=32))
    np.testing.assert_array_equal(bind(mask).to_dense(), expected)
    per_head = m.RowRangeMask(0, lts[:1])
    np.testing.assert_array_equal(bind(per_head).to_dense(), np.arange(64) < lts[:1, ..., None])
    scalar = jax.jit(lambda n: m.RowRangeMask(0, n).bind(64, block_size=32))(jnp.int32(9))
    np.testing.assert_array_equal(scalar.to_dense()[0, 0], np.broadcast_to(np.arange(64) < 9, (64, 64)))
    kinds = np.array([[0], [1]], np.int32)
    slices = bind(m.SliceMask([[0, 64]], [[0, 64]], kinds)).to_dense()[:, 0]
    np.testing.assert_array_equal(slices, np.stack([np.ones((64, 64), bool), np.tri(64, dtype=bool)]))


def test_no_tokens_and_no_sequences():
    for mask, q_len, kv_len in (
        (m.RowRangeMask([], []), 0, 5),
        (m.ColumnRangeMask([]), 40, 0),
        (m.TreeMask([]), 0, 5),
        (m.BlockDiagonalMask([]), 40, 40),
        (m.SliceMask([], []), 40, 40),
        (m.VerticalSlashMask([], []), 40, 40),
    ):
        assert not np.asarray(mask.bind(q_len, kv_len, block_size=32).to_dense()).any()


def test_equality_and_text():
    assert m.RowRangeMask(0, 5) == m.RowRangeMask(np.int64(0), 5) != m.RowRangeMask(0, 6)
    assert hash(m.RowRangeMask(0, 5)) == hash(m.RowRangeMask(0, 5))
    with pytest.raises(TypeError, match=r"unhashable mask: ColumnRangeMask\(int32\[3\]\) holds an array"):
        hash(m.ColumnRangeMask([1, 2, 3]))
    assert repr(m.RowRangeMask(0, [5, 6])) == "RowRangeMask(0, int32[2])"
    assert repr(m.SliceMask([[0, 2]], [[0, 2]])) == "SliceMask(int32[1,2], int32[1,2], int32[1])"
    assert repr(m.BlockDiffusionMask(8, 2)) == "BlockDiffusionMask(8, 2)"
    sequences = m.BlockDiagonalMask([2], window=(None, 0), align="end", prefix=1)
    assert repr(sequences) == "BlockDiagonalMask(int32[1], window=(None, 0), align='end', prefix=1)"


BAD = [
    (lambda: m.RowRangeMask([0.5], 3), TypeError, r"RowRangeMask: begin must hold integers \[T\]"),  # pyright: ignore
    (lambda: m.RowRangeMask(0, 1.5), TypeError, "RowRangeMask: end must be an int, .* or integers, one per query"),
    (lambda: m.RowRangeMask(np.zeros((1, 1, 1, 4), int), 3), ValueError, r"given \(1, 1, 1, 4\)"),
    (lambda: m.RowRangeMask(0, [1, 2]).bind(3), ValueError, r"end has shape \(2,\); expected .* q_len=3; give one"),
    (lambda: m.ColumnRangeMask([1, 2]).bind(2, 3), ValueError, r"lower_start has shape \(2,\); expected .* kv_len=3"),
    (lambda: m.ColumnRangeMask([1], [1], [0]), ValueError, "upper_end must be given with upper_start"),
    (lambda: m.SliceMask([[0, 2]], [[0, 2]], "causl"), ValueError, "kinds must be of full, causal, .* given 'causl'"),
    (lambda: m.SliceMask([[0, 2]], [[0, 2], [2, 4]]), ValueError, "must have as many slices"),
    (lambda: m.SliceMask([0, 2], [[0, 2]]), ValueError, r"q_ranges must be \[n, 2\] or \[B\|1, n, 2\]"),
    (lambda: m.SliceMask([[0, 2.5]], [[0, 2]]), TypeError, "q_ranges must hold integers"),
    (
        lambda: m.SliceMask([[0, 2]], [[0, 5]]).bind(4),
        ValueError,
        r"kv_ranges\[0\] = \[0, 5\] must lie in \[0, kv_len=4",
    ),
    (lambda: m.BlockDiagonalMask([3, 2]).bind(4), ValueError, "q_lengths are 5 tokens, got q_len=4"),
    (
        lambda: m.BlockDiagonalMask([2], [5]).bind(4),
        ValueError,
        "kv_lengths are 5 tokens, got kv_len=4; give kv_starts",
    ),
    (lambda: m.BlockDiagonalMask([2], [2, 3]), ValueError, "must have one number per sequence each"),
    (lambda: m.BlockDiagonalMask([2], align="top"), ValueError, "align must be 'start' or 'end'"),  # pyright: ignore
    (lambda: m.BlockDiagonalMask([2], window=(3, 0), prefix=2), ValueError, "unbounded at the left"),
    (lambda: m.BlockDiagonalMask([-1, 5]).bind(4), ValueError, "q_lengths must be at least 0, given -1"),
    (lambda: m.SliceMask([[0, 2]], [[0, 2]], np.array([7])), ValueError, "kinds must be of full, .* given 7"),
    (lambda: m.SliceMask([[0, 2]], [[0, 2]], [[1]]), ValueError, r"kinds must be of full, .* given \[1\]"),  # pyright: ignore
    (lambda: m.BlockDiffusionMask(0, 2), ValueError, "length must be at least 1"),
    (lambda: m.BlockDiffusionMask(8, 2).bind(8), ValueError, "needs q_len=16, noised and clean, got 8; give length=4"),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
