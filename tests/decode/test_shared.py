"""Shared prefixes, read once: the values of one call, whatever is shared; and `merge_partials`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import decode
from jax_bsk.decode.shared import split
from jax_bsk.decode.tokens import Ragged
from tests.util import assert_close

HEADS, KV_HEADS, HEAD_DIM, SIZE, PAGES = 4, 2, 16, 16, 24
TOKENS, SEQS, MOST = 18, 7, 6


def batch(seed: int = 0):
    """Three sequences that share 3 pages (one of them 4 tokens long), one alone, two that share 1 page; padding."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((TOKENS, HEADS, HEAD_DIM), np.float32)
    pages = rng.standard_normal((PAGES, SIZE, 2 * KV_HEADS, HEAD_DIM), np.float32)
    free = iter(rng.permutation(PAGES).tolist())
    table = np.full((SEQS, MOST), -1, np.int32)
    lengths = np.array([60, 81, 53, 30, 17, 40, 5], np.int32)
    for row, length in enumerate(lengths[:6]):
        table[row, : -(-length // SIZE)] = [next(free) for _ in range(-(-length // SIZE))]
    table[1:3, :3], table[5, 0] = table[0, :3], table[4, 0]
    q_lens = [1, 4, 1, 6, 1, 1]
    offsets = np.array([1, *(1 + np.cumsum(q_lens)), 99], np.int32)
    return tuple(map(jnp.asarray, (q, pages, lengths, table, offsets, np.array([6], np.int32))))


def both(args, implementation, shared=MOST, **options):
    """Results of the plain call and with shared pages, each with its log-sum-exp."""
    options = {"implementation": implementation, "return_residual": True, "keys_per_part": 64, **options}

    @jax.jit
    def attend(args, shared):
        plain = decode.ragged_paged_attention(*args, **options)
        return plain, decode.ragged_paged_attention(*args, shared_pages=shared, **options)

    return attend(args, jnp.asarray(shared))


@pytest.mark.parametrize(
    "options",
    [{}, {"soft_cap": 3.0, "sm_scale": 0.25, "k_scale": 0.5, "v_scale": 2.0}, {"sinks": jnp.arange(4.0) - 1}],
    ids=["plain", "scales", "sinks"],
)
def test_it_is_the_plain_call(options, implementation):
    plain, shared = both(batch(), implementation, **options)
    assert_close(shared, plain)
    assert bool(jnp.isneginf(shared[1][15:]).all() and (shared[0][15:] == 0).all() and (shared[0][0] == 0).all())


def test_trees_are_of_the_last_positions(implementation):
    tree = np.random.default_rng(1).random((TOKENS, 6)) < 0.6
    plain, shared = both(batch(), implementation, tree_mask=jnp.asarray(tree))
    assert_close(shared, plain)


def test_what_is_shared_is_found():
    """Of each group the pages that all have in common, at most those asked for, and none past a first token."""
    _, _, lengths, table, offsets, number = batch()
    cut = jax.jit(split, static_argnums=2)

    def prefixes(most=MOST, lengths=lengths, table=table, offsets=offsets, number=number):
        found, rest = cut(Ragged(lengths, table, offsets, number), jnp.int32(most), SIZE)
        groups = int(found.num_seqs[0])
        assert (np.diff(found.cu_q_lens) >= 0).all()
        assert found.cu_q_lens[0] == offsets[0]
        assert found.cu_q_lens[groups] == offsets[number[0]]
        return (found.kv_lens[:groups] // SIZE).tolist(), rest.kv_lens.tolist()

    assert prefixes() == ([3, 0, 1], [12, 33, 5, 30, 1, 24, 5])
    assert prefixes(2)[0] == [2, 0, 1]
    assert prefixes(0) == ([0, 0, 0], lengths.tolist())
    assert prefixes(-5)[0] == [0, 0, 0]
    assert prefixes(lengths=lengths.at[2].set(48))[0] == [2, 0, 1]  # its token is the last of the third page
    assert prefixes(table=table.at[1, 1].set(9))[0] == [1, 0, 1]
    assert prefixes(number=number - 1)[0] == [3, 0, 0]
    # One without tokens, or of a length that is none, is in no group.
    assert prefixes(lengths=lengths.at[1].set(-1)) == ([0, 0, 0, 0, 1], [60, -1, 53, 30, 1, 24, 5])
    assert prefixes(offsets=jnp.array([0, 1, 1, 2, 3, 4, 5, 9]))[0] == [0, 0, 0, 0, 1]
    assert split(Ragged(lengths, table, offsets, jnp.array([0])), jnp.int32(9), SIZE)[0].num_seqs.tolist() == [0]


def test_nothing_shared_has_the_plain_calls_bits(implementation):
    if implementation == "xla":
        pytest.skip("two calls are two loops")
    for shared in (0, MOST):
        plain, again = both(batch(), implementation, shared)
        alone = slice(7, 13) if shared else slice(None)  # the tokens of the sequence that is alone
        assert all(x[alone].tobytes() == y[alone].tobytes() for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("wrong", ["length", "long", "page", "offsets", "number", "nan"])
def test_what_is_wrong_poisons_what_it_does_in_one_call(wrong, implementation):
    args: list[Any] = list(batch())
    if wrong == "length":
        args[2] = args[2].at[1].set(-4)
    elif wrong == "long":
        args[2] = args[2].at[0].set(MOST * SIZE + 1)
    elif wrong == "page":  # within what all three share
        args[3] = args[3].at[:3, 1].set(PAGES)
    elif wrong == "offsets":
        args[4] = args[4].at[2].set(0)
    elif wrong == "number":
        args[5] = args[5] + 8
    else:  # in a page of all three, and in one of nobody
        owned = np.unique(np.asarray(args[3]))
        free = next(page for page in range(PAGES) if page not in owned)
        args[1] = args[1].at[free].set(jnp.nan).at[args[3][0, 2], 3].set(jnp.nan)
    plain, shared = both(args, implementation)
    assert bool(jnp.isnan(plain[0]).any())
    assert_close(shared, plain)


def test_random_batches(implementation):
    """Lengths, tables and shared counts of a compiled program at random."""
    rng = np.random.default_rng(5)
    q, pages, *_ = batch()
    lowest = [-1, 0]  # lengths and pages that are wrong

    @jax.jit
    def attend(args, shared):
        options = {"implementation": implementation, "return_residual": True}
        plain = decode.ragged_paged_attention(*args, **options)
        return plain, decode.ragged_paged_attention(*args, shared_pages=shared, **options)

    for trial in range(40 if implementation == "cpu" else 8):
        q_lens = rng.integers(0, 4, 6) if trial % 2 else np.ones(6, int)
        offsets = np.concatenate([[0], np.cumsum(q_lens), [rng.integers(0, 99)]])
        table = np.repeat(rng.integers(0, PAGES, (1, MOST)), SEQS, 0)
        for row in range(SEQS):
            table[row, rng.integers(0, MOST + 1) :] = rng.integers(lowest[trial % 2], PAGES, MOST)[0]
        lengths = rng.integers(lowest[trial % 2], MOST * SIZE + 1, SEQS)
        args = q, pages, *(jnp.asarray(x, jnp.int32) for x in (lengths, table, offsets, [rng.integers(0, 7)]))
        plain, shared = attend(args, jnp.int32(rng.integers(0, MOST + 2)))
        assert_close(shared, plain)


def test_vmap_and_float16(implementation):
    q, pages, *rest = batch()
    options = {"implementation": implementation}

    def attend(q, shared):
        return decode.ragged_paged_attention(q, pages.astype(q.dtype), *rest, shared_pages=shared, **options)

    many = jnp.stack([q, 2 * q]).astype(jnp.float16)
    out = jax.jit(jax.vmap(attend))(many, jnp.array([1, 3]))
    assert out.dtype == jnp.float16
    for one, x in zip(out, many, strict=True):
        plain = decode.ragged_paged_attention(x, pages.astype(jnp.float16), *rest, **options)
        assert_close(one.astype(jnp.float32), plain.astype(jnp.float32), 4e-3)


@pytest.mark.parametrize("options", [{"sliding_window": 9}, {"page_selection": np.zeros((SEQS, KV_HEADS, 1), int)}])
def test_windows_and_selected_pages_are_refused(options):
    with pytest.raises(ValueError, match="leave shared_pages out"):
        decode.ragged_paged_attention(*batch(), shared_pages=2, **options)
    with pytest.raises(TypeError, match="shared_pages holds integers"):
        decode.ragged_paged_attention(*batch(), shared_pages=2.0)


# ---- merge_partials


def test_partials_are_those_of_a_softmax():
    rng = np.random.default_rng(0)
    logits, values = rng.standard_normal((3, 5, 8)) * 9, rng.standard_normal((3, 5, 8, 4))
    weights = np.exp(logits)
    outs = (weights[..., None] * values).sum(2) / weights.sum(2)[..., None]
    lses = np.log(weights.sum(2))
    out, lse = decode.merge_partials(jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32))
    total = weights.sum((0, 2))
    assert_close(out, (weights[..., None] * values).sum((0, 2)) / total[:, None])
    assert_close(lse, np.log(total))


def test_infinities_and_nan():
    inf, nan = jnp.inf, jnp.nan
    outs = jnp.broadcast_to(jnp.array([2.0, 6.0])[:, None, None], (2, 7, 1)).at[0, 0].set(nan)
    lses = jnp.array([[-inf, -inf, 0, inf, nan, inf, -3e38], [1, -inf, -inf, 0, 0, inf, 3e38]])
    out, lse = jax.jit(decode.merge_partials)(outs, lses)
    np.testing.assert_array_equal(out[:, 0], [6, 0, 2, 2, nan, 4, 6])  # a part without keys may hold NaN
    np.testing.assert_array_equal(lse, np.array([1, -inf, 0, inf, nan, inf, 3e38], np.float32))
    # A NaN of a part with keys stays, however small its weight.
    out, lse = decode.merge_partials([jnp.array([nan]), jnp.array([1.0])], [jnp.array(-500.0), jnp.array(500.0)])
    assert np.isnan(out[0])
    assert float(lse) == 500


def test_types_of_partials():
    outs = [jnp.ones((2, 3), jnp.bfloat16)] * 2
    out, lse = decode.merge_partials(outs, [jnp.zeros(2)] * 2)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    with jax.enable_x64():
        out, lse = decode.merge_partials([jnp.ones((2, 3), jnp.float64)] * 2, [jnp.zeros(2, jnp.float32)] * 2)
    assert (out.dtype, lse.dtype) == (jnp.float64, jnp.float64)
    with pytest.raises(ValueError, match="one array per partial result, at least one, got 2 and 1"):
        decode.merge_partials(outs, [jnp.zeros(2)])
    with pytest.raises(ValueError, match="one array per partial result"):
        decode.merge_partials([], [])
    with pytest.raises(ValueError, match="lses have that shape without the head size"):
        decode.merge_partials(outs, [jnp.zeros((2, 3))] * 2)
