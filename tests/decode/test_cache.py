"""`decode.attention` over a contiguous cache and `decode.append`: token by token it is causal attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import decode, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask
from tests.util import assert_close

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 48, 4, 2, 16


def inputs(seed=0, length=LENGTH, heads=(HEADS, KV_HEADS, KV_HEADS)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((BATCH, length, n, HEAD_DIM), np.float32)) for n in heads]


@pytest.mark.parametrize("windowed", [False, True])
def test_token_by_token_is_causal_attention(windowed, implementation):
    """A prompt of 20 tokens, drafts of 3, then tokens one by one; the cache is NaN where nothing was written."""
    q, k, v = inputs()
    mask = CausalMask() & (LocalMask((9, 0)) | GlobalMask(4)) if windowed else CausalMask()
    expected = sparse_attention(q, k, v, mask=mask, implementation="xla")
    options: dict[str, Any] = {"window": 10, "sink_tokens": 4} if windowed else {}

    @jax.jit
    def step(q, k, v, keys, values, lengths):
        keys, values = decode.append(keys, k, lengths), decode.append(values, v, lengths)
        lengths = lengths + q.shape[1]
        out = decode.attention(q, keys, values, lengths, implementation=implementation, **options)
        return out, keys, values, lengths

    cache = jnp.full((BATCH, LENGTH + 16, KV_HEADS, HEAD_DIM), jnp.nan)
    state = cache, cache, jnp.zeros(BATCH, jnp.int32)
    ends = [20, 23, *range(24, 31)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        out, *state = step(*(x[:, begin:end] for x in (q, k, v)), *state)
        assert_close(out, expected[:, begin:end])
    assert step._cache_size() == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_examples_have_lengths_of_their_own(implementation):
    q, k, v = inputs()
    lengths = jnp.array([17, 40])
    out, lse = decode.attention(
        q[:, :2], k, v, lengths, is_causal=False, implementation=implementation, return_residual=True
    )
    expected, residual = sparse_attention(
        q[:, :2], k, v, key_value_seq_lengths=lengths, implementation="xla", return_residual=True
    )
    assert_close((out, lse), (expected, residual))


def test_lengths_that_are_none(implementation):
    q, k, v = inputs()
    out, lse = decode.attention(
        q[:, :3], k, v, jnp.array([LENGTH + 1, 2]), implementation=implementation, return_residual=True
    )
    assert bool(jnp.isnan(out[0]).all() and jnp.isnan(lse[0]).all())
    assert bool((out[1, 0] == 0).all() and jnp.isneginf(lse[1, 0]).all())  # its position is -1
    assert bool(jnp.isfinite(out[1]).all() and jnp.isfinite(lse[1, 1:]).all())


def test_selected_blocks_are_those_of_a_mask(implementation):
    q, k, v = inputs()
    blocks = jnp.array([[[0, 2, -1], [1, 2, 2]], [[2, -1, 9], [-1, -1, -1]]])
    out = decode.attention(
        q[:, -1:], k, v, jnp.array([40, 48]), key_blocks=blocks, block_size=16, implementation=implementation
    )
    listed = np.zeros((BATCH, KV_HEADS, 3), int)
    for b, h, block in np.ndindex(BATCH, KV_HEADS, 3):
        listed[b, h, block] = int((blocks[b, h] == block).sum())
    weights = jnp.asarray(listed.repeat(16, -1).repeat(HEADS // KV_HEADS, 1), jnp.float32)
    weights = jnp.where((jnp.arange(LENGTH)[None] < jnp.array([[40], [48]]))[:, None], weights, 0)
    keys, values = (jnp.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v))
    logits = jnp.einsum("bnh,bsnh->bns", q[:, -1], keys) * HEAD_DIM**-0.5
    shares = weights * jnp.exp(logits)
    expected = jnp.einsum("bns,bsnh->bnh", shares, values) / jnp.maximum(shares.sum(-1), 1e-30)[..., None]
    assert_close(out[:, 0], expected)
    assert bool((out[1, 0, 2:] == 0).all())


def test_append_drops_what_does_not_fit_and_is_donated():
    cache = jnp.zeros((3, 4, 1, 1), jnp.bfloat16)
    new = jnp.arange(1.0, 7.0).reshape(3, 2, 1, 1)
    append = jax.jit(decode.append, donate_argnums=0)
    out = append(cache, new, jnp.array([1, 3, -1]))
    assert cache.is_deleted()
    assert out[..., 0, 0].tolist() == [[0, 1, 2, 0], [0, 0, 0, 3], [6, 0, 0, 0]]


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("add the batch", {"query": np.zeros((1, HEADS, HEAD_DIM), np.float32)}),
        ("have query's batch size", {"value_cache": np.zeros((BATCH, 3, KV_HEADS, HEAD_DIM), np.float32)}),
        ("key_cache has query's head size", {"query": np.zeros((BATCH, 1, HEADS, 8), np.float32)}),
        ("multiple of the cache's", {"query": np.zeros((BATCH, 1, 3, HEAD_DIM), np.float32)}),
        (r"lengths is \[batch\] = \(2,\)", {"lengths": np.zeros(3, int)}),
        ("block_size divides the cache's 48 positions", {"key_blocks": np.zeros((2, 2, 1), int)}),
        ("window is at least 1", {"window": -1}),
        (r"\[batch, queries, drafts\]", {"tree_mask": np.zeros((1, 64), bool)}),
    ],
)
def test_mistakes_are_named(match, changes):
    q, k, v = inputs()
    args = {"query": q[:, :1], "key_cache": k, "value_cache": v, "lengths": jnp.array([1, 2])} | changes
    with pytest.raises(ValueError, match=match):
        decode.attention(**args)
