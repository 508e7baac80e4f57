"""`ragged_paged_attention` and `append_pages`: JAX's own meaning, one program for all tables, vmap, and errors."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as of_jax

from jax_bsk import FallbackWarning, UnsupportedError, decode
from tests.util import assert_close

TOKENS, HEADS, KV_HEADS, HEAD_DIM, PAGES, SIZE, SEQS, MOST = 20, 4, 2, 16, 12, 16, 4, 4


def batch(seed: int = 0):
    """A prompt of 5 tokens, a decoding sequence and 8 tokens of a longer prompt; padding behind them."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((TOKENS, HEADS, HEAD_DIM), np.float32)
    pages = rng.standard_normal((PAGES, SIZE, 2 * KV_HEADS, HEAD_DIM), np.float32)
    table = np.zeros((SEQS, MOST), np.int32)
    table[:3] = rng.permutation(PAGES).reshape(3, MOST)
    lengths, offsets = np.array([5, 40, 64, 3], np.int32), np.array([0, 5, 6, 14, 99], np.int32)
    return tuple(map(jnp.asarray, (q, pages, lengths, table, offsets, np.array([3], np.int32))))


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 7}, {"soft_cap": 3.0, "sm_scale": 0.25}, {"k_scale": 0.5, "v_scale": 2.0}],
    ids=["plain", "window", "soft-cap", "scales"],
)
def test_it_is_what_jax_computes(options, implementation):
    args = batch()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = of_jax.ref_ragged_paged_attention(*args, **options)
    out = decode.ragged_paged_attention(*args, **options, implementation=implementation)
    assert_close(out[:14], expected)
    assert (np.asarray(out[14:]) == 0).all()


def test_arguments_are_those_of_jax():
    theirs = inspect.signature(of_jax.ragged_paged_attention).parameters
    ours = inspect.signature(decode.ragged_paged_attention).parameters
    assert list(ours)[:6] == list(theirs)[:6]
    assert theirs.keys() <= ours.keys()
    tuning = {"num_kv_pages_per_block": 2, "num_queries_per_block": 8, "vmem_limit_bytes": 2**20, "mask_value": -2.4e38}
    args = batch()
    assert_close(
        decode.ragged_paged_attention(*args, **tuning, implementation="cpu"),
        decode.ragged_paged_attention(*args, implementation="cpu"),
        0,
    )


def test_one_program_serves_all_tables(implementation):
    program = jax.jit(lambda *args: decode.ragged_paged_attention(*args, implementation=implementation))
    q, pages, lengths, table, offsets, number = batch()
    program(q, pages, lengths, table, offsets, number)
    others = lengths.at[1].set(17), table[:, ::-1], jnp.array([0, 1, 9, 20, 20], jnp.int32), number
    out = program(q, pages, *others)
    assert program._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert_close(out, decode.ragged_paged_attention(q, pages, *others, implementation="xla"))


def test_vmap_is_a_batch_of_groups(implementation):
    many = [batch(seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*many, strict=True)]

    def attend(q, pages, lengths, table, offsets, number):
        return decode.ragged_paged_attention(q, pages, lengths, table, offsets, number, implementation=implementation)

    axes = 0, None, 0, 0, None, None
    args = [x if axis == 0 else y for x, y, axis in zip(stacked, many[0], axes, strict=True)]
    out = jax.jit(jax.vmap(attend, axes))(*args)
    for i, one in enumerate(out):
        assert_close(one, attend(*(x[i] if axis == 0 else x for x, axis in zip(args, axes, strict=True))))


def test_a_sequence_has_its_bits_whatever_else_is_in_the_batch(implementation):
    """Among others, alone in a table of its own, and with other values in all other sequences' pages and lengths."""
    if implementation == "xla":
        pytest.skip("its programs of other sizes are other programs")
    q, pages, lengths, table, offsets, number = batch()
    options = {"implementation": implementation, "keys_per_part": 64}
    out = decode.ragged_paged_attention(q, pages, lengths, table, offsets, number, **options)
    for row, (begin, end) in enumerate([(0, 5), (5, 6), (6, 14)]):
        alone = decode.ragged_paged_attention(
            q[begin:end],
            pages,
            lengths[row : row + 1],
            table[row : row + 1],
            jnp.array([0, end - begin]),
            jnp.array(1),
            **options,
        )
        assert alone.tobytes() == out[begin:end].tobytes()
    own = jnp.zeros(PAGES, bool).at[table[1]].set(True)
    other = jnp.where(own[:, None, None, None], pages, 3 * pages)
    changed = decode.ragged_paged_attention(q, other, lengths.at[0].set(60), table, offsets, number, **options)
    assert changed[5].tobytes() == out[5].tobytes()


def test_the_log_sum_exp_merges_parts_of_a_cache(implementation):
    """What split caches and shared prefixes stand on: pages in two calls, merged, are pages in one."""
    q, pages, lengths, table, offsets, number = batch()
    options = {"implementation": implementation, "return_residual": True}
    whole, lse = decode.ragged_paged_attention(q, pages, lengths, table, offsets, number, **options)
    parts = []
    for first, last in ((0, 2), (2, MOST)):
        some = jnp.broadcast_to(jnp.arange(first, last, dtype=jnp.int32), (SEQS, KV_HEADS, last - first))
        args = q, pages, lengths, table, offsets, number
        parts.append(decode.ragged_paged_attention(*args, page_selection=some, **options))
    total = jnp.logaddexp(parts[0][1], parts[1][1])
    assert_close(total, lse)
    shares = [jnp.where(jnp.isneginf(total), 0, jnp.exp(part[1] - total)) for part in parts]
    assert_close(sum(part[0] * share[..., None] for part, share in zip(parts, shares, strict=True)), whole)
    assert bool(jnp.isneginf(lse[14:]).all())


def test_words_and_booleans_are_the_same_tree():
    args: Any = batch()
    tree = np.random.default_rng(1).random((TOKENS, 40)) < 0.5
    words = np.packbits(np.pad(tree, ((0, 0), (0, 24))), axis=1, bitorder="little").view(np.uint32)
    first, second = (
        decode.ragged_paged_attention(*args, tree_mask=x, implementation="cpu", return_residual=True)
        for x in (tree, words)
    )
    assert_close(first, second, 0)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_caches(dtype):
    q, pages, *rest = batch()
    scale = 4 / 127
    small = (pages / scale).round().clip(-127, 127).astype("int8") if dtype == "int8" else (pages / scale).astype(dtype)
    out = decode.ragged_paged_attention(q, small, *rest, k_scale=scale, v_scale=scale, implementation="xla")
    dense = small.astype(jnp.float32) * scale
    assert_close(out, decode.ragged_paged_attention(q, dense, *rest, implementation="xla"), 1e-4)
    with pytest.raises(UnsupportedError, match="a cache of the query's type float32"):
        decode.ragged_paged_attention(q, small, *rest, implementation="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("queries", ["bfloat16", "float16"])
def test_quantised_caches_on_cuda(dtype, queries):
    """Against float64 of what the cache holds; NaN in a page of float8 reaches those that attend to it."""
    rng = np.random.default_rng(0)
    for head_dim, group, page, lens in ((128, 4, 16, (1, 3, 70)), (64, 16, 64, (1, 1, 1)), (96, 1, 32, (33, 2, 5))):
        kv_lens = np.array([rng.integers(n, 700) for n in lens], np.int32)
        pages = -(-kv_lens.max() // page)
        table = rng.permutation(3 * pages).reshape(3, pages).astype(np.int32)
        offsets = np.cumsum([0, *lens]).astype(np.int32)
        cache = jnp.asarray(rng.standard_normal((3 * pages, page, 4, head_dim)) * 30).round().clip(-127, 127)
        if dtype == "float8_e4m3fn":
            cache = cache.at[table[1, 0], 0, 2, 3].set(jnp.nan)  # a key
        cache = cache.astype(dtype)
        q = jnp.asarray(rng.standard_normal((offsets[-1] + 2, 2 * group, head_dim)), queries)
        args = kv_lens, table, offsets, np.array([3], np.int32)
        options: dict[str, Any] = {"sm_scale": 0.2, "k_scale": 1 / 30, "v_scale": 1 / 30}
        out = decode.ragged_paged_attention(q, cache, *args, implementation="cuda", **options)
        with jax.enable_x64(True):
            exact = jnp.asarray(q, jnp.float64), jnp.asarray(cache, jnp.float64)
            want = decode.ragged_paged_attention(*exact, *args, implementation="xla", **options)
        got, want = np.asarray(out.astype(jnp.float32)), np.asarray(want, np.float64)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        assert np.nanmax(np.abs(got - want)) < (0.03 if queries == "bfloat16" else 0.004)


def test_what_no_kernel_takes_falls_back_and_says_so():
    q, pages, *rest = batch()
    wide = [jnp.tile(x, [1] * (x.ndim - 1) + [20]) for x in (q, pages)]
    with pytest.warns(FallbackWarning, match=r"decode.ragged_paged_attention uses its slower .* head size is at most"):
        decode.ragged_paged_attention(*wide, *rest)


# ---- append_pages


def test_append_pages_writes_what_attention_reads():
    """Key by key into pages of NaN, and as one prompt: the same cache, and what nobody owns stays as it is."""
    _, _, lengths, table, offsets, number = batch()
    rng = np.random.default_rng(3)
    key, value = (jnp.asarray(rng.standard_normal((TOKENS, KV_HEADS, HEAD_DIM), np.float32)) for _ in range(2))
    empty = jnp.full((PAGES, SIZE, 2 * KV_HEADS, HEAD_DIM), jnp.nan)
    append = jax.jit(decode.append_pages, donate_argnums=0)
    pages = append(empty, key, value, lengths, table, offsets, number)
    assert empty.is_deleted()
    written = ~np.isnan(np.asarray(pages)).any((2, 3))
    expected = np.zeros((PAGES, SIZE), bool)
    for row, (first, last) in enumerate([(0, 5), (39, 40), (56, 64)]):
        for position in range(first, last):
            expected[table[row, position // SIZE], position % SIZE] = True
            token = int(offsets[row]) + position - first
            place = pages[table[row, position // SIZE], position % SIZE]
            assert (place[0::2] == key[token]).all()
            assert (place[1::2] == value[token]).all()
    assert (written == expected).all()


def test_append_pages_writes_nothing_that_is_wrong():
    _, pages, lengths, table, offsets, number = batch()
    new = jnp.ones((TOKENS, KV_HEADS, HEAD_DIM))
    append = jax.jit(decode.append_pages)

    def changed(lengths=lengths, table=table, offsets=offsets, number=number) -> list[int]:
        """Pages that are written."""
        differs = append(pages, new, new, lengths, table, offsets, number) != pages
        return sorted(np.unique(np.nonzero(np.asarray(differs))[0]).tolist())

    every = sorted({int(table[0, 0]), int(table[1, 2]), int(table[2, 3])})
    assert changed() == every
    assert changed(offsets=offsets.at[2].set(3)) == changed(number=number + 4) == changed(number=number - 9) == []
    without = [page for page in every if page != int(table[1, 2])]
    assert changed(table=table.at[1, 2].set(PAGES)) == changed(table=table.at[1, 2].set(-1)) == without
    assert changed(lengths=lengths.at[1].set(-3)) == changed(lengths=lengths.at[1].set(99)) == without
    assert changed(lengths=lengths.at[1].set(0)) == without  # the token's position is -1


# ---- Errors


def refused(error, match, **changes):
    names = "q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs"
    args = dict(zip(names, batch(), strict=True))
    options = {name: x for name, x in changes.items() if name not in names}
    args |= {name: x for name, x in changes.items() if name in names}
    with pytest.raises(error, match=match):
        decode.ragged_paged_attention(**args, **options)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "q is a floating-point array", {"q": np.zeros((3, 4, 16), int)}),
        (ValueError, "put the tokens of all sequences in a row", {"q": np.zeros((1, 3, 4, 16), np.float32)}),
        (ValueError, "keys at even heads", {"kv_pages": np.zeros((2, 16, 3, 16), np.float32)}),
        (ValueError, "kv_pages has q's head size 16, got 8", {"kv_pages": np.zeros((2, 16, 4, 8), np.float32)}),
        (ValueError, "multiple of the cache's", {"kv_pages": np.zeros((2, 16, 6, 16), np.float32)}),
        (TypeError, "kv_lens holds integers", {"kv_lens": np.zeros(4, np.float32)}),
        (ValueError, r"kv_lens is \[sequences\] = \(4,\)", {"kv_lens": np.zeros(3, int)}),
        (ValueError, r"cu_q_lens is \[sequences \+ 1\] = \(5,\)", {"cu_q_lens": np.zeros(4, int)}),
        (ValueError, r"page_indices is \[sequences, pages", {"page_indices": np.zeros(4, int)}),
        (ValueError, r"num_seqs is \[1\]", {"num_seqs": np.zeros(2, int)}),
        (ValueError, "sliding_window is at least 1", {"sliding_window": 0}),
        (ValueError, "the call has no sliding_window", {"sink_tokens": 4}),
        (TypeError, "sliding_window is an integer, got inf", {"sliding_window": np.inf}),
        (ValueError, "v_scale is in .* multiply the output by a part of it", {"v_scale": np.nan}),
        (ValueError, "mask_value is None or below -10000", {"mask_value": -1.0}),
        (ValueError, r"soft_cap is in \[1e-30", {"soft_cap": 0.0}),
        (ValueError, "sm_scale is in", {"sm_scale": np.inf}),
        (TypeError, "k_scale is one number", {"k_scale": np.ones(2)}),
        (TypeError, "tree_mask holds booleans, or words", {"tree_mask": np.zeros((TOKENS, 64))}),
        (ValueError, "at most 64 drafts", {"tree_mask": np.zeros((TOKENS, 65), bool)}),
        (ValueError, r"tree_mask of uint32 is \[tokens, 2\]", {"tree_mask": np.zeros((TOKENS, 3), np.uint32)}),
        (ValueError, "fill it up with -1", {"page_selection": np.zeros((4, 1, 3), int)}),
        (ValueError, "sinks has one logit per query head", {"sinks": np.zeros(3, np.float32)}),
        (ValueError, "keys_per_part is a positive multiple of 64", {"keys_per_part": 100}),
        (ValueError, "implementation is one of", {"implementation": "native"}),
    ],
)
def test_mistakes_are_named(error, match, changes):
    refused(error, match, **changes)


def test_derivatives_are_refused(implementation):
    q, *rest = batch()
    with pytest.raises(UnsupportedError, match="have no derivatives"):
        jax.grad(lambda q: decode.ragged_paged_attention(q, *rest, implementation=implementation).sum())(q)


@pytest.mark.parametrize("number", [float, np.array, jnp.int32])
def test_numbers_may_be_of_any_type(number, implementation):
    options = {"implementation": implementation, "keys_per_part": 64}
    want = decode.ragged_paged_attention(*batch(), sliding_window=7, sink_tokens=2, **options)
    got = decode.ragged_paged_attention(*batch(), sliding_window=number(7), sink_tokens=number(2), **options)
    np.testing.assert_array_equal(got, want)


def test_numbers_may_be_beyond_all_positions(implementation):
    want = decode.ragged_paged_attention(*batch(), implementation=implementation)
    options = {"sliding_window": 1 << 70, "sink_tokens": 1 << 40, "keys_per_part": 1 << 70}
    assert_close(decode.ragged_paged_attention(*batch(), implementation=implementation, **options), want)


def test_64_bit_integers_that_do_not_fit_in_32_are_wrong():
    with jax.enable_x64():
        q, pages, kv_lens, *rest = batch()
        lengths = np.asarray(kv_lens, np.int64) + (1 << 32)
        out = decode.ragged_paged_attention(q, pages, lengths, *rest, implementation="cpu")
        assert bool(jnp.isnan(out[0]).all())


def test_a_traced_number_is_refused():
    with pytest.raises(TypeError, match="sliding_window is a number known when tracing"):
        jax.eval_shape(lambda n: decode.ragged_paged_attention(*batch(), sliding_window=n), 3)
