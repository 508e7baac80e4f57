"""Documents, windows and sinks on top of selections: candidates of a mask, blocks that are always chosen, elements.

Each against its definition by brute force, with document ids that are traced.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bsk.flax
from jax_bsk import nsa_attention, selection, sparse_attention, sparsek_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, MultiHeadMask, SegmentMask
from tests import test_sparsek_attention as sparsek_tests
from tests.test_nsa import stretches
from tests.test_selection import BLOCK, assert_selects, attended, block_weights, importance, inputs
from tests.util import assert_close, collectives, dense, loss_of

T = 200
WINDOW, SINKS = 40, 3
ALWAYS = LocalMask((WINDOW, 0)) | GlobalMask(SINKS)


def documents(seed: int, batch=2, length=T, count=3) -> np.ndarray:
    """int32 [B, T], non-decreasing, of documents that end anywhere."""
    ends = np.random.default_rng(seed).integers(1, length, (batch, count - 1))
    return (np.arange(length) >= np.sort(ends)[..., None]).sum(1).astype(np.int32)


def same_document(ids: np.ndarray) -> np.ndarray:
    return ids[:, :, None] == ids[:, None]


def always_dense(length=T) -> np.ndarray:
    q, k = np.arange(length)[:, None], np.arange(length)
    return ((q - k <= WINDOW) & (q >= k)) | (q < SINKS) | (k < SINKS)


def blocks(elements: np.ndarray, unit=BLOCK) -> Any:
    """Whether any element of [.., T, S] is in a block."""
    pad = [(0, 0)] * (elements.ndim - 2) + [(0, -elements.shape[-2] % BLOCK), (0, -elements.shape[-1] % unit)]
    padded = np.pad(elements, pad)
    shape = (*elements.shape[:-2], padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // unit, unit)
    return padded.reshape(shape).any((-3, -1))


def in_groups(found: np.ndarray, group: int) -> Any:
    padded = np.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, -found.shape[-1] % group)])
    return padded.reshape(*padded.shape[:-1], -1, group).any(-1)


def best(scores: np.ndarray, k: int, required: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The required groups that are possible, and the best others until there are k, a row at a time."""
    required, possible = (np.broadcast_to(x, scores.shape) for x in (required & possible, possible))
    chosen = required.copy()
    for at in np.ndindex(scores.shape[:-1]):
        others = [j for j in np.argsort(-scores[at], kind="stable") if possible[at][j] and not required[at][j]]
        chosen[at][others[: max(0, k - required[at].sum())]] = True
    return chosen


def own(nq: int, unit: int) -> np.ndarray:
    i, j = np.arange(nq)[:, None], np.arange(-(-T // unit))
    return (j * unit < (i + 1) * BLOCK) & ((j + 1) * unit > i * BLOCK)


# ---- choices against their definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [None, ALWAYS])
def test_top_k(always):
    scores, ids = np.random.default_rng(0).normal(size=(1, 3, 7, 7)).astype(np.float32), documents(1)
    elements = same_document(ids)[:, None] & np.tri(T, dtype=bool)
    required = blocks(always_dense()) if always is not None else np.zeros((7, 7), bool)
    chosen = best(np.repeat(scores, 2, 0), 3, required, blocks(elements))
    expected = attended(chosen, BLOCK, T, T, elements)

    def build(ids):
        mask = CausalMask() & SegmentMask(ids, contiguous=True)
        return selection.from_topk(scores, 3, q_len=T, block_size=BLOCK, mask=mask, always=always)

    selected = assert_selects(lambda: build(jnp.asarray(ids)), expected)
    np.testing.assert_array_equal(build(ids).to_dense(), expected)
    most = np.maximum(blocks(always_dense()).sum(1), 3) if always is not None else 3
    assert selected.capacity == np.minimum(np.arange(1, 8), most).sum()  # room for k or the window, not for all


@pytest.mark.parametrize(
    ("moba_block", "share_group", "always"), [(32, False, None), (64, True, ALWAYS), (32, False, ALWAYS)]
)
def test_moba(moba_block, share_group, always):
    (query, key), ids = inputs(moba_block), documents(2)
    nq, units, group = 7, -(-T // moba_block), 2
    scores = np.zeros((2, 4, nq, units))
    for b, h, i, j in np.ndindex(scores.shape):
        queries = query[b, i * BLOCK : (i + 1) * BLOCK, h].astype(np.float64)
        scores[b, h, i, j] = (queries @ key[b, j * moba_block : (j + 1) * moba_block, h // group].mean(0)).mean()
    if share_group:
        scores = scores.reshape(2, 2, group, nq, units).sum(2).repeat(group, 1)
    elements = same_document(ids)[:, None] & np.tri(T, dtype=bool)
    required = own(nq, moba_block)
    if always is not None:
        required = required | in_groups(blocks(always_dense()) & blocks(elements), moba_block // BLOCK)
    expected = attended(best(scores, 3, required, blocks(elements, moba_block)), moba_block, T, T, elements)
    options: Any = {"top_k": 3, "moba_block": moba_block, "block_size": BLOCK, "share_group": share_group}
    build = functools.partial(selection.moba, query, key, **options, always=always)
    assert_selects(lambda: build(mask=SegmentMask(jnp.asarray(ids))), expected)


@pytest.mark.parametrize("always", [None, ALWAYS])
def test_nsa(always):
    (query, key), ids = inputs(3), documents(4)
    query *= 4
    allowed = same_document(ids)
    scores = importance(query.astype(np.float64), key.astype(np.float64), BLOCK, 16, 8, allowed).repeat(2, 1)
    elements = allowed[:, None] & np.tri(T, dtype=bool)
    i, j = np.arange(7)[:, None], np.arange(7)
    required = (j < 1) | ((j > i - 2) & (j <= i))
    if always is not None:
        required = required | blocks(always_dense())
    expected = attended(best(scores, 4, required, blocks(elements)), BLOCK, T, T, elements)
    sizes: Any = {"compression_block": 16, "compression_stride": 8, "selection_block": BLOCK, "block_size": BLOCK}
    build = functools.partial(selection.nsa, query, key, top_k=4, **sizes, always=always)
    assert_selects(lambda: build(mask=SegmentMask(jnp.asarray(ids))), expected)


@pytest.mark.parametrize(("share_group", "always"), [(False, None), (True, ALWAYS)])
def test_xattention(share_group, always):
    (query, key), ids = inputs(5), documents(6)
    query *= 3
    allowed = same_document(ids)
    weights = block_weights(query.astype(np.float64), key.astype(np.float64), 8, True, allowed)
    if share_group:
        weights = weights.reshape(2, 2, 2, 7, 7).sum(2).repeat(2, 1)
    elements = allowed[:, None] & np.tri(T, dtype=bool)
    possible = np.broadcast_to(blocks(elements), weights.shape)
    required = np.eye(7, dtype=bool) | (np.arange(7) < 1)
    required = (required | blocks(always_dense()) if always is not None else required) & possible
    chosen = required.copy()
    for at in np.ndindex(weights.shape[:-1]):
        w = np.where(possible[at], weights[at], 0)
        for n in np.argsort(-w, kind="stable"):
            if w[chosen[at]].sum() < 0.7 * w.sum() and w[n] > 0:
                chosen[at][n] = True
    expected = attended(chosen, BLOCK, T, T, elements)
    options: Any = {"threshold": 0.7, "block_size": BLOCK, "share_group": share_group, "always": always}
    build = functools.partial(selection.xattention, query, key, **options)
    assert_selects(lambda: build(mask=SegmentMask(jnp.asarray(ids))), expected)


# ---- SparseK: choice, gates and gradients ---------------------------------------------------------------------------

CASE = sparsek_tests.Case(batch=2, heads=4, window=40, top_k=1, spread=0.4)


def sparsek_choice(scores: np.ndarray, ids: np.ndarray, always: Any) -> tuple[np.ndarray, np.ndarray]:
    """bool and soft gates [B, G, T, S]."""
    open_blocks = blocks(same_document(ids) & np.tri(T, dtype=bool))
    mask, gates = np.zeros((2, 2, T, T), bool), np.ones((2, 2, T, T))
    for b, g, i in itertools.product(range(2), range(2), range(7)):
        z = np.array([scores[b, j : j + BLOCK, g].mean() for j in range(0, T, BLOCK)])
        fixed = np.arange(7) >= max(i * BLOCK - CASE.window + 1, 0) // BLOCK
        fixed = (fixed | blocks(always_dense())[i] if always is not None else fixed) & open_blocks[b, i]
        free = open_blocks[b, i] & ~fixed
        z = np.where(free, z, -np.inf)
        p = sparsek_tests.soft(z, CASE.top_k)
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        for j in [*np.flatnonzero(fixed), *[j for j in np.argsort(-z, kind="stable") if free[j]][: CASE.top_k]]:
            mask[b, g, rows, j * BLOCK : (j + 1) * BLOCK] = True
            gates[b, g, rows, j * BLOCK : (j + 1) * BLOCK] = 1 if fixed[j] else p[j]
    return mask & (same_document(ids)[:, None] & np.tri(T, dtype=bool)), gates


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("always", [None, GlobalMask(SINKS) | LocalMask((WINDOW, 0))])
def test_sparsek(always, x64):
    """Lists and values, and gradients by central differences of the definition, of "soft" gates."""
    arrays, ids = sparsek_tests.inputs(CASE), documents(7, count=2)
    mask, gates = sparsek_choice(arrays[3], ids, always)
    assert (gates[mask] < 1).any()
    options: Any = {**CASE.options, "gate": "soft", "always": always}

    def expected(query, key, value, scores):
        return sparsek_tests.reference(query, key, value, mask, sparsek_choice(scores, ids, always)[1])

    @jax.jit
    def actual(ids, *arrays):
        def attend(*arrays):
            return sparsek_attention(*arrays, mask=SegmentMask(ids), implementation="xla", **options)

        chosen, _ = selection.sparsek(arrays[3], mask=SegmentMask(ids), **options)
        return attend(*arrays), jax.grad(loss_of(attend), tuple(range(4)))(*arrays), chosen

    out, grads, chosen = actual(ids, *arrays)
    np.testing.assert_array_equal(chosen.to_dense(), mask)
    np.testing.assert_allclose(out, expected(*arrays), atol=1e-12)
    rng, step = np.random.default_rng(8), 1e-6
    for n, grad in enumerate(grads):
        way = rng.normal(size=arrays[n].shape)
        ahead, behind = ([*arrays[:n], arrays[n] + h * way, *arrays[n + 1 :]] for h in (step, -step))
        slope = (sparsek_tests.loss(expected(*ahead)) - sparsek_tests.loss(expected(*behind))) / (2 * step)
        np.testing.assert_allclose((np.asarray(grad) * way).sum(), slope, atol=2e-7, rtol=1e-6, err_msg=str(n))
    assert np.abs(np.asarray(grads[3])).max() > 1e-4


def test_sparsek_of_everything_is_sparsek():
    """A mask that leaves everything open changes neither lists nor gates."""
    scores = jnp.asarray(sparsek_tests.inputs(CASE)[3], jnp.float32)

    @jax.jit
    def both(ids):
        build = functools.partial(selection.sparsek, scores, gate="soft", **CASE.options)
        return build(), build(mask=SegmentMask(ids))

    (plain, gates), (chosen, same) = both(jnp.zeros(T, jnp.int32))
    np.testing.assert_array_equal(plain.to_dense(), chosen.to_dense())
    for at in np.ndindex(2, 2):
        rows = np.repeat(np.arange(7), np.diff(plain.row_offsets[at]))
        by_block = (np.lexsort((x.kv_blocks[at][: rows.size], rows)) for x in (plain, chosen))
        np.testing.assert_allclose(*(x[at][order] for x, order in zip((gates, same), by_block, strict=True)), atol=1e-6)


# ---- attention ------------------------------------------------------------------------------------------------------


def test_attention_keeps_to_documents(implementation):
    """Selection, attention and gradient in one jit: no gradient reaches another document."""
    (query, key), ids = inputs(9), documents(10)
    value = np.random.default_rng(11).normal(size=key.shape).astype(np.float32)

    def select(q, k, ids):
        return selection.moba(q, k, top_k=2, moba_block=64, block_size=BLOCK, mask=SegmentMask(ids), always=ALWAYS)

    @jax.jit
    def step(q, k, v, ids):
        def out(q, k, v):
            return sparse_attention(q, k, v, mask=select(q, k, ids), implementation=implementation)

        first = jax.grad(lambda v: jnp.where((ids == 0)[..., None, None], out(q, k, v), 0).sum())(v)
        return jax.value_and_grad(loss_of(out), (0, 1, 2))(q, k, v), first, select(q, k, ids)

    (loss, gradients), first, selected = step(query, key, value, ids)
    expected = jax.value_and_grad(loss_of(functools.partial(dense, mask=selected.to_dense())), (0, 1, 2))
    expected_loss, expected_gradients = jax.jit(expected)(query, key, value)
    assert_close(loss, expected_loss, 1e-3)
    assert_close(gradients, expected_gradients, 5e-5)
    assert (np.asarray(first)[ids != 0] == 0).all()
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  (JAX's types do not show it)
    step(query, key, value, documents(12))
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_nsa_attention_keeps_to_documents():
    rng, length, window = np.random.default_rng(13), 128, 40
    query, key, value, gates = (
        jnp.asarray(rng.normal(size=(2, length, n, size)), jnp.float32) for n, size in ((4, 8), (2, 8), (2, 8), (4, 3))
    )
    ids = documents(14, length=length, count=2)
    sizes: Any = {"compression_block": 16, "compression_stride": 8, "selection_block": BLOCK, "block_size": BLOCK}
    options: Any = {"top_k": 2, "local_blocks": 1, **sizes}

    @jax.jit
    def step(query, key, value, gates, ids):
        def attend(*arrays):
            return nsa_attention(*arrays, window=window, mask=SegmentMask(ids), **options)

        arrays = (query, key, value, gates)
        chosen = selection.nsa(query, key, mask=SegmentMask(ids), **options)
        return attend(*arrays), jax.grad(loss_of(attend), (0, 1, 2, 3))(*arrays), chosen

    out, gradients, chosen = step(query, key, value, gates, ids)
    t, same, first = np.arange(length)[:, None], same_document(ids), np.arange((length - 16) // 8 + 1) * 8
    compressed = (first + 15 <= t) & same[:, :, first] & same[:, :, first + 15]
    near = (np.arange(length) <= t) & (t - np.arange(length) < window) & same
    masks = compressed[:, None], chosen.to_dense(), near[:, None]

    def reference(query, key, value, gates):
        keys, values = stretches(key, 16, 8), stretches(value, 16, 8)
        pairs = (keys, values), (key, value), (key, value)
        branches = (dense(query, *pair, mask) for pair, mask in zip(pairs, masks, strict=True))
        return sum(gates[..., n, None] * branch for n, branch in enumerate(branches))

    expected = jax.jit(lambda *x: (reference(*x), jax.grad(loss_of(reference), (0, 1, 2, 3))(*x)))
    assert_close((out, gradients), expected(query, key, value, gates), 1e-4)


@pytest.mark.parametrize("name", ["NSASelfAttention", "SparseKSelfAttention"])
def test_layers_keep_to_documents(name):
    """Tokens of the other document change nothing."""
    fn, options = {
        "NSASelfAttention": (nsa_attention, {"window": 32, "top_k": 2, "selection_block": 32}),
        "SparseKSelfAttention": (sparsek_attention, {"window": 32, "top_k": 1, "always": GlobalMask(1)}),
    }[name]
    attend = functools.partial(fn, block_size=32, implementation="cpu", **options)
    layer = getattr(jax_bsk.flax.nnx, name)(2, 32, attention_fn=attend, rngs=nnx.Rngs(0))
    x, ids = jax.random.normal(jax.random.key(0), (2, 128, 32)), documents(15, length=128, count=2)
    changed = jnp.where((ids == 0)[..., None], x, x[::-1])

    @jax.jit
    def call(x, ids):
        return layer(x, mask=SegmentMask(ids))

    first, other = (np.asarray(call(y, ids)) for y in (x, changed))
    np.testing.assert_allclose(first[ids == 0], other[ids == 0], atol=1e-6)
    assert np.abs(first - other)[ids == 1].max() > 1e-3


@pytest.mark.parametrize("name", ["NSASelfAttention", "SparseKSelfAttention"])
def test_layers_of_linen_pass_the_mask_on(name):
    given = []

    def attend(query, key, value, *_, mask=None, **options):
        given.append(mask)
        return query

    layer = getattr(jax_bsk.flax.linen, name)(2, attention_fn=attend)
    mask = SegmentMask(np.zeros((2, 128), np.int32))
    jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((2, 128, 32)), mask=mask))
    jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((2, 128, 32))))
    assert given == [mask, None]


# ---- shapes, heads, meshes ------------------------------------------------------------------------------------------


def test_known_masks_choose_as_traced_ones_do():
    """The native call for masks that are known and shared, and the sorts for traced ones: the same lists."""
    (query, key), near = inputs(20), LocalMask((90, 0))

    @jax.jit
    def choose(ids):
        found = []
        for mask in (near, near & SegmentMask(ids)):
            sizes: Any = {"block_size": BLOCK, "mask": mask, "always": GlobalMask(1)}
            found.append(selection.moba(query, key, top_k=2, moba_block=64, **sizes))
            found.append(selection.xattention(query, key, threshold=0.8, **sizes))
        return found

    found = choose(jnp.zeros(T, jnp.int32))
    for known, traced in zip(found[:2], found[2:], strict=True):
        np.testing.assert_array_equal(known.to_dense(), traced.to_dense())
        assert known.bit_tiles.shape[:2] == (1, 1)


def test_masks_of_heads_and_traced_windows():
    """A mask and a window per list, and a window that is traced itself; unbatched arrays."""
    query, key = inputs(16, batch=1)
    heads = MultiHeadMask([LocalMask((n, 0)) for n in (10, 40, 80, 199)])
    build = functools.partial(selection.moba, query[0], key[0], top_k=1, moba_block=BLOCK, block_size=BLOCK)
    selected = jax.jit(lambda: build(mask=heads, always=heads))()
    dense_heads = np.stack([np.tri(T, dtype=bool) & ~np.tri(T, k=-n - 1, dtype=bool) for n in (10, 40, 80, 199)])[None]
    np.testing.assert_array_equal(selected.to_dense(), dense_heads)

    @jax.jit
    def of_window(left):
        return build(always=CausalMask() & ~CausalMask(offset=-left - 1))

    for left in (10, 80):
        near = blocks(np.tri(T, dtype=bool) & ~np.tri(T, k=-left - 1, dtype=bool))
        expected = attended(near, BLOCK, T, T, np.tri(T, dtype=bool))
        np.testing.assert_array_equal(of_window(jnp.int32(left)).to_dense(), np.broadcast_to(expected, (1, 4, T, T)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_examples_choose_where_they_are(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    (query, key), ids = inputs(17), documents(18)
    scores = np.random.default_rng(19).normal(size=(2, T, 2)).astype(np.float32)

    @jax.jit
    def choose(q, k, scores, ids):
        options: Any = {"block_size": BLOCK, "mask": SegmentMask(ids, contiguous=True), "always": ALWAYS}
        return selection.xattention(q, k, **options), selection.sparsek(scores, window=40, **options)

    arrays = (query, key, scores, ids)
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]
    compiled = choose.lower(*sharded).compile()
    for a, b in zip(jax.tree.leaves(choose(*arrays)), jax.tree.leaves(compiled(*sharded)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert collectives(compiled) == []
