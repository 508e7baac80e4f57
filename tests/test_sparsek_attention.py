"""SparseK attention against its definition in numpy, block by block and in float64."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import selection, sparse_attention, sparsek_attention
from jax_bsk.masks import CausalMask
from jax_bsk.selection._prefixes import take, top_of_prefixes
from tests.util import assert_close, collectives, loss_of

BLOCK = 32


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 1
    q_len: int = 200
    kv_len: int = 200
    heads: int = 2
    kv_heads: int = 2
    score_heads: int = 2
    block_q: int = BLOCK
    block_kv: int = BLOCK
    window: int = 40
    top_k: int = 2
    spread: float = 1.0  # of block scores: SparseK's soft part is 1 wide
    slope: float = 0.0

    @property
    def options(self) -> dict:
        return {"window": self.window, "top_k": self.top_k, "block_size": (self.block_q, self.block_kv)}


CASES = {
    "plain": Case(),
    "whole-blocks": Case(q_len=256, kv_len=256, batch=2),
    "one-chosen": Case(top_k=1, window=1),
    "as-many-as-there-are": Case(top_k=20),
    "grouped": Case(heads=4, score_heads=2, batch=2),
    "grouped-a-choice-a-query-head": Case(heads=4, score_heads=4),
    "one-choice-in-all": Case(heads=4, score_heads=1, batch=2),
    "multi-query": Case(heads=4, kv_heads=1, score_heads=1),
    "wide-query-blocks": Case(block_q=64, q_len=250, kv_len=250),
    "wide-key-blocks": Case(block_kv=64, q_len=500, kv_len=500),
    "close-scores": Case(spread=0.05, top_k=3),
    "far-scores": Case(spread=30.0),
    "ties": Case(spread=0.0, top_k=3),
    "slope": Case(slope=3.0, spread=0.3),
    "fewer-keys": Case(q_len=300, kv_len=150, window=20),
    "fewer-queries": Case(q_len=150, kv_len=300, window=20),
}


def inputs(case: Case, seed: int = 0, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(case.batch, case.q_len, case.heads, 8)) * 2
    key = rng.normal(size=(case.batch, case.kv_len, case.kv_heads, 8))
    value = rng.normal(size=(case.batch, case.kv_len, case.kv_heads, 12))
    scores = rng.normal(size=(case.batch, case.kv_len, case.score_heads)) * case.spread * case.block_kv**0.5
    if not case.spread:
        scores = np.round(rng.normal(size=(case.batch, -(-case.kv_len // case.block_kv), case.score_heads)))
        scores = np.repeat(scores, case.block_kv, 1)[:, : case.kv_len]
    return tuple(x.astype(dtype) for x in (query, key, value, scores))


# ---- the definition -------------------------------------------------------------------------------------------------


def soft(z: np.ndarray, k: int) -> np.ndarray:
    """SparseK of one row: bisection on tau."""
    z = np.asarray(z, np.float64)
    finite = np.isfinite(z)
    if finite.sum() <= k:
        return np.where(finite, 1.0, 0.0)
    low, high = z[finite].min() - 1, z[finite].max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(z - middle, 0, 1).sum() >= k else (low, middle)
    return np.clip(z - low, 0, 1)


def rows_of(scores: np.ndarray, case: Case):
    """For each query block: its window's first block, and the numbers and soft gates of the blocks chosen before it."""
    blocks = [scores[j : j + case.block_kv].mean() for j in range(0, len(scores), case.block_kv)]
    for begin in range(0, case.q_len, case.block_q):
        oldest = max(begin - case.window + 1, 0)
        before = min(oldest // case.block_kv, len(blocks))
        best = sorted(range(before), key=lambda j: (-blocks[j], j))
        chosen = [j for j in best if blocks[j] > -np.inf][: case.top_k]
        p = soft(np.array(blocks[:before]), case.top_k)
        yield before, {j: p[j] for j in chosen}


def attended(scores: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool and soft gates [B, G, T, S]."""
    shape = case.batch, case.score_heads, case.q_len, case.kv_len
    mask, gates = np.zeros(shape, bool), np.ones(shape)
    for b, g in np.ndindex(shape[:2]):
        for i, (before, chosen) in enumerate(rows_of(scores[b, :, g], case)):
            rows = slice(i * case.block_q, (i + 1) * case.block_q)
            mask[b, g, rows, before * case.block_kv :] = True
            for j, p in chosen.items():
                mask[b, g, rows, j * case.block_kv : (j + 1) * case.block_kv] = True
                gates[b, g, rows, j * case.block_kv : (j + 1) * case.block_kv] = p
    return mask & np.tri(case.q_len, case.kv_len, dtype=bool), gates


def sloped(scores: np.ndarray, slope) -> np.ndarray:
    return scores + np.arange(scores.shape[1])[:, None] / 1024 * slope


def reference(query, key, value, mask, gates) -> np.ndarray:
    """Dense attention with gates after the softmax, in numpy."""
    group, lists = query.shape[2] // key.shape[2], query.shape[2] // mask.shape[1]
    key, value = (np.repeat(x, group, 2) for x in (key, value))
    mask, gates = (np.repeat(x, lists, 1) for x in (mask, gates))
    logits = np.where(mask, np.einsum("btnh,bsnh->bnts", query, key) / query.shape[3] ** 0.5, -np.inf)
    highest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(highest > -np.inf, highest, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", gates * weights / np.where(total > 0, total, 1), value)


def loss(out: np.ndarray) -> float:
    """That of `loss_of`."""
    return float((np.sin(out) * np.cos(np.arange(out.size)).reshape(out.shape)).sum())


# ---- choice, values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_choice_and_gates(name):
    case = CASES[name]
    scores = sloped(inputs(case)[3], case.slope)
    mask, gates = attended(scores, case)
    build = functools.partial(selection.sparsek, q_len=case.q_len, **case.options)
    chosen, hard = jax.jit(build)(jnp.asarray(scores, jnp.float32))
    chosen.check()
    np.testing.assert_array_equal(chosen.to_dense(), mask)
    assert chosen.bit_tiles.shape[2] <= 3  # of the diagonal alone, shared
    np.testing.assert_array_equal(hard, np.ones(chosen.kv_blocks.shape))
    _, found = jax.jit(functools.partial(build, gate="soft"))(jnp.asarray(scores, jnp.float32))
    offsets, ids = np.asarray(chosen.row_offsets), np.asarray(chosen.kv_blocks)
    assert found.shape == ids.shape
    for b, g in np.ndindex(ids.shape[:2]):
        for i in range(chosen.nq):
            entries = slice(offsets[b, g, i], offsets[b, g, i + 1])
            expected = gates[b, g, i * case.block_q, ids[b, g, entries] * case.block_kv]
            np.testing.assert_allclose(found[b, g, entries], expected, atol=2e-5 * max(1, case.spread), rtol=0)
        assert (np.asarray(found)[b, g, offsets[b, g, -1] :] == 1).all()
    assert (gates < 1).any() or name in ("as-many-as-there-are", "far-scores", "ties", "one-chosen"), name


@pytest.mark.parametrize(
    ("name", "gate", "implementation"),
    [(n, "soft", "cpu") for n in CASES]
    + [(n, "soft", "xla") for n in ("plain", "grouped")]
    + [(n, "straight-through", "cpu") for n in ("plain", "grouped", "slope")],
)
def test_values_and_gradients(name, gate, implementation, x64):
    """Gradients by central differences of the definition along random directions, each argument by itself.

    Straight-through gates are 1 + p - p0: 1 where they are, with p's derivative. The choice stays as it is.
    """
    case = CASES[name]
    arrays = inputs(case)
    slope = np.full(case.score_heads, case.slope)
    mask, start = attended(sloped(arrays[3], slope), case)

    def expected(query, key, value, scores, slope):
        gates = attended(sloped(scores, slope), case)[1]
        return reference(query, key, value, mask, 1 + gates - start if gate == "straight-through" else gates)

    def actual(query, key, value, scores, slope):
        return sparsek_attention(
            query, key, value, scores, slope=slope, gate=gate, **case.options, implementation=implementation
        )

    point: Any = (*arrays, slope)
    exact = implementation == "xla"  # the native kernel's exp has 1e-8
    out, grads = jax.jit(lambda *p: (actual(*p), jax.grad(loss_of(actual), tuple(range(5)))(*p)))(*point)
    np.testing.assert_allclose(out, expected(*point), atol=1e-12 if exact else 2e-7)
    rng, step = np.random.default_rng(1), 1e-6
    for n, grad in enumerate(grads):
        if name == "ties" and n >= 3:
            continue  # where scores are equal the definition has corners
        way = rng.normal(size=point[n].shape)
        ahead, behind = ([*point[:n], point[n] + h * way, *point[n + 1 :]] for h in (step, -step))
        slopes = (loss(expected(*ahead)) - loss(expected(*behind))) / (2 * step)
        np.testing.assert_allclose(
            (np.asarray(grad) * way).sum(), slopes, atol=2e-7 if exact else 2e-5, rtol=1e-6, err_msg=str(n)
        )
    if name not in ("as-many-as-there-are", "far-scores", "one-chosen"):
        assert np.abs(np.asarray(grads[3])).max() > 1e-4, name


def test_gradients_agree_between_modes(x64):
    """Forward mode against reverse mode, and second derivatives against differences of first ones."""
    case = Case(q_len=96, kv_len=96, window=1, top_k=1, heads=1, kv_heads=1, score_heads=1, spread=0.3)
    arrays = tuple(jnp.asarray(x) for x in inputs(case, 3))
    options: dict[str, Any] = {**case.options, "gate": "soft", "implementation": "xla"}
    scalar = loss_of(lambda q, k, v, u: sparsek_attention(q, k, v, u, **options))
    gradient = jax.jit(jax.grad(scalar, (0, 3)))
    rng = np.random.default_rng(4)
    ways = [jnp.asarray(rng.normal(size=x.shape)) for x in arrays]
    _, forward = jax.jit(lambda *a: jax.jvp(scalar, a, tuple(ways)))(*arrays)
    reverse = jax.jit(jax.grad(scalar, (0, 1, 2, 3)))(*arrays)
    np.testing.assert_allclose(forward, sum((g * w).sum() for g, w in zip(reverse, ways, strict=True)), rtol=1e-10)
    _, second = jax.jit(lambda *a: jax.jvp(jax.grad(scalar, (0, 3)), a, tuple(ways)))(*arrays)
    step = 1e-6
    ahead, behind = (gradient(*(x + h * w for x, w in zip(arrays, ways, strict=True))) for h in (step, -step))
    for found, a, b in zip(second, ahead, behind, strict=True):
        np.testing.assert_allclose(found, (a - b) / (2 * step), atol=1e-6)


def test_low_precision():
    """The scores and the choice stay in float32; the rest is a few roundings."""
    case = Case(batch=2, heads=4)
    arrays = inputs(case, 5, np.float32)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    attend = jax.jit(functools.partial(sparsek_attention, gate="soft", **case.options))
    out, exact = attend(q, k, v, arrays[3]), attend(*(x.astype(jnp.float32) for x in (q, k, v)), arrays[3])
    assert out.dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(out.astype(jnp.float32) - exact).max()) < 2**-7 * float(jnp.abs(exact).max())
    same = attend(*(x.astype(jnp.float32) for x in (q, k, v)), jnp.asarray(arrays[3], jnp.bfloat16))
    rounded = attend(
        *(x.astype(jnp.float32) for x in (q, k, v)), jnp.asarray(arrays[3], jnp.bfloat16).astype("float32")
    )
    np.testing.assert_array_equal(same, rounded)


# ---- scores that are not numbers, and short sequences ---------------------------------------------------------------


def test_scores_of_minus_infinity():
    """Their blocks are never chosen, rows may choose fewer, and gradients stay finite."""
    case = Case(heads=1, kv_heads=1, score_heads=1, window=1, top_k=3)
    arrays = [x.astype(np.float32) for x in inputs(case, 6)]
    arrays[3][:, 10], arrays[3][:, 70], arrays[3][:, 96:160] = -np.inf, -np.inf, -np.inf
    mask, gates = attended(arrays[3], case)
    assert [int(mask[0, 0, 32 * i + 31, ::32].sum()) for i in range(6)] == [1, 1, 2, 2, 2, 2]
    chosen, _ = jax.jit(functools.partial(selection.sparsek, **case.options))(arrays[3])
    np.testing.assert_array_equal(chosen.to_dense(), mask)
    attend = functools.partial(sparsek_attention, gate="soft", **case.options)
    out, grads = jax.jit(lambda *a: (attend(*a), jax.grad(loss_of(attend), (0, 1, 2, 3))(*a)))(*arrays)
    query, key, value, _ = arrays
    np.testing.assert_allclose(out, reference(query, key, value, mask, gates), atol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)
    assert (np.asarray(grads[3])[:, 96:160] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_reach_the_rows_that_choose_among_them(bad):
    case = Case(heads=1, kv_heads=1, score_heads=1, window=1)
    arrays = [x.astype(np.float32) for x in inputs(case, 7)]
    arrays[3][:, 70] = bad  # block 2
    out = sparsek_attention(*arrays, **case.options)
    assert np.isfinite(out[:, : 3 * BLOCK]).all()
    assert np.isnan(out[:, 3 * BLOCK :]).all()


@pytest.mark.parametrize("length", [0, 1, 31, 40])
def test_nothing_to_choose_from(length):
    """Plain causal attention: nothing is before the window; the scores have a gradient of 0."""
    case = Case(q_len=length, kv_len=length)
    arrays = [x.astype(np.float32) for x in inputs(case, 8)]
    mask, gates = selection.sparsek(arrays[3], **case.options)
    assert not mask.is_traced
    assert mask.row_offsets.shape[:2] == gates.shape[:2] == (1, 1)
    attend = functools.partial(sparsek_attention, **case.options)
    causal = sparse_attention(*arrays[:3], is_causal=True)
    np.testing.assert_allclose(attend(*arrays), causal, atol=1e-6)
    assert (np.asarray(jax.grad(loss_of(attend), 3)(*arrays)) == 0).all()


def test_ties_go_to_the_lower_block():
    scores = np.zeros((320, 1), np.float32)
    chosen, gates = selection.sparsek(scores, window=1, top_k=2, block_size=BLOCK, gate="soft")
    offsets, ids = np.asarray(chosen.row_offsets)[0, 0], np.asarray(chosen.kv_blocks)[0, 0]
    for i in range(2, 10):
        assert sorted(ids[offsets[i] : offsets[i + 1]]) == [0, 1, i]
        np.testing.assert_allclose(np.sort(gates[0, 0, offsets[i] : offsets[i + 1]]), [2 / i, 2 / i, 1], rtol=1e-6)


def test_the_window_leaves_no_key_between():
    """Every query sees its last `window` keys, and each key before its row's window is in a block it may choose."""
    for window, block_q, block_kv in [(1, 32, 32), (32, 32, 32), (33, 64, 32), (100, 32, 64), (77, 96, 32)]:
        mask, _ = selection.sparsek(
            np.zeros((400, 1), np.float32), window=window, top_k=100, block_size=(block_q, block_kv)
        )
        np.testing.assert_array_equal(mask.to_dense(), CausalMask().bind(400).to_dense())
        mask, _ = selection.sparsek(np.full((400, 1), -np.inf), window=window, block_size=(block_q, block_kv))
        seen = mask.to_dense()[0, 0]
        t, s = np.arange(400)[:, None], np.arange(400)
        assert seen[(s <= t) & (s > t - window)].all()
        assert not seen[s <= t - window - block_q - block_kv].any()


# ---- transformations ------------------------------------------------------------------------------------------------


def test_eager_is_jit_and_unbatched_is_batched():
    case = Case(batch=2, heads=4)
    arrays = [x.astype(np.float32) for x in inputs(case, 9)]
    attend = functools.partial(sparsek_attention, **case.options, slope=0.5)
    jitted = jax.jit(attend)(*arrays)
    assert_close(attend(*(x[0] for x in arrays)), jitted[0], 1e-6)


def test_vmap_of_values_and_gradients():
    case = Case(batch=1, heads=4, spread=0.3)
    arrays = [np.stack([x, x[..., ::-1]]).astype(np.float32) for x in inputs(case, 10)]
    attend = functools.partial(sparsek_attention, gate="soft", **case.options)
    step = jax.jit(lambda *a: (attend(*a), jax.grad(loss_of(attend), (0, 1, 2, 3))(*a)))
    mapped = jax.jit(jax.vmap(step))(*arrays)
    for n in range(2):
        assert_close(jax.tree.map(lambda x, n=n: x[n], mapped), step(*(x[n] for x in arrays)), 1e-5)
    shared = jax.vmap(lambda u: attend(*(x[0] for x in arrays[:3]), u))(arrays[3])
    assert_close(shared[0], mapped[0][0], 1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_batch_and_heads_split_without_collectives(axis_type):
    case = Case(batch=2, heads=8, kv_heads=4, score_heads=4, spread=0.3)
    arrays = [x.astype(np.float32) for x in inputs(case, 11)]
    build = functools.partial(selection.sparsek, gate="soft", **case.options)

    def loss(scores):
        return (build(scores)[1] ** 2).sum(-1)

    def step(scores, cotangent):
        mask, gates = build(scores)
        return mask.kv_blocks, gates, jax.vjp(loss, scores)[1](cotangent)[0]

    weights = np.ones((2, 4), np.float32)
    expected = jax.jit(step)(arrays[3], weights)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        scores = jax.device_put(arrays[3], NamedSharding(mesh, P("data", None, "model")))
        weights = jax.device_put(weights, NamedSharding(mesh, P("data", "model")))
        compiled = jax.jit(step).lower(scores, weights).compile()
        assert collectives(compiled) == []
        assert_close(compiled(scores, weights), expected, 1e-6)
        split = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model", None))) for x in arrays[:3]]
        attend = jax.jit(functools.partial(sparsek_attention, **case.options)).lower(*split, scores).compile()
        assert collectives(attend) == []
        out = attend(*split, scores)
    assert_close(out, jax.jit(functools.partial(sparsek_attention, **case.options))(*arrays), 1e-6)


def test_shard_map():
    case = Case(batch=8, heads=2)
    arrays = [x.astype(np.float32) for x in inputs(case, 12)]
    attend = functools.partial(sparsek_attention, gate="soft", **case.options)

    def step(*arrays):
        return attend(*arrays), jax.grad(lambda *a: jnp.sin(attend(*a)).sum(), (0, 1, 2, 3))(*arrays)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P("data")))
    assert_close(mapped(*arrays), jax.jit(step)(*arrays), 1e-5)


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_room_is_that_of_the_window_and_the_choice():
    mask, gates = selection.sparsek(np.zeros((2, 1024, 3), np.float32), window=100, top_k=5, block_size=BLOCK)
    window = sum(min(i, 4) + 1 for i in range(32))  # 99 keys before are in 4 blocks
    assert mask.kv_blocks.shape == gates.shape == (2, 3, window + sum(min(5, max(0, i - 4)) for i in range(32)))


def largest(jaxpr) -> int:
    """Elements of the largest array of a program, those inside of loops included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [largest(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
    return max([0, *sizes, *inner])


def test_memory_is_linear_in_the_length():
    """Forward and backward, over blocks: no array of row times key block."""

    def size(length):
        def step(scores):
            build = functools.partial(selection.sparsek, window=64, top_k=4, candidates=8, block_size=BLOCK)
            return jax.grad(lambda u: build(u, gate="soft")[1].sum())(scores)

        jaxpr = jax.make_jaxpr(step)(jax.ShapeDtypeStruct((1, length, 1), np.float32))
        return largest(jaxpr.jaxpr)

    blocks = 2**13
    assert size(blocks * BLOCK) <= 2 * size(blocks // 2 * BLOCK) + 1
    assert size(blocks * BLOCK) < blocks**2 // 100


def test_candidates():
    """Enough of them change nothing; too few make thresholds lower, the choice stays."""
    rng = np.random.default_rng(13)
    scores = jnp.asarray(rng.normal(size=(1, 600 * BLOCK, 1)) * 30, jnp.float32)  # 600 blocks: three chunks
    build = jax.jit(
        functools.partial(selection.sparsek, window=1, top_k=4, gate="soft", block_size=BLOCK),
        static_argnames="candidates",
    )
    (mask, gates), (wide, same), (narrow, more) = (build(scores, candidates=n) for n in (None, 64, 4))
    np.testing.assert_array_equal(mask.kv_blocks, wide.kv_blocks)
    np.testing.assert_array_equal(mask.kv_blocks, narrow.kv_blocks)
    np.testing.assert_allclose(gates, same, atol=1e-6)
    assert (np.asarray(more) >= np.asarray(gates) - 1e-6).all()
    assert (np.asarray(more) > np.asarray(gates) + 1e-3).any()


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_of_prefixes(k, chunk):
    rng = np.random.default_rng(k)
    z = np.round(rng.normal(size=37) * 2).astype(np.float32)
    z[rng.random(37) < 0.3] = -np.inf
    z[20] = np.nan
    expected = np.full((37, k), 37)
    for t in range(37):
        order = sorted((s for s in range(t + 1) if z[s] != -np.inf), key=lambda s: (not np.isnan(z[s]), -z[s], s))
        best = sorted(order[:k]) if t < 20 else sorted([20, *[s for s in order if s != 20][: k - 1]])
        expected[t, : len(best)] = best
    np.testing.assert_array_equal(jax.jit(top_of_prefixes, static_argnums=(1, 2))(z, k, chunk), expected)


def test_take():
    rng = np.random.default_rng(0)
    x, way = (jnp.asarray(rng.normal(size=10), jnp.float32) for _ in range(2))
    numbers = jnp.asarray(rng.integers(0, 10, 200), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=200), jnp.float32)
    out, tangent = jax.jit(lambda x, way: jax.jvp(lambda x: take(x, numbers), (x,), (way,)))(x, way)
    np.testing.assert_array_equal(out, x[numbers])
    np.testing.assert_array_equal(tangent, way[numbers])
    (grad,) = jax.jit(lambda x, ct: jax.vjp(lambda x: take(x, numbers), x)[1](ct))(x, cotangent)
    np.testing.assert_allclose(grad, np.bincount(numbers, np.asarray(cotangent, np.float64), 10), atol=1e-5)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": np.ones((1, 200, 3), np.float32)}, ValueError, "scores has one number a key and"),
        ({"scores": np.ones((1, 100, 2), np.float32)}, ValueError, "shape (1, 200, 2) or (1, 200, 4), got (1, 100, 2)"),
        ({"scores": np.ones((1, 200, 2), np.int32)}, TypeError, "scores is a floating-point array"),
        ({"slope": np.ones(3, np.float32)}, ValueError, "slope is a floating-point number or one a head of scores"),
        ({"slope": 1}, ValueError, "slope is a floating-point number"),
        ({"top_k": 0}, ValueError, "top_k is at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k is an int"),
        ({"window": 0}, ValueError, "window is at least 1"),
        ({"gate": "hard"}, ValueError, "gate is 'straight-through' or 'soft', got 'hard'"),
        ({"candidates": 1}, ValueError, "candidates is at least top_k=2"),
        ({"block_size": 100}, ValueError, "multiple of 32"),
        ({"key": np.ones((1, 200, 3, 8), np.float32)}, ValueError, "query's heads are a multiple of key's"),
        ({"key": np.ones((1, 200, 2, 8), np.float16)}, TypeError, "key is of query's type"),
        ({"value": np.ones((1, 100, 2, 8), np.float32)}, ValueError, "same length and heads"),
        ({"query": np.ones((200, 8), np.float32)}, ValueError, "query is BTNH"),
    ],
)
def test_mistakes_are_named(change, error, message):
    case = Case(heads=4)
    arrays = dict(zip(("query", "key", "value", "scores"), inputs(case, dtype=np.float32), strict=True))
    with pytest.raises(error, match=re.escape(message)):
        sparsek_attention(**{**arrays, **case.options, **change})
