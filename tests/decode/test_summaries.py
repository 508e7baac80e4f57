"""Quest and MoBA while decoding: summaries of pages that follow the cache, and the pages that they choose."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import decode, selection
from tests.util import assert_close, collectives

TOKENS, HEADS, KV_HEADS, HEAD_DIM, PAGES, SIZE, SEQS, MOST = 10, 4, 2, 16, 40, 4, 4, 12
CHOICES = {"quest": selection.quest_pages, "moba": selection.moba_pages}


def batch(seed: int = 0) -> Any:
    """A decoding sequence, three drafts of a second, and one token of a third; padding behind them."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((TOKENS, HEADS, HEAD_DIM), np.float32)
    pages = rng.standard_normal((PAGES, SIZE, 2 * KV_HEADS, HEAD_DIM), np.float32)
    table = rng.permutation(PAGES)[: 3 * MOST].reshape(3, MOST)
    table = np.concatenate([table, np.full((1, MOST), 10**6)])
    lengths, offsets = np.array([41, 47, 3, 9]), np.array([0, 1, 4, 5, 77])
    integers = (jnp.asarray(x, jnp.int32) for x in (lengths, table, offsets, [3]))
    return jnp.asarray(q), jnp.asarray(pages), *integers


def expected_pages(kind, combine, count, queries, first=1, last=1):
    """The choice of `batch()`, page by page in NumPy."""
    q, pages, lengths, table, offsets, number = (np.asarray(x) for x in batch())
    found = np.full((SEQS, KV_HEADS, count), -1)
    for s in range(int(number[0])):
        filled = -(-lengths[s] // SIZE)
        for h in range(KV_HEADS):
            scores = np.zeros(filled)
            for page in range(filled):
                keys = pages[table[s, page], : lengths[s] - page * SIZE, 2 * h].astype(np.float64)
                each = []
                for t in range(max(offsets[s], offsets[s + 1] - queries), offsets[s + 1]):
                    for one in q[t, h * 2 : h * 2 + 2].astype(np.float64):
                        bound = np.maximum(one * keys.min(0), one * keys.max(0)).sum()
                        assert (bound >= keys @ one - 1e-9).all()
                        each.append(bound if kind == "quest" else one @ keys.mean(0))
                scores[page] = max(each) if combine == "max" else sum(each)
            scores[:first] = np.inf
            scores[filled - last :] = np.inf
            chosen = np.sort(np.argsort(-scores, kind="stable")[:count])
            found[s, h, : len(chosen)] = chosen
    return found


@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("kind", CHOICES)
def test_the_best_pages_are_chosen(kind, combine):
    q, pages, *rest = batch()
    filled = np.full(PAGES, SIZE)  # the last pages of sequences are filled in part
    for row, length in ((0, 41), (1, 47), (2, 3)):
        filled[rest[1][row, (length - 1) // SIZE]] = (length - 1) % SIZE + 1
    summaries = selection.summarize_pages(pages, filled)
    options: Any = {"count": 5, "queries": 3, "combine": combine, "keep_first": 1, "keep_last": 1}
    out = jax.jit(functools.partial(CHOICES[kind], **options))(q, summaries, *rest)
    np.testing.assert_array_equal(out, expected_pages(kind, combine, 5, 3))


@pytest.mark.parametrize("kind", CHOICES)
def test_all_pages_are_full_attention(kind, implementation):
    q, pages, *rest = batch()
    chosen = CHOICES[kind](q, selection.summarize_pages(pages), *rest, count=99)
    assert chosen.shape == (SEQS, KV_HEADS, MOST)
    options = {"implementation": implementation, "return_residual": True}
    out = decode.ragged_paged_attention(q, pages, *rest, page_selection=chosen, **options)
    assert_close(out, decode.ragged_paged_attention(q, pages, *rest, **options))


def test_a_needle_is_found():
    """One key of 2,048 is what the query looks for: its page is chosen, and attention returns its value."""
    rng = np.random.default_rng(0)
    pages, table = 128, jnp.asarray(rng.permutation(128)[None], jnp.int32)
    batch = jnp.array([pages * 16]), table, jnp.array([0, 1]), jnp.array([1])
    cache = rng.standard_normal((pages, 16, 2, 64), np.float32)
    cache[:, :, 1] = 0
    q = rng.standard_normal((1, 2, 64), np.float32)

    @jax.jit
    def found(cache):
        chosen = selection.quest_pages(q, selection.summarize_pages(cache, means=False), *batch, count=8)
        return chosen, decode.ragged_paged_attention(q, cache, *batch, page_selection=chosen)

    for page in rng.integers(0, pages, 20):
        here = int(table[0, page]), rng.integers(0, 16)
        needle = cache.copy()
        needle[(*here, 0)] = 2 * q.mean(1)[0]
        needle[(*here, 1)] = 1
        chosen, out = found(needle)
        assert page in chosen[0, 0]
        assert float(out.min()) > 0.9


# ---- Summaries


def step(cache, summaries, key, *batch):
    cache = decode.append_pages(cache, key, 0 * key, *batch)
    return cache, selection.update_page_summaries(summaries, cache, *batch, tokens=key.shape[0])


def test_summaries_follow_thousands_of_appends():
    """Sequences arrive with prompts, decode, drop drafts and leave; pages are reused all the time."""
    rng = np.random.default_rng(0)
    pool = decode.PagePool(PAGES, SIZE)
    cache = jnp.full((PAGES, SIZE, 2 * KV_HEADS, HEAD_DIM), jnp.nan)
    summaries: Any = jax.tree.map(lambda x: x + jnp.nan, selection.summarize_pages(0 * cache))  # of nobody
    program = jax.jit(step, donate_argnums=(0, 1))
    live: list[int] = []
    tokens = 0
    for turn in range(600):
        q_lens = []
        for sequence in list(live):
            if pool.length(sequence) > 40 or rng.random() < 0.05:
                live.remove(sequence)
                pool.free(sequence)
                continue
            drop = rng.random() < 0.2
            if drop:  # the next token is written behind what is kept
                pool.truncate(sequence, max(1, pool.length(sequence) - int(rng.integers(0, 3))))
            q_lens.append(int(rng.integers(drop, 4)))
            pool.extend(sequence, q_lens[-1])
        while len(live) < SEQS and pool.pages_free > 4:
            prompt = int(min(rng.integers(1, 14), 24 - sum(q_lens)))
            if prompt < 1:
                break
            live.append(pool.allocate(prompt))
            q_lens.append(prompt)
        offsets = np.append(np.cumsum([0, *q_lens]), [0] * (SEQS - len(live))).astype(np.int32)
        batch = pool.kv_lens(live, SEQS), pool.page_table(live, MOST, SEQS), offsets, np.array([len(live)], np.int32)
        key = rng.standard_normal((24, KV_HEADS, HEAD_DIM), np.float32)
        cache, summaries = program(cache, summaries, key, *batch)
        tokens += sum(q_lens)
        if turn % 50 == 0 or turn > 590:
            filled = np.zeros(PAGES, np.int32)
            for sequence in live:
                pages = np.array(pool.pages(sequence))
                filled[pages] = np.clip(pool.length(sequence) - SIZE * np.arange(len(pages)), 0, SIZE)
            held = filled > 0
            again: Any = selection.summarize_pages(cache, filled)
            assert not np.isnan(again.mean[held]).any()
            assert_close(summaries.mean[held], again.mean[held], 1e-6)
            for kept, made in ((summaries.minimum, again.minimum), (summaries.maximum, again.maximum)):
                np.testing.assert_array_equal(kept[held], made[held])
    assert program._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert tokens > 3000


def test_a_freed_pages_summary_reaches_nobody():
    """Huge keys in freed pages, and NaN: neither the tables' stale entries nor pages taken again have them."""
    q, pages, lengths, table, offsets, number = batch()
    summaries = selection.summarize_pages(pages)
    freed = table[0, 11], table[1, 4]  # behind the first sequence's length, and then behind the second's
    shorter = lengths.at[1].set(14)
    expected = [choose(q, summaries, shorter, table, offsets, number, count=3) for choose in CHOICES.values()]
    for old in (1e9, jnp.nan):
        stale = jax.tree.map(lambda x, old=old: x.at[jnp.stack(freed)].set(old), summaries)
        for choose, plain in zip(CHOICES.values(), expected, strict=True):
            np.testing.assert_array_equal(choose(q, stale, shorter, table, offsets, number, count=3), plain)
        # The second sequence takes the first one's old page: one token, and the summary is that token's key.
        key = jnp.ones((TOKENS, KV_HEADS, HEAD_DIM))
        taken = table.at[1, 4].set(freed[0])
        args = shorter.at[1].set(4 * SIZE + 1), taken, jnp.array([0, 0, 1, 1, 1]), number
        _, new = step(pages.at[freed[0]].set(jnp.nan), stale, key, *args)
        for x in jax.tree.leaves(new):
            np.testing.assert_array_equal(x[freed[0]], 1)


def test_what_is_wrong_updates_nothing_and_is_listed_for_attention_to_say():
    q, pages, lengths, table, offsets, number = batch()
    summaries = selection.summarize_pages(pages)
    update = jax.jit(functools.partial(selection.update_page_summaries, tokens=TOKENS))

    def changed(pages, lengths=lengths, table=table, offsets=offsets, number=number) -> list[int]:
        after = update(summaries, pages, lengths, table, offsets, number)
        return sorted(np.unique(np.nonzero(np.asarray(after.mean != summaries.mean))[0]).tolist())

    every = sorted({int(table[0, 10]), int(table[1, 11]), int(table[2, 0])})
    assert changed(2 * pages) == every
    assert changed(2 * pages, number=number + 4) == changed(2 * pages, offsets=offsets.at[2].set(0)) == []
    others = [page for page in every if page != int(table[0, 10])]
    for wrong in (-1, PAGES):
        assert changed(2 * pages, table=table.at[0, 10].set(wrong)) == others
    assert changed(2 * pages, lengths=lengths.at[0].set(-1)) == others
    assert changed(2 * pages, lengths=lengths.at[0].set(MOST * SIZE + 1)) == others

    bad = table.at[0, 6].set(PAGES)
    for choose in CHOICES.values():
        chosen = choose(q, summaries, lengths, bad, offsets, number, count=3)
        assert bool((chosen[0] == 6).any(-1).all())
        out = decode.ragged_paged_attention(q, pages, lengths, bad, offsets, number, page_selection=chosen)
        assert bool(jnp.isnan(out[0]).all() and jnp.isfinite(out[1:]).all())
        none = choose(q, summaries, lengths.at[0].set(-5), table, offsets, number, count=3)
        assert bool((none[0] == -1).all())


def test_vmap_and_types():
    q, pages, *rest = batch()
    many = [jnp.stack(x).astype(jnp.bfloat16) for x in ((q, -q), (pages, pages[::-1]))]

    @jax.jit
    def choose(q, pages):
        summaries = selection.summarize_pages(pages)
        return selection.quest_pages(q, summaries, *rest, count=4), selection.moba_pages(q, summaries, *rest, count=4)

    together = jax.vmap(choose)(*many)
    for i in range(2):
        for one, x in zip(choose(many[0][i], many[1][i]), together, strict=True):
            np.testing.assert_array_equal(one, x[i])
    summaries: Any = selection.summarize_pages(many[1][0])
    assert (summaries.minimum.dtype, summaries.mean.dtype) == (jnp.bfloat16, jnp.float32)
    small = (pages * 20).astype(jnp.int8)
    summaries = selection.summarize_pages(small)
    assert summaries.maximum.dtype == jnp.int8
    assert selection.quest_pages(q, summaries, *rest, count=4).shape == (SEQS, KV_HEADS, 4)


# ---- A contiguous cache


def test_a_contiguous_cache(implementation):
    """Summaries follow prompts and tokens; all blocks are full attention; the best ones are those of a paged cache."""
    rng = np.random.default_rng(0)
    size, positions = 8, 48
    lengths = jnp.array([0, 5])
    keys = values = jnp.full((2, positions, KV_HEADS, HEAD_DIM), jnp.nan)
    keys = keys.at[1, :5].set(1)
    values = values.at[1, :5].set(1)
    summaries = selection.summarize_blocks(keys, lengths, block_size=size)
    for count in (19, 1, 9):
        k, v, q = (
            jnp.asarray(rng.standard_normal((2, count, n, HEAD_DIM), np.float32)) for n in (KV_HEADS, KV_HEADS, HEADS)
        )
        keys, values = decode.append(keys, k, lengths), decode.append(values, v, lengths)
        lengths = lengths + count
        summaries = jax.jit(selection.update_block_summaries, static_argnames="tokens")(
            summaries, keys, lengths, tokens=count
        )
        assert_close(summaries, selection.summarize_blocks(keys, lengths, block_size=size), 1e-6)
    options: Any = {"implementation": implementation}
    expected = decode.attention(q, keys, values, lengths, **options)
    for choose in (selection.quest_blocks, selection.moba_blocks):
        blocks = choose(q, summaries, lengths, count=99)
        assert blocks.shape == (2, KV_HEADS, positions // size)
        out = decode.attention(q, keys, values, lengths, key_blocks=blocks, block_size=size, **options)
        assert_close(out, expected)
    # As pages: the same lists.
    both = jnp.stack([keys, values], 3).reshape(-1, size, 2 * KV_HEADS, HEAD_DIM)
    table = jnp.arange(2 * positions // size, dtype=jnp.int32).reshape(2, -1)
    filled = jnp.clip(lengths[:, None] - size * jnp.arange(positions // size)[None], 0, size).reshape(-1)
    paged = selection.summarize_pages(both, filled)
    args = lengths, table, jnp.array([0, 9, 18]), jnp.array([2])
    np.testing.assert_array_equal(
        selection.quest_blocks(q, summaries, lengths, count=3),
        selection.quest_pages(q.reshape(18, HEADS, HEAD_DIM), paged, *args, count=3, queries=9),
    )


# ---- On a mesh


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_heads_of_pages_split_without_collectives(axis_type):
    q, pages, *rest = batch()
    key = jnp.ones((TOKENS, KV_HEADS, HEAD_DIM))

    @jax.jit
    def serve(q, pages, key):
        pages, summaries = step(pages, selection.summarize_pages(pages), key, *rest)
        return summaries, selection.quest_pages(q, summaries, *rest, count=4)

    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:2])
    specs = P(None, "model"), P(None, None, "model"), P(None, "model")
    expected = serve(q, pages, key)
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((q, pages, key), specs, strict=True)]
        program = serve.lower(*args).compile()
        out = program(*args)
    assert collectives(program) == []
    assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 3) for x in jax.tree.leaves(out))
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_batch_and_heads_of_a_contiguous_cache_split_without_collectives(axis_type):
    q, keys, new = (jax.random.normal(jax.random.key(0), (4, n, h, 8)) for n, h in ((1, 4), (32, 2), (3, 2)))
    lengths = jnp.array([0, 3, 17, 29])

    @jax.jit
    def serve(q, keys, new, lengths):
        summaries = selection.summarize_blocks(keys, lengths, block_size=8)
        keys, lengths = decode.append(keys, new, lengths), lengths + 3
        summaries = selection.update_block_summaries(summaries, keys, lengths, tokens=3)
        return summaries, selection.moba_blocks(q, summaries, lengths, count=2)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    specs = *[P("data", None, "model")] * 3, P("data")
    expected = serve(q, keys, new, lengths)
    with jax.set_mesh(mesh):
        arrays = zip((q, keys, new, lengths), specs, strict=True)
        args = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in arrays]
        program = serve.lower(*args).compile()
        out = program(*args)
    assert collectives(program) == []
    assert_close(out, expected, 1e-6)


# ---- Errors


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "summaries are PageSummaries, got ArrayImpl", {"summaries": jnp.zeros(3)}),
        (ValueError, "quest reads bounds", {"summaries": {"bounds": False}}),
        (ValueError, "count is at least 1", {"count": 0}),
        (ValueError, "together at most count = 1", {"count": 1}),
        (ValueError, "combine is 'max' or 'sum'", {"combine": "mean"}),
        (ValueError, r"query is \[tokens, heads, head size 16\]", {"query": jnp.zeros((TOKENS, HEADS, 8))}),
        (ValueError, "multiple of the cache's", {"query": jnp.zeros((TOKENS, 3, HEAD_DIM))}),
        (TypeError, "kv_lens holds integers", {"kv_lens": jnp.zeros(SEQS)}),
    ],
)
def test_mistakes_are_named(error, match, changes):
    names = "query", "pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs"
    args: dict[str, Any] = dict(zip(names, batch(), strict=True))
    pages = args.pop("pages")
    args |= {"summaries": selection.summarize_pages(pages), "count": 2} | changes
    if isinstance(args["summaries"], dict):
        args["summaries"] = selection.summarize_pages(pages, **args["summaries"])
    with pytest.raises(error, match=match):
        selection.quest_pages(**args)


@pytest.mark.parametrize("choose", ["quest", "moba"])
def test_no_tokens_and_no_examples(choose):
    pages, blocks = (getattr(selection, f"{choose}_{name}") for name in ("pages", "blocks"))
    summaries = selection.summarize_pages(jnp.ones((8, 16, 4, 32)))
    table = np.array([[3, 0, 0], [1, 6, 2]])
    batch = np.array([5, 40]), table, np.array([0, 0, 0]), np.array([2])
    listed = pages(jnp.zeros((0, 4, 32)), summaries, *batch, count=2, keep_first=1, keep_last=1)
    assert listed[:, 0].tolist() == [[0, -1], [0, 2]]
    keys = jnp.ones((2, 64, 2, 32))
    for examples, tokens in ((1, 0), (0, 1)):
        lengths = np.full(examples, 40)
        summaries = selection.summarize_blocks(keys[:examples], lengths, block_size=16)
        summaries = selection.update_block_summaries(summaries, keys[:examples], lengths)
        listed = blocks(jnp.zeros((examples, tokens, 4, 32)), summaries, lengths, count=2, keep_first=1, keep_last=1)
        assert listed.tolist() == [[[0, 2]] * 2] * examples


def test_mistakes_of_summaries_are_named():
    _, pages, *rest = batch()
    summaries = selection.summarize_pages(pages, bounds=False)
    with pytest.raises(ValueError, match="moba reads means"):
        selection.moba_pages(batch()[0], selection.summarize_pages(pages, means=False), *rest, count=2)
    with pytest.raises(ValueError, match="summaries keep bounds or means"):
        selection.summarize_pages(pages, bounds=False, means=False)
    with pytest.raises(ValueError, match="make them of this cache"):
        selection.update_page_summaries(summaries, pages[:, :2], *rest, tokens=TOKENS)
    with pytest.raises(ValueError, match="those of a contiguous cache by summarize_blocks"):
        selection.quest_blocks(batch()[0][None], summaries, jnp.array([1]), count=2)
    with pytest.raises(ValueError, match="of whole blocks of 128 positions"):
        selection.summarize_blocks(jnp.zeros((1, 100, 1, 8)), jnp.array([3]))
