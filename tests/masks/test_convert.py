"""`as_block_mask`: what the attention layer accepts, refuses and keeps."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk import sparse_attention
from jax_bsk.masks import convert

CALL = {"batch": 2, "heads": 3}


@pytest.fixture(autouse=True)
def empty_cache():
    convert._cache.clear()
    yield
    convert._cache.clear()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "shape", [(40, 50), (3, 40, 50), (1, 40, 50), (2, 3, 40, 50), (2, 1, 40, 50), (2, 1, 1, 50), (1, 3, 40, 1), (1, 50)]
)
def test_boolean_arrays(shape, traced):
    array = np.random.default_rng(0).random(shape) < 0.5

    def make(x):
        return m.as_block_mask(x, 40, 50, **CALL, block_size=32)

    expected = np.broadcast_to(array.reshape((1,) * (4 - len(shape)) + shape), (2, 3, 40, 50))
    got = (jax.jit(make) if traced else make)(array).to_dense()
    np.testing.assert_array_equal(np.broadcast_to(got, (2, 3, 40, 50)), expected)


def test_block_mask_passes_through():
    mask = m.CausalMask().bind(40, 50, block_size=32)
    assert m.as_block_mask(mask, 40, 50, **CALL, block_size=64) is mask
    with pytest.raises(ValueError, match="BlockMask for q_len=40, kv_len=50, but the call has q_len=40, kv_len=40"):
        m.as_block_mask(mask, 40, 40, **CALL)


MISFITS = [
    (m.SegmentMask(np.zeros((5, 40), int)), "mask has batch 5, the call has batch 2"),
    (m.MultiHeadMask([m.FullMask()] * 2), "mask has 2 heads, the call has 3.*query head"),
    (m.MultiHeadMask([m.FullMask()] * 2).bind(40), "mask has 2 heads, the call has 3"),
    (np.ones((5, 1, 40, 40), bool), "mask has batch 5"),
    (np.ones((4, 40, 40), bool), "mask has 4 heads"),
    (np.ones((30, 40), bool), r"array has shape \(30, 40\)"),
    (np.ones(40, bool), r"given shape \(40,\)"),
]


@pytest.mark.parametrize("n", range(len(MISFITS)))
def test_misfits_are_refused(n):
    mask, message = MISFITS[n]
    with pytest.raises(ValueError, match=message):
        m.as_block_mask(mask, 40, 40, **CALL)


@pytest.mark.parametrize("mask", ["causal", None, [[True]], 1])
def test_other_types_are_refused(mask):
    with pytest.raises(TypeError, match="mask must be a Mask, a BlockMask or a boolean array, given"):
        m.as_block_mask(mask, 40, 40, **CALL)


def test_structural_masks_are_built_once():
    a = m.as_block_mask(m.CausalMask() & m.LocalMask(9), 200, 200, **CALL)
    assert m.as_block_mask(m.CausalMask() & m.LocalMask(9), 200, 200, **CALL) is a
    assert a.transpose() is m.as_block_mask(m.CausalMask() & m.LocalMask(9), 200, 200, batch=7, heads=1).transpose()
    for other in (
        m.as_block_mask(m.CausalMask() & m.LocalMask(8), 200, 200, **CALL),
        m.as_block_mask(m.CausalMask() & m.LocalMask(9), 201, 200, **CALL),
        m.as_block_mask(m.CausalMask() & m.LocalMask(9), 200, 200, **CALL, block_size=64),
    ):
        assert other is not a
    inside = []
    jax.jit(lambda x: inside.append(m.as_block_mask(m.CausalMask() & m.LocalMask(9), 200, 200, **CALL)) or x)(1.0)
    assert inside[0] is a


def test_cache_is_bounded():
    masks = [m.as_block_mask(m.LocalMask(n), 64, 64, **CALL) for n in range(3 * convert._MAX_ENTRIES)]
    assert len(convert._cache) == convert._MAX_ENTRIES
    assert m.as_block_mask(m.LocalMask(3 * convert._MAX_ENTRIES - 1), 64, 64, **CALL) is masks[-1]
    assert m.as_block_mask(m.LocalMask(0), 64, 64, **CALL) is not masks[0]


def test_nothing_traced_is_kept():
    def make(shift):
        return m.as_block_mask(m.FunctionMask(lambda q, k: q + shift >= k), 64, 64, **CALL)

    mask = jax.jit(make)(3)
    assert not convert._cache
    np.testing.assert_array_equal(mask.to_dense(), m.CausalMask(3).bind(64).to_dense())


def test_errors_of_a_mask_with_arrays_are_not_of_its_hash():
    wrong = m.ArrayMask(np.ones((40, 40), bool)) & m.FunctionMask(lambda q, k: q + None)
    with pytest.raises(TypeError, match="unsupported operand") as raised:
        m.as_block_mask(wrong, 40, 40, **CALL)
    assert raised.value.__context__ is None  # no "unhashable mask" that the traceback begins with


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (m.CausalMask, r"given the class CausalMask; make an instance of it, CausalMask\("),
        (lambda q, k: q >= k, r"given function; wrap a function of \(q_idx, kv_idx\) in FunctionMask"),
        ("causal", r"given str 'causal'; make a mask of jax_bsk.masks, e.g. CausalMask\(\)"),
    ],
)
def test_what_is_taken_for_a_mask(mask, message):
    q = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(TypeError, match=message):
        sparse_attention(q, q, q, mask=mask)
    with pytest.raises(TypeError, match=message):
        m.as_block_mask(mask, 4, 4, batch=1, heads=1)
    with pytest.raises(TypeError, match=message.partition("; ")[2]):
        m.BlockMask.from_mask(mask, 4)
