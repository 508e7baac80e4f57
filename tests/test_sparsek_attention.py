"""SparseK attention against its definition in numpy, block by block and in float64."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def inputs(case: Case, seed: int = 0, dtype=np.float64) -> tuple[np.ndarray, ...]:
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
    assert 0 < (gates < 1).sum() or name in ("as-many-as-there-are", "far-scores", "ties", "one-chosen"), name


@pytest.mark.parametrize("gate", ["soft", "straight-through"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, gate, x64):
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
            query, key, value, scores, slope=slope, gate=gate, **case.options, implementation="xla"
        )

    point = (*arrays, slope)
    out, grads = jax.jit(lambda *p: (actual(*p), jax.grad(loss_of(actual), tuple(range(5)))(*p)))(*point)
    np.testing.assert_allclose(out, expected(*point), atol=1e-12)
    rng, step = np.random.default_rng(1), 1e-6
    for n, grad in enumerate(grads):
        if name == "ties" and n >= 3:
            continue  # where scores are equal the definition has corners
        way = rng.normal(size=point[n].shape)
        ahead, behind = ((*point[:n], point[n] + h * way, *point[n + 1 :]) for h in (step, -step))
        slopes = (loss(expected(*ahead)) - loss(expected(*behind))) / (2 * step)
        np.testing.assert_allclose((np.asarray(grad) * way).sum(), slopes, atol=2e-7, rtol=1e-6, err_msg=str(n))
    if name not in ("as-many-as-there-are", "far-scores", "one-chosen"):
        assert np.abs(np.asarray(grads[3])).max() > 1e-4, name
