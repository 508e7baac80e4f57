"""Combination, structure (equality, hash, pytree), printing, and the mistakes people make with `and`."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m


@pytest.mark.parametrize("seed", range(160))
def test_composite_against_brute_force(seed, random_mask, random_sizes, assert_well_formed):
    rng = np.random.default_rng(1000 + seed)
    q_len, kv_len, block_size = random_sizes(rng)
    mask, dense = random_mask(rng, q_len, kv_len, depth=3)
    block_mask = mask.bind(q_len, kv_len, block_size=block_size)
    assert_well_formed(block_mask)
    expected = np.broadcast_to(dense, block_mask.shape)
    np.testing.assert_array_equal(block_mask.to_dense(), expected, err_msg=f"{mask} {q_len}x{kv_len} {block_size}")


def test_a_diagonal_does_not_share_tiles_where_other_parts_differ():
    """On the diagonal `global` is full in its block, empty elsewhere: causal alone there, with the window here."""
    mask = m.CausalMask() & (m.LocalMask(5) | m.GlobalMask(64))
    q, k = np.arange(256)[:, None], np.arange(256)
    expected = (q >= k) & ((q - k <= 5) | (q < 64) | (k < 64))
    bound = mask.bind(256, block_size=64)
    np.testing.assert_array_equal(bound.to_dense()[0, 0], expected)
    assert bound.bit_tiles.shape[2] == 3, "causal, causal and window, and the window's corner"


def test_laws():
    a, b = m.CausalMask(), m.LocalMask(40)
    pairs = [
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (a & (b | m.FullMask()), a),
        (a | ~a, m.FullMask()),
        (a & ~a, ~m.FullMask()),
    ]
    for left, right in pairs:
        np.testing.assert_array_equal(
            left.bind(150, block_size=32).to_dense(), right.bind(150, block_size=32).to_dense()
        )
    assert ~~a is a
    assert (a & b) & a == a & (b & a), "flattened, so that printing and hashing do not depend on parentheses"


def test_truth_value_names_the_mistake():
    with pytest.raises(TypeError, match=r"`&`, `\|` and `~`, not with `and`"):
        m.CausalMask() and m.LocalMask(3)  # pyright: ignore[reportUnusedExpression]
    with pytest.raises(TypeError, match="mask is not None"):
        bool(m.FullMask())


@pytest.mark.parametrize("other", [np.ones((2, 2), bool), jnp.ones((2, 2), bool), True, None, [1]])
def test_other_operands_are_refused_on_both_sides(other):
    remedy = "ArrayMask" if isinstance(other, np.ndarray | jax.Array) else "both sides must be masks"
    for combine in (lambda x: m.FullMask() & x, lambda x: x & m.FullMask(), lambda x: x | m.FullMask()):
        with pytest.raises(TypeError, match=remedy):
            combine(other)


def test_immutable():
    mask = m.CausalMask()
    with pytest.raises(AttributeError, match="masks are immutable: cannot set offset"):
        mask.offset = 3


def function(q, k):
    return q >= k


SAME = [
    lambda: m.FullMask(),
    lambda: m.CausalMask(3),
    lambda: m.LocalMask((None, 3)),
    lambda: m.ChunkedMask(7),
    lambda: m.PrefixLMMask(7),
    lambda: m.GlobalMask([4, 2]),
    lambda: m.DilatedMask(2, 5),
    lambda: m.BigBirdMask(64, seed=1),
    lambda: m.FunctionMask(function),
    lambda: m.MultiHeadMask([m.CausalMask(), m.FullMask()]),
    lambda: m.CausalMask() & m.LocalMask(3) | ~m.GlobalMask(2),
]


@pytest.mark.parametrize("n", range(len(SAME)))
def test_equal_by_structure(n):
    mask = SAME[n]()
    assert mask == SAME[n]()
    assert hash(mask) == hash(SAME[n]())
    assert pickle.loads(pickle.dumps(mask)) == mask
    for other, make in enumerate(SAME):
        assert (mask == make()) == (n == other)
    assert mask != "mask"


def test_equality_with_arrays():
    ids = np.array([0, 0, 1])
    assert m.SegmentMask(ids) == m.SegmentMask(ids.copy())
    assert m.SegmentMask(ids) != m.SegmentMask(ids + 1)
    assert m.SegmentMask(ids) != m.SegmentMask(ids, ids)
    assert m.SegmentMask(ids) != m.SegmentMask(ids, contiguous=True)
    with pytest.raises(TypeError, match=r"unhashable mask: .*holds an array.*bind"):
        hash(m.SegmentMask(ids) & m.CausalMask())


REPR = {
    "CausalMask() & LocalMask((4, 0))": m.CausalMask() & m.LocalMask((4, 0)),
    "CausalMask(offset=2) | ~GlobalMask(3)": m.CausalMask(2) | ~m.GlobalMask(3),
    "~(CausalMask() & FullMask())": ~(m.CausalMask() & m.FullMask()),
    "(CausalMask() | FullMask()) & ChunkedMask(2)": (m.CausalMask() | m.FullMask()) & m.ChunkedMask(2),
    "MultiHeadMask([FullMask(), PrefixLMMask(2)])": m.MultiHeadMask([m.FullMask(), m.PrefixLMMask(2)]),
    "GlobalMask([1, 5])": m.GlobalMask([5, 1, 5]),
    "DilatedMask(2, window=(3, 3))": m.DilatedMask(2, 3),
    "SegmentMask(q_ids=int32[2,8], kv_ids=None, contiguous=True)": m.SegmentMask(
        np.zeros((2, 8), np.int32), contiguous=True
    ),
    "ArrayMask(array=bool[3,4])": m.ArrayMask(np.ones((3, 4), bool)),
    "FunctionMask(function)": m.FunctionMask(function),
    "BigBirdMask(block=64, window=3, global_blocks=1, random_blocks=3, seed=0)": m.BigBirdMask(64),
}


@pytest.mark.parametrize("text", REPR)
def test_repr(text):
    assert repr(REPR[text]) == text


@pytest.mark.parametrize("seed", range(20))
def test_pytree_round_trip(seed, random_mask):
    mask, _ = random_mask(np.random.default_rng(seed), 50, 60, depth=3)
    leaves, structure = jax.tree_util.tree_flatten(mask)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert jax.tree_util.tree_unflatten(structure, leaves) == mask
    assert [x.shape for x, _ in mask._arrays()] == [leaf.shape for leaf in leaves], (
        "arrays are told in the leaves' order"
    )


def test_mask_as_argument_of_jit_does_not_retrace():
    traces = []

    @jax.jit
    def entries(mask):
        traces.append(mask)
        return mask.bind(128, block_size=32).row_offsets

    entries(m.CausalMask() & m.SegmentMask(np.zeros(128, np.int32)))
    entries(m.CausalMask() & m.SegmentMask(np.ones(128, np.int32)))
    assert len(traces) == 1
    entries(m.CausalMask(1) & m.SegmentMask(np.ones(128, np.int32)))
    assert len(traces) == 2


def test_key_paths_name_the_fields():
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(m.SegmentMask([0, 1], [1, 0]))
    ]
    assert paths == [".q_ids", ".kv_ids"]


def test_batch_and_heads():
    ids = np.zeros((3, 10), int)
    per_head = m.MultiHeadMask([m.CausalMask(), m.SegmentMask(ids)])
    assert (per_head.batch, per_head.heads) == (3, 2)
    assert (m.CausalMask().batch, m.CausalMask().heads) == (1, 1)
    with pytest.raises(ValueError, match=r"batch sizes \[3, 4\]; they must be equal, or 1"):
        _ = (m.SegmentMask(ids) & m.ArrayMask(np.ones((4, 1, 10, 10), bool))).batch
    with pytest.raises(ValueError, match=r"head sizes \[2, 5\]"):
        (per_head & m.ArrayMask(np.ones((5, 10, 10), bool))).bind(10)
