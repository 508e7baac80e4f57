"""Vertical lines and slashes, trees, and functions inside of a mask that bounds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk.masks.algebra.shifted import at_positions
from jax_bsk.qa.testing import mask_draws
from tests.masks import definitions
from tests.masks.definitions import check


@pytest.mark.parametrize("seed", range(10))
def test_vertical_and_slash(seed):
    rng = np.random.default_rng(seed)
    q_len, kv_len = [(100, 100), (70, 130), (130, 65)][seed % 3]
    vertical = rng.integers(-1, kv_len + 3, int(rng.integers(0, 6)))
    slash = np.arange(40) if seed % 4 == 0 else rng.integers(-1, q_len + 3, int(rng.integers(0, 6)))
    mask = m.VerticalSlashMask(vertical, slash)
    dense = definitions.vertical_slash(q_len, kv_len, vertical, slash)
    check(mask, dense, int(rng.choice([32, 64])))
    if seed < 3:
        bind = jax.jit(lambda mask: mask.bind(q_len, kv_len, block_size=32))
        np.testing.assert_array_equal(bind(mask).to_dense()[0, 0], dense)


def test_lines_differ_per_head():
    vertical, slash = np.array([[[3], [50]]]), np.array([[[0, 9], [0, -1]]])
    bound = m.VerticalSlashMask(vertical, slash).bind(64, block_size=32)
    dense = [definitions.vertical_slash(64, 64, vertical[0, h], slash[0, h]) for h in range(2)]
    np.testing.assert_array_equal(bound.to_dense()[0], np.stack(dense))


def random_parents(rng: np.random.Generator, n: int, chains: bool) -> np.ndarray:
    parents = np.array([int(rng.integers(-1, i)) if i else -1 for i in range(n)])
    return np.where(rng.random(n) < 0.9, np.arange(n) - 1, parents) if chains else parents


@pytest.mark.parametrize("seed", range(10))
def test_tree(seed):
    rng = np.random.default_rng(seed)
    n, before = int(rng.integers(1, 120)), int(rng.choice([0, 70]))
    parents = random_parents(rng, n, chains=bool(seed % 2)).astype(np.int32)
    dense = definitions.tree(parents, before)
    for block_size in (32, 64):
        check(m.TreeMask(parents), dense, block_size)
    if seed < 3:
        bind = jax.jit(lambda mask: mask.bind(n, n + before, block_size=32))
        np.testing.assert_array_equal(bind(m.TreeMask(parents)).to_dense()[0, 0], dense)


def test_trees_differ_per_example():
    parents = np.array([[-1, 0, 1, 1], [-1, 0, 0, -1]], np.int32)
    expected = np.stack([definitions.tree(row, 5) for row in parents])
    bind = jax.jit(lambda mask: mask.bind(4, 9, block_size=32))
    np.testing.assert_array_equal(bind(m.TreeMask(parents)).to_dense()[:, 0], expected)
    np.testing.assert_array_equal(m.TreeMask(parents).bind(4, 9, block_size=32).to_dense()[:, 0], expected)


def test_a_prompt_with_many_answers():
    """A tree of segments, an expression of segments, and column ranges are the same mask."""
    ids = np.repeat([0, 1, 2, 3], [30, 20, 34, 16])  # a prompt and three answers
    first = np.searchsorted(ids, [1, 2, 3])
    parents = np.arange(100) - 1
    parents[first] = 29
    ends = np.where(ids == 0, 100, np.searchsorted(ids, ids, side="right"))
    dense = definitions.pairs(100, 100, lambda q, k: k <= q and (ids[k] in (0, ids[q])))
    prompt = m.SegmentMask(np.zeros(100, int), ids)
    for mask in (
        m.TreeMask(parents),
        m.CausalMask() & (m.SegmentMask(ids) | prompt),
        m.CausalMask() & m.ColumnRangeMask(ends),
    ):
        check(mask, dense, 32)


# ---- functions that know their bounds -------------------------------------------------------------------------------


def test_a_function_is_asked_inside_of_its_bound_alone():
    asked = set()

    def odd(q, k):
        asked.update(zip(*(x.ravel().tolist() for x in np.broadcast_arrays(q // 32, k // 32)), strict=True))
        return (q + k) % 2 == 1

    window = m.LocalMask((20, 0))
    mask = m.FunctionMask(odd, within=window)
    dense = definitions.pairs(320, 320, lambda q, k: (q + k) % 2 == 1 and 0 <= q - k <= 20)
    check(mask, dense, 32)
    assert asked <= {(i, j) for i in range(10) for j in (i, i - 1)}, "blocks of 32 that the window visits"
    for other, expected in (
        (~mask, ~dense),
        (mask | m.GlobalMask(1), dense | (np.arange(320) == 0) | (np.arange(320) == 0)[:, None]),
    ):
        np.testing.assert_array_equal(other.bind(320, block_size=32).to_dense()[0, 0], expected)


def test_bounds_combine_with_everything_else():
    lengths = np.array([40, 64])

    def heads(b, h, q, k):
        return (q % 3 >= h) & (k < jnp.asarray(lengths)[b])

    ids = np.stack([np.arange(64) // 20, np.arange(64) // 9]).astype(np.int32)
    mask = m.FunctionMask(heads, batch=2, heads=2, within=m.CausalMask() & m.SegmentMask(ids))
    assert (mask.batch, mask.heads) == (2, 2)
    q, k = np.arange(64)[:, None], np.arange(64)
    expected = np.stack(
        [[(q % 3 >= h) & (k < lengths[b]) & (q >= k) & (ids[b][:, None] == ids[b]) for h in range(2)] for b in range(2)]
    )
    np.testing.assert_array_equal(mask.bind(64, block_size=32).to_dense(), expected)
    bound = jax.jit(lambda mask: mask.bind(64, block_size=32))(mask)
    np.testing.assert_array_equal(bound.to_dense(), expected)
    later = at_positions(m.FunctionMask(lambda q, k: (q + k) % 2 == 1, within=m.LocalMask((9, 0))), 50, 4, 64)
    positions = 50 + np.arange(4)[:, None]
    expected = ((positions + k) % 2 == 1) & (positions - k <= 9) & (k <= positions)
    np.testing.assert_array_equal(later.bind(4, 64, block_size=32).to_dense()[0, 0], expected)


@pytest.mark.parametrize("name", mask_draws.DRAWS)
def test_decoding(name):
    """Queries that stand further on: the rows of the whole sequence's mask."""
    mask, dense = mask_draws.DRAWS[name](np.random.default_rng(5), 96, 96)
    later = at_positions(mask, 50, 4, 96).bind(4, 96, block_size=32)
    np.testing.assert_array_equal(later.to_dense()[0, 0], dense[50:54])


def test_equality_and_text():
    def f(q, k):
        return q > k

    assert m.FunctionMask(f, within=m.LocalMask(3)) == m.FunctionMask(f, within=m.LocalMask(3)) != m.FunctionMask(f)
    assert hash(m.FunctionMask(f, within=m.LocalMask(3))) == hash(m.FunctionMask(f, within=m.LocalMask(3)))
    assert repr(m.FunctionMask(f, within=m.LocalMask(3))).endswith("f, within=LocalMask((3, 3)))")
    assert repr(m.TreeMask([-1, 0])) == "TreeMask(int32[2])"
    assert repr(m.VerticalSlashMask([1], [])) == "VerticalSlashMask(int32[1], int32[0])"


BAD = [
    (lambda: m.VerticalSlashMask([0.5], [0]), TypeError, "vertical must hold integers"),  # pyright: ignore
    (lambda: m.VerticalSlashMask([0], 3), ValueError, r"slash must have a shape of \[n\]"),
    (lambda: m.TreeMask([0.0]), TypeError, "parents must hold integers"),
    (lambda: m.TreeMask([-1, 2, 0]), ValueError, r"parents\[1\] = 2 must come before its child; order the tokens"),
    (lambda: m.TreeMask(np.zeros((1, 1, 1), int)), ValueError, r"parents must be \[n\] or \[B\|1, n\]"),
    (lambda: m.TreeMask([-1, 0]).bind(3), ValueError, "give one parent per query"),
    (lambda: m.TreeMask([-1, 0]).bind(2, 1), ValueError, "at least as many keys, got kv_len=1"),
    (lambda: m.FunctionMask(lambda q, k: q > k, within=np.ones(3)), TypeError, "within must be a mask, given ndarray"),  # pyright: ignore
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
