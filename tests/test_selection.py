"""Block selections against brute force on the host, in jit and eagerly, and what attention makes of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask, LocalMask, MultiHeadMask, SegmentMask
from jax_bsk.selection import from_topk, moba, nsa, xattention
from tests.util import assert_close, dense, loss_of

BLOCK = 32


def inputs(seed: int, batch=2, q_len=200, kv_len=200, heads=4, kv_heads=2, size=16):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, q_len, heads, size)).astype(np.float32),
        rng.normal(size=(batch, kv_len, kv_heads, size)).astype(np.float32),
    )


def attended(chosen: np.ndarray, unit: int, q_len: int, kv_len: int, mask: np.ndarray | None, block_q=BLOCK):
    """Elements that chosen [..., nq, units] stands for."""
    elements = chosen.repeat(block_q, -2).repeat(unit, -1)[..., :q_len, :kv_len]
    return elements if mask is None else elements & mask


def assert_selects(build, expected: np.ndarray) -> BlockMask:
    """`build()` under jit gives the expected elements, in lists that kernels accept, and as it does eagerly."""
    selected = jax.jit(build)()
    assert selected.to_dense().shape == expected.shape
    np.testing.assert_array_equal(selected.to_dense(), expected)
    rows = selected.row_offsets[..., 1:] - selected.row_offsets[..., :-1]
    for at in np.ndindex(rows.shape):
        begin = selected.row_offsets[at]
        ids, tiles = (x[at[:2]][begin : begin + rows[at]] for x in (selected.kv_blocks, selected.tiles))
        # Partial ones first, then full ones, ascending in each.
        order = np.where(tiles >= 0, 0, 10**6) + ids
        assert (np.diff(order) > 0).all(), (at, ids, tiles)
    return selected


def top(scores: np.ndarray, k: int, required: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The definition, a row at a time."""
    chosen = np.zeros(scores.shape, bool)
    for at in np.ndindex(scores.shape[:-1]):
        row, must, may = scores[at], required[at[-1]] & possible[at[-1]], possible[at[-1]]
        others = [j for j in np.argsort(-row, kind="stable") if may[j] and not must[j] and row[j] > -np.inf]
        chosen[at][must] = True
        chosen[at][others[: max(0, k - must.sum())]] = True
    return chosen


# ---- from_topk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "causal", "own_block"),
    [(1, True, False), (1, True, True), (3, True, False), (3, True, True), (3, False, True), (20, True, False)],
)
def test_top_k(k, causal, own_block):
    rng = np.random.default_rng(k)
    length, n = 200, 7
    scores = np.round(rng.normal(size=(2, 3, n, n)) * 2).astype(np.float32)  # ties
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[0, 0, 2, 1] = np.nan
    scores[1, 0, :, 0] = np.inf
    mask = np.tri(length, dtype=bool) if causal else None
    possible = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    required = np.eye(n, dtype=bool) & own_block
    expected = attended(
        top(np.nan_to_num(scores, nan=-np.inf, posinf=1e30, neginf=-np.inf), k, required, possible),
        BLOCK,
        length,
        length,
        mask,
    )
    build = functools.partial(
        from_topk, k=k, q_len=length, block_size=BLOCK, mask=CausalMask() if causal else None, own_block=own_block
    )
    selected = assert_selects(lambda: build(jnp.asarray(scores)), expected)
    assert selected.bit_tiles.shape[:3] == (1, 1, 1 if causal else 0)
    if not own_block:
        reference = BlockMask.from_topk(
            scores, min(k, n), q_len=length, block_size=BLOCK, mask=CausalMask() if causal else None
        )
        np.testing.assert_array_equal(selected.to_dense(), reference.to_dense())


def test_top_k_eager_is_top_k_in_jit():
    scores = jax.random.normal(jax.random.key(0), (1, 2, 4, 5))
    build = functools.partial(from_topk, k=2, q_len=128, kv_len=150, block_size=BLOCK, mask=CausalMask())
    eager, jitted = build(scores), jax.jit(build)(scores)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    assert not eager.is_traced


def test_top_k_of_other_masks_and_shapes():
    """Blocks of two sizes, a mask of several tiles, more keys than queries, and scores without batch and heads."""
    rng = np.random.default_rng(3)
    q_len, kv_len = 150, 260
    mask = CausalMask(offset=110) & LocalMask((90, None))
    elements = mask.bind(q_len, kv_len, block_size=32).to_dense()[0, 0]
    scores = rng.normal(size=(3, 9)).astype(np.float32)
    possible = np.zeros((3, 9), bool)
    for i, j in np.ndindex(3, 9):
        possible[i, j] = elements[i * 64 : i * 64 + 64, j * 32 : j * 32 + 32].any()
    own = np.array([[i * 64 < (j + 1) * 32 and j * 32 < min(i * 64 + 64, q_len) for j in range(9)] for i in range(3)])
    chosen = top(scores, 3, own, possible)
    assert (own & possible).any()
    expected = attended(chosen, 32, q_len, kv_len, elements, block_q=64)[None, None]
    build = functools.partial(
        from_topk, k=3, q_len=q_len, kv_len=kv_len, block_size=(64, 32), mask=mask, own_block=True
    )
    assert_selects(lambda: build(jnp.asarray(scores)), expected)


@pytest.mark.parametrize("k", [1, 2])
def test_new_scores_do_not_recompile(k):
    build = jax.jit(functools.partial(from_topk, k=k, q_len=96, block_size=BLOCK))
    for seed in range(3):
        build(jax.random.normal(jax.random.key(seed), (3, 3))).check()
    assert build._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  (JAX's types do not show it)


# ---- MoBA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moba_block", "causal", "share_group"),
    [(32, True, False), (64, True, False), (64, True, True), (64, False, False)],
)
def test_moba(moba_block, causal, share_group):
    query, key = inputs(moba_block, q_len=200, kv_len=200)
    nq, units, top_k = 7, -(-200 // moba_block), 3
    group = 2
    scores = np.zeros((2, 4, nq, units))
    for b, h, i, j in np.ndindex(scores.shape):
        queries = query[b, i * BLOCK : (i + 1) * BLOCK, h].astype(np.float64)
        keys = key[b, j * moba_block : (j + 1) * moba_block, h // group].astype(np.float64)
        scores[b, h, i, j] = (queries @ keys.mean(0)).mean()
    if share_group:
        scores = scores.reshape(2, 2, group, nq, units).sum(2).repeat(group, 1)
    starts = np.arange(nq)[:, None] * BLOCK
    unit_starts = np.arange(units) * moba_block
    own = (unit_starts <= starts) & (starts < unit_starts + moba_block)
    possible = unit_starts <= starts + BLOCK - 1 if causal else np.ones((nq, units), bool)
    chosen = top(scores, top_k, own, possible)
    expected = attended(chosen, moba_block, 200, 200, np.tri(200, dtype=bool) if causal else None)
    build = functools.partial(
        moba, top_k=top_k, moba_block=moba_block, block_size=BLOCK, is_causal=causal, share_group=share_group
    )
    assert_selects(lambda: build(jnp.asarray(query), jnp.asarray(key)), expected)


# ---- NSA ------------------------------------------------------------------------------------------------------------


def importance(query, key, unit, length, stride, allowed=None):
    """Equations 8 to 10, a query at a time: [B, K, nq, units]; within allowed [B, T, S] where it is given."""
    (batch, q_len, heads, size), (_, kv_len, kv_heads, _) = query.shape, key.shape
    count = (kv_len - length) // stride + 1
    scores = np.zeros((batch, kv_heads, -(-q_len // BLOCK), -(-kv_len // unit)))
    shared = np.zeros((count, scores.shape[-1]))  # stretches of d keys that compressed key and block share
    for i, j in np.ndindex(shared.shape):
        shared[i, j] = max(0, min(i * stride + length, (j + 1) * unit) - max(i * stride, j * unit)) / stride
    for b, h, t in np.ndindex(batch, heads, q_len):
        group = h // (heads // kv_heads)
        seen = [i for i in range(count) if i * stride + length - 1 <= t]
        if allowed is not None:
            seen = [i for i in seen if allowed[b, t, [i * stride, i * stride + length - 1]].all()]
        if seen:
            keys = np.stack([key[b, i * stride : i * stride + length, group].mean(0) for i in seen])
            logits = keys @ query[b, t, h] / np.sqrt(size)
            p = np.exp(logits - logits.max())
            scores[b, group, t // BLOCK] += p / p.sum() @ shared[seen]
    return scores


@pytest.mark.parametrize(
    ("unit", "initial", "local", "kv_heads"), [(32, 1, 2, 2), (64, 0, 1, 2), (32, 2, 0, 1), (32, 0, 0, 4)]
)
def test_nsa(unit, initial, local, kv_heads):
    query, key = inputs(unit, batch=1, q_len=170, kv_len=170, kv_heads=kv_heads)
    query *= 4
    scores = importance(query.astype(np.float64), key.astype(np.float64), unit, 16, 8)
    nq, units = scores.shape[-2:]
    i, j = np.arange(nq)[:, None], np.arange(units)
    own = (i * BLOCK) // unit
    possible = j <= own
    required = (j < initial) | ((j > own - local) & (j <= own))
    scores = scores if kv_heads == 1 else scores.repeat(4 // kv_heads, 1)
    expected = attended(top(scores, 4, required, possible), unit, 170, 170, np.tri(170, dtype=bool))
    build = functools.partial(
        nsa,
        top_k=4,
        compression_block=16,
        compression_stride=8,
        selection_block=unit,
        initial_blocks=initial,
        local_blocks=local,
        block_size=BLOCK,
    )
    selected = assert_selects(lambda: build(jnp.asarray(query), jnp.asarray(key)), expected)
    if kv_heads == 2 and unit == 32:
        compressed = np.stack([key[:, n * 8 : n * 8 + 16].mean(1) for n in range((170 - 16) // 8 + 1)], 1)
        given = jax.jit(functools.partial(build, query, key))(compressed_key=compressed)
        np.testing.assert_array_equal(given.to_dense(), selected.to_dense())


def test_nsa_of_few_keys():
    """Fewer keys than one compressed key stands for: all that is open is required or tied at 0."""
    query, key = inputs(0, batch=1, q_len=20, kv_len=20)
    selected = jax.jit(functools.partial(nsa, block_size=32, selection_block=32))(query, key)
    np.testing.assert_array_equal(selected.to_dense()[0, 0], np.tri(20, dtype=bool))


# ---- XAttention -----------------------------------------------------------------------------------------------------


def block_weights(query, key, stride, causal, allowed=None):
    """Antidiagonal sums of all cells, softmax over the cells of a row, sums over blocks; see `importance`."""
    (batch, q_len, heads, size), (_, kv_len, kv_heads, _) = query.shape, key.shape
    nq, nk = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    query = np.pad(query, [(0, 0), (0, nq * BLOCK - q_len), (0, 0), (0, 0)])
    key = np.pad(key, [(0, 0), (0, nk * BLOCK - kv_len), (0, 0), (0, 0)]).repeat(heads // kv_heads, 2)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(size) / stride
    cells = logits.reshape(batch, heads, nq * BLOCK // stride, stride, nk * BLOCK // stride, stride)
    sums = np.einsum("bnrxcy,xy->bnrc", cells, np.eye(stride)[::-1])
    row, column = np.arange(sums.shape[2])[:, None], np.arange(sums.shape[3])
    seen = (column * stride < kv_len) & ((column <= row) | (not causal))
    if allowed is not None:
        ends = [
            (np.minimum(row * stride + n, q_len - 1), np.minimum(column * stride + n, kv_len - 1))
            for n in (0, stride - 1)
        ]
        seen = seen & (allowed[:, *ends[0]] | allowed[:, *ends[1]])[:, None]
    highest = np.where(seen, sums, -np.inf).max(-1, keepdims=True)
    p = np.where(seen, np.exp(sums - np.where(highest > -np.inf, highest, 0)), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300) * (row * stride < q_len)
    return p.reshape(batch, heads, nq, BLOCK // stride, nk, BLOCK // stride).sum((3, 5))


@pytest.mark.parametrize(
    ("threshold", "causal", "stride", "share_group"),
    [(0.7, True, 8, False), (0.7, True, 8, True), (0.9, True, 16, False), (0.8, False, 8, False), (0.0, True, 8, True)],
)
def test_xattention(threshold, causal, stride, share_group):
    query, key = inputs(int(threshold * 10), q_len=201, kv_len=217)
    query *= 3
    weights = block_weights(query.astype(np.float64), key.astype(np.float64), stride, causal)
    nq, nk = weights.shape[-2:]
    if share_group:
        weights = weights.reshape(2, 2, 2, nq, nk).sum(2).repeat(2, 1)
    required = (np.eye(nq, nk, dtype=bool) | (np.arange(nk) < 1)) & causal
    chosen = np.zeros(weights.shape, bool)
    for at in np.ndindex(weights.shape[:-1]):
        w, total = weights[at], weights[at].sum()
        chosen[at] = required[at[-1]]
        for j in np.argsort(-w, kind="stable"):
            if w[chosen[at]].sum() < threshold * total and w[j] > 0:
                chosen[at][j] = True
    mask = np.tri(201, 217, dtype=bool) if causal else None
    build = functools.partial(
        xattention, stride=stride, threshold=threshold, block_size=BLOCK, is_causal=causal, share_group=share_group
    )
    selected = assert_selects(
        lambda: build(jnp.asarray(query), jnp.asarray(key)), attended(chosen, BLOCK, 201, 217, mask)
    )
    if threshold == 0.7:
        assert 0.3 < selected.density / (np.tri(nq, nk).mean()) < 0.99  # it does leave blocks out


def test_xattention_with_a_threshold_a_head():
    query, key = inputs(11)
    build = jax.jit(functools.partial(xattention, block_size=BLOCK))
    several = build(query, key, threshold=jnp.array([0.0, 0.5, 0.9, 1.0])).to_dense()
    for head, threshold in enumerate([0.0, 0.5, 0.9, 1.0]):
        one = build(query, key, threshold=jnp.float32(threshold)).to_dense()
        np.testing.assert_array_equal(several[:, head], one[:, head])
    np.testing.assert_array_equal(several[:, 3], np.broadcast_to(np.tri(200, dtype=bool), (2, 200, 200)))


# ---- all of them ----------------------------------------------------------------------------------------------------

SELECTIONS = {
    "moba": functools.partial(moba, top_k=2, moba_block=64, block_size=BLOCK),
    "nsa": functools.partial(nsa, top_k=3, selection_block=32, block_size=BLOCK),
    "xattention": functools.partial(xattention, threshold=0.6, block_size=BLOCK, share_group=True),
}


@jax.jit
def dense_step(q, k, v, mask):
    return jax.value_and_grad(loss_of(lambda *a: dense(*a, mask=mask)), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("name", ["moba", "xattention"])
def test_attention_over_a_traced_selection(name, implementation):
    """In one jit with attention and its gradient: dense attention with the elements that were chosen."""
    query, key = inputs(20)
    value = np.random.default_rng(21).normal(size=key.shape).astype(np.float32)
    select = SELECTIONS[name]

    @jax.jit
    def step(q, k, v):
        def out(q, k, v):
            return sparse_attention(q, k, v, mask=select(q, k), implementation=implementation)

        return jax.value_and_grad(loss_of(out), (0, 1, 2))(q, k, v), select(q, k)

    (loss, gradients), selected = step(query, key, value)
    selected.check()
    expected, expected_gradients = dense_step(query, key, value, selected.to_dense())
    assert_close(loss, expected, 1e-3)
    assert_close(gradients, expected_gradients, 5e-5)
    assert 0.1 < selected.density < 0.9


def test_unbatched_and_low_precision():
    query, key = inputs(22, batch=1)
    build = jax.jit(lambda q, k: [select(q, k) for select in SELECTIONS.values()])
    for batched, unbatched in zip(
        build(query.astype(jnp.bfloat16), key.astype(jnp.bfloat16)),
        build(query[0].astype(jnp.bfloat16), key[0].astype(jnp.bfloat16)),
        strict=True,
    ):
        batched.check()
        jax.tree.map(np.testing.assert_array_equal, unbatched, batched)


def test_float64_under_strict_promotion():
    query, key = inputs(23, batch=1)
    with jax.enable_x64(True):
        for name in SELECTIONS:
            jax.jit(SELECTIONS[name])(query.astype(np.float64), key.astype(np.float64)).check()


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(1, 0, 40), (1, 40, 0), (0, 40, 40)])
def test_nothing_to_select_from(batch, q_len, kv_len):
    query, key = inputs(24, batch=batch, q_len=q_len, kv_len=kv_len)
    for selected in jax.jit(lambda q, k: [select(q, k) for select in SELECTIONS.values()])(query, key):
        selected.check()
        assert selected.shape == (batch, 4, q_len, kv_len) if batch else selected.row_offsets.size == 0


def test_token_scores_in_pieces(monkeypatch):
    """What bounds the memory changes nothing."""
    query, key = inputs(25, batch=1)
    whole = {name: jax.jit(SELECTIONS[name])(query, key) for name in ("nsa", "xattention")}
    monkeypatch.setattr("jax_bsk.selection.inputs.CHUNK_ELEMENTS", 10_000)
    for name, expected in whole.items():
        pieces = jax.jit(lambda q, k, name=name: SELECTIONS[name](q, k))(query, key)
        jax.tree.map(np.testing.assert_array_equal, pieces, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: moba(q, k, top_k=0), ValueError, "top_k is at least 1"),
        (lambda q, k: moba(q, k, top_k=1.5), TypeError, "top_k is an int"),  # pyright: ignore[reportArgumentType]
        (lambda q, k: moba(q, k, moba_block=100, block_size=64), ValueError, "multiple of the key block 64"),
        (lambda q, k: moba(q[..., :3], k), ValueError, "key has query's head size 3, got"),
        (lambda q, k: moba(q[:, :, :3], k), ValueError, "grouped-query"),
        (lambda q, k: moba(q.astype(int), k), TypeError, "query is a floating-point array"),
        (lambda q, k: nsa(q, k, compression_stride=12), ValueError, "compression_stride divides"),
        (lambda q, k: nsa(q, k, local_blocks=-1), ValueError, "0 or more"),
        (lambda q, k: nsa(q, k, compressed_key=k), ValueError, "compressed_key has shape"),
        (lambda q, k: xattention(q, k, stride=24), ValueError, "stride divides"),
        (lambda q, k: xattention(q, k, threshold=1.5), ValueError, r"threshold is a number in \[0, 1\]"),
        (lambda q, k: xattention(q, k, threshold=[0.5] * 3), ValueError, "one per head"),  # pyright: ignore[reportArgumentType]
        (lambda q, k: from_topk(np.ones((2, 3), np.float32), 1, q_len=200), ValueError, r"\(nq, nk\) = \(2, 2\)"),
        (lambda q, k: from_topk(np.ones((2, 2), bool), 1, q_len=200), TypeError, "real numbers"),
        (lambda q, k: from_topk(np.ones((2, 2)), 1, q_len=200, mask=np.ones((2, 2), bool)), TypeError, "mask is"),  # pyright: ignore[reportArgumentType]
        (lambda q, k: moba(q, k, mask=SegmentMask(np.zeros((3, 200), int))), ValueError, "mask has 3 examples"),
        (lambda q, k: moba(q, k, always=MultiHeadMask([CausalMask()] * 3)), ValueError, "always has 3 heads"),
        (lambda q, k: nsa(q, k, always=np.ones((2, 2), bool)), TypeError, "always is a"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*inputs(0))
