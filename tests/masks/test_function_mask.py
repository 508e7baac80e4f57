"""Functions of (b, h, q_idx, kv_idx), as FlexAttention's mask_mod."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk import sparse_attention

B, N, T = 2, 3, 64
LENGTHS = np.array([40, 7])
WIDTHS = np.array([3, 20, 50])
Q, K = np.arange(T)[:, None], np.arange(T)


def padded(b, h, q_idx, kv_idx):
    return kv_idx < LENGTHS[b]


def windows(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < WIDTHS[h]


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


DENSE = {
    padded: np.broadcast_to(LENGTHS[:, None, None, None] > K, (B, 1, T, T)),
    windows: (WIDTHS[:, None, None] > Q - K)[None],
    causal: (Q >= K)[None, None],
}


def attend(mask, q):
    return sparse_attention(q, q, q, mask=mask, implementation="xla")


def test_the_call_says_the_sizes():
    q = jax.random.normal(jax.random.key(0), (B, T, N, 8))
    mask = m.FunctionMask(padded) & m.FunctionMask(windows) & m.FunctionMask(causal)
    dense = DENSE[padded] & DENSE[windows] & DENSE[causal]
    np.testing.assert_allclose(attend(mask, q), attend(dense, q), atol=1e-6)
    bound = m.as_block_mask(mask, T, T, batch=B, heads=N, block_size=32)
    np.testing.assert_array_equal(bound.to_dense(), dense)
    # What a function does not use is shared.
    assert m.as_block_mask(m.FunctionMask(causal), T, T, batch=B, heads=N).shape == (1, 1, T, T)
    assert m.as_block_mask(m.FunctionMask(padded), T, T, batch=B, heads=N).shape == (B, 1, T, T)
    assert m.as_block_mask(m.FunctionMask(padded), T, T, batch=1, heads=N).shape == (1, 1, T, T), "no stale sizes"


def test_sizes_may_be_given():
    assert m.FunctionMask(causal).bind(T).shape == (1, 1, T, T), "uses neither"
    given: tuple[tuple[Any, dict[str, Any]], ...] = ((padded, {"batch": B}), (windows, {"heads": N}))
    for fn, sizes in given:
        mask = m.FunctionMask(fn, **sizes)
        assert (mask.batch, mask.heads) == DENSE[fn].shape[:2]
        np.testing.assert_array_equal(mask.bind(T, block_size=32).to_dense(), DENSE[fn])
        assert mask == m.FunctionMask(fn, **sizes) != m.FunctionMask(fn)
        assert hash(mask) == hash(m.FunctionMask(fn, **sizes))
    assert repr(m.FunctionMask(windows, heads=3)) == "FunctionMask(windows, heads=3)"


def test_heads_of_a_multi_head_mask_are_told_their_number():
    bound = m.MultiHeadMask([m.FunctionMask(windows), m.CausalMask(), m.FunctionMask(windows)]).bind(T, block_size=32)
    expected = np.stack([DENSE[windows][0, 0], DENSE[causal][0, 0], DENSE[windows][0, 2]])
    np.testing.assert_array_equal(bound.to_dense()[0], expected)


def test_traced():
    """A function that closes over traced arrays, and one that meets a traced mask."""
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), -1)

    @jax.jit
    def bind(widths, ids):
        near = m.FunctionMask(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < widths[h] + 0 * b, batch=B, heads=N)
        far = m.FunctionMask(lambda b, h, q_idx, kv_idx: kv_idx >= jnp.asarray(LENGTHS)[b])
        return m.as_block_mask(near & far & m.SegmentMask(ids), T, T, batch=B, heads=N, block_size=32)

    expected = DENSE[windows] & ~DENSE[padded] & (ids[:, None, :, None] == ids[:, None, None])
    np.testing.assert_array_equal(bind(jnp.asarray(WIDTHS), ids).to_dense(), expected)


BAD = [
    (lambda: m.FunctionMask(padded).bind(T), ValueError, r"batch must be given .*write FunctionMask\(padded, batch="),
    (lambda: m.FunctionMask(windows).bind(T), ValueError, r"heads must be given .* pass the mask to sparse_attention"),
    (lambda: m.FunctionMask(lambda q, k: q > k, heads=2), TypeError, r"batch and heads must be given with fn\(b, h, q"),
    (lambda: m.FunctionMask(padded, batch=0), ValueError, "batch must be at least 1"),
    (lambda: m.FunctionMask(padded, batch=3).bind(T), IndexError, "out of bounds"),
    (
        lambda: attend(m.FunctionMask(padded, batch=B), jnp.zeros((3, T, N, 8))),
        ValueError,
        "mask has batch 2, the call has batch 3",
    ),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
