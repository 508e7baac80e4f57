"""`&` with a BlockMask: exact, in the chosen lists, on the host and traced; and what cannot be combined."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk import selection, sparse_attention

B, H, T, S = 2, 2, 70, 100
RNG = np.random.default_rng(0)
CHOSEN = RNG.random((B, H, 3, 4)) < 0.7
CHOSEN[0, 0, 1] = False
IDS = np.sort(RNG.integers(0, 4, (B, S)), -1).astype(np.int32)
OTHERS = {
    "full": m.FullMask(),
    "nothing": ~m.FullMask(),
    "causal": m.CausalMask(5),
    "offsets": m.CausalMask(np.array([0, 40], np.int32)),
    "segments": m.SegmentMask(IDS[:, :T], IDS),
    "array": m.ArrayMask(RNG.random((1, H, T, S)) < 0.5),
    "heads": m.MultiHeadMask([m.LocalMask(9), m.SegmentMask(IDS[:, 3 : 3 + T], IDS)]),
    "function": m.FunctionMask(lambda q, k: (q + k) % 3 == 0),
    "blocks": m.LocalMask(30).bind(T, S, block_size=32),
    "blocks per head": m.ArrayMask(RNG.random((B, H, T, S)) < 0.5).bind(T, S, block_size=32),
}
LISTS = ("row_offsets", "kv_blocks")
BASES = {
    "whole blocks": m.BlockMask.from_block_mask(CHOSEN, q_len=T, kv_len=S, block_size=32),
    "tiles": m.BlockMask.from_block_mask(CHOSEN[:1, :1], q_len=T, kv_len=S, block_size=32, mask=m.LocalMask((33, 20))),
}


def dense(mask):
    return (mask if isinstance(mask, m.BlockMask) else mask.bind(T, S, block_size=32)).to_dense()


def check(base, results):
    for name, result in results.items():
        expected = base.to_dense() & dense(OTHERS[name])
        result.check()
        np.testing.assert_array_equal(result.to_dense(), expected, err_msg=name)
        for field in LISTS:
            kept, given = getattr(result, field), getattr(base, field)
            np.testing.assert_array_equal(kept, np.broadcast_to(given, kept.shape), err_msg=name)


@pytest.mark.parametrize("name", BASES)
def test_on_the_host(name):
    check(BASES[name], {other: BASES[name] & mask for other, mask in OTHERS.items()})
    swapped = OTHERS["segments"] & BASES[name]
    assert isinstance(swapped.tiles, np.ndarray)
    np.testing.assert_array_equal(swapped.to_dense(), (BASES[name] & OTHERS["segments"]).to_dense())


TRACED = {"whole blocks": ["nothing", "segments", "array", "blocks"], "tiles": ["full", "causal", "offsets", "heads"]}


@pytest.mark.parametrize("name", BASES)
def test_traced(name):
    """The lists are traced, or the mask, or both."""
    base = BASES[name]
    others = {other: OTHERS[other] for other in TRACED[name]}
    known = {other: mask for other, mask in others.items() if not jax.tree.leaves(mask)}
    given = {other: mask for other, mask in others.items() if other not in known}

    @jax.jit
    def combine(base, given):
        return {other: base & mask for other, mask in {**known, **given}.items()}

    results = combine(base, given)
    check(base, results)
    if "full" in results:
        assert results["full"].bit_tiles.shape[2] == base.bit_tiles.shape[2] + 1, "and the empty one"


def test_gates_still_belong_to_their_blocks():
    """Documents and a window on top of a selection with gates."""
    q = jax.random.normal(jax.random.key(0), (B, 64, H, 8))
    ids = np.sort(RNG.integers(0, 3, (B, 64)), -1).astype(np.int32)
    scores = jax.random.normal(jax.random.key(1), (B, H, 2, 2))

    @jax.jit
    def attend(q, ids, scores):
        chosen = selection.from_topk(scores, 1, q_len=64, block_size=32)
        gates = jnp.arange(1.0, chosen.kv_blocks.shape[-1] + 1)[None, None]
        mask = chosen & m.SegmentMask(ids) & m.LocalMask((9, 0))
        out = sparse_attention(q, q, q, mask=mask, gates=gates)
        return out, chosen, mask

    out, chosen, mask = attend(q, ids, scores)
    assert mask.kv_blocks.shape == chosen.kv_blocks.shape
    position = np.arange(64)
    delta = position[:, None] - position
    attended = chosen.to_dense() & (ids[:, None, :, None] == ids[:, None, None]) & (delta >= 0) & (delta <= 9)
    weights = np.where(attended, np.exp(jnp.einsum("btnh,bsnh->bnts", q, q) / np.sqrt(8)), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    row_gates = 1.0 + np.arange(2, dtype=np.float32)[position // 32]  # one entry per row
    expected = jnp.einsum("bnts,bsnh->btnh", weights * row_gates[None, None, :, None], q)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_moba_with_documents():
    """Lists on a device, without a trace, and a lazy mask on the left."""
    q = jax.random.normal(jax.random.key(0), (1, 96, 2, 8))
    ids = jnp.arange(96, dtype=jnp.int32) // 40
    mask = jax.jit(lambda q: selection.moba(q, q, top_k=2, block_size=32))(q)
    both = m.SegmentMask(ids, contiguous=True) & mask
    np.testing.assert_array_equal(both.to_dense(), mask.to_dense() & (np.asarray(ids)[:, None] == np.asarray(ids)))


@pytest.mark.parametrize("traced", [False, True])
def test_bad_rows_stay_bad(traced):
    """Kernels give NaN for them before and after."""
    base = BASES["whole blocks"]
    tiles = base.tiles.copy()
    tiles[0, 1, 0] = 7  # number of no tile, which tiles of the result must not take
    ids = base.kv_blocks.copy()
    ids[1, 0, 0] = 4
    broken = dataclasses.replace(base, tiles=tiles, kv_blocks=ids)
    combine = jax.jit(lambda a, b: a & b) if traced else (lambda a, b: a & b)
    for result in (combine(broken, m.CausalMask()), combine(base, broken), combine(broken, base)):
        for b, h, row in ((0, 1, 0), (1, 0, 0)):
            begin, end = np.asarray(result.row_offsets)[b, h, row : row + 2]
            numbers, blocks = (np.asarray(x)[b, h, begin:end] for x in (result.tiles, result.kv_blocks))
            assert (numbers >= result.bit_tiles.shape[2]).any() or (blocks >= 4).any()


def test_what_cannot_be_combined():
    base = BASES["tiles"]
    cases = [
        (lambda: base & np.ones((T, S), bool), TypeError, r"ndarray by `&`: wrap a boolean array in ArrayMask"),
        (lambda: np.ones((T, S), bool) & base, TypeError, r"ndarray by `&`: wrap a boolean array in ArrayMask"),
        (lambda: base & m.CausalMask, TypeError, r"the class CausalMask by `&`: make an instance of it, CausalMask\("),  # pyright: ignore[reportOperatorIssue]
        (lambda: m.FullMask() & m.CausalMask, TypeError, r"the class CausalMask by `&`: make an instance of it"),
        (lambda: m.FullMask() | (lambda q, k: q > k), TypeError, "wrap a function of .* in FunctionMask"),
        (lambda: "causal" & m.FullMask(), TypeError, "str 'causal' by `&`: both sides must be masks"),
        (lambda: base | m.CausalMask(), TypeError, r"blocks are chosen.*\(a \| b\)\.bind"),
        (lambda: m.CausalMask() | base, TypeError, "blocks of a BlockMask are chosen.*before `bind`"),
        (lambda: ~base, TypeError, r"cannot be inverted.*\(~mask\)\.bind"),
        (lambda: base and m.CausalMask(), TypeError, "no truth value.*mask is not None"),
        (
            lambda: base & m.FullMask().bind(T, S, block_size=64),
            ValueError,
            r"got \(70, 100, 32, 32\) and \(70, 100, 6",
        ),
        (lambda: base & m.SegmentMask(IDS), ValueError, r"last dimension of q_len=70"),
        (lambda: BASES["whole blocks"] & m.CausalMask(np.arange(3)), ValueError, "the same batch or 1, got 2 and 3"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()
