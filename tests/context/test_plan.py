"""`context.plan`: a permutation of tokens under which every mask stays exact and devices have equal work."""

from __future__ import annotations

import time
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, context, sparse_attention
from jax_bsk.masks import CausalMask, FullMask, GlobalMask, LocalMask, MultiHeadMask, PrefixLMMask, SegmentMask
from tests.util import assert_close, random_inputs

IDS = np.sort(np.random.default_rng(0).integers(0, 7, 512))
MASKS = {
    "causal": CausalMask(),
    "documents": CausalMask() & SegmentMask(IDS),
    "global": CausalMask() & (LocalMask((64, 0)) | GlobalMask(8)),
    "prefix": PrefixLMMask(170),
    "full": FullMask(),
    "per head": MultiHeadMask([CausalMask(), LocalMask((40, 40))]),
}


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("block_size", [32, (64, 32), (32, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_that_of_the_reordered_tokens(name, block_size, chunk):
    mask = MASKS[name].bind(512, block_size=block_size)
    plan = context.plan(mask, 4, chunk=chunk)
    at = plan.positions
    assert sorted(at) == list(range(512))
    np.testing.assert_array_equal(plan.mask.to_dense(), mask.to_dense()[:, :, at[:, None], at])
    plan.mask.transpose().check()
    tokens = np.random.default_rng(0).normal(size=(2, 512, 3)).astype(np.float32)
    np.testing.assert_array_equal(plan.dispatch(tokens), tokens[:, at])
    np.testing.assert_array_equal(plan.undispatch(plan.dispatch(tokens)), tokens)
    np.testing.assert_array_equal(jax.jit(plan.dispatch)(tokens), tokens[:, at])


def test_runs_stay_runs():
    mask = CausalMask().bind(131072)
    plan = context.plan(mask, 4)
    assert mask.holds_runs
    assert plan.mask.holds_runs
    assert plan.mask.nbytes < 8 * mask.nbytes
    places = plan.positions.reshape(1024, 128)[:, 0] // 128
    rows = np.split(plan.mask.kv_blocks[0, 0], plan.mask.row_offsets[0, 0, 1:-1])
    for place, row in zip(places, rows, strict=True):
        assert places[row].tolist() == [place, *range(place)]  # the diagonal block, which has a tile, then the others


def test_attention_of_reordered_tokens_is_the_same():
    q, k, v = random_inputs(0, q_len=512, kv_len=512)
    mask = MASKS["documents"].bind(512, block_size=32)
    plan = context.plan(mask, 4)

    def loss(q, k, v, mask):
        out = sparse_attention(q, k, v, mask=mask, implementation="cpu")
        return (out * jnp.cos(jnp.arange(24, dtype=out.dtype))[None, None, None]).sum(), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = run(q, k, v, mask)
    (_, planned), planned_grads = run(*map(plan.dispatch, (q, k, v)), plan.mask)
    np.testing.assert_array_equal(plan.undispatch(planned), out)  # rows visit the same blocks in the same order
    np.testing.assert_array_equal(plan.undispatch(planned_grads[0]), grads[0])
    assert_close([plan.undispatch(x) for x in planned_grads[1:]], list(grads[1:]))


def test_a_plan_is_a_pytree_and_kept_with_its_mask():
    mask = CausalMask().bind(512, block_size=32)
    plan = context.plan(mask, 4)
    assert context.plan(mask, 4) is plan
    assert context.plan(mask, 2) is not plan
    tokens = jnp.arange(512)
    positions, dispatched = jax.jit(lambda plan, x: (plan.positions, plan.dispatch(x, 0)))(plan, tokens)
    np.testing.assert_array_equal(positions, plan.positions)
    np.testing.assert_array_equal(dispatched, plan.positions)
    again = jax.tree.unflatten(jax.tree.structure(plan), jax.tree.leaves(plan))
    assert (again.chunk, again.shards) == (plan.chunk, 4)


@pytest.mark.parametrize("shards", [8, 64, 512])
@pytest.mark.parametrize("name", ["causal", "documents", "global", "random"])
def test_work_is_balanced(name, shards):
    length = 1 << 20
    rng = np.random.default_rng(1)
    if name == "random":
        mask = BlockMask.from_block_mask(rng.random((8192, 8192)) < 0.003, q_len=length)
    else:
        mask = {
            "causal": CausalMask(),
            "documents": CausalMask() & SegmentMask(np.sort(rng.integers(0, 40, length))),
            "global": CausalMask() & (LocalMask((4096, 0)) | GlobalMask(256)),
        }[name].bind(length)
    start = time.perf_counter()
    plan = context.plan(mask, shards)
    seconds = time.perf_counter() - start
    described = context.describe(plan, kv_heads=8, head_dim=128)
    assert described.balance <= 1.05
    plain = context.describe(mask, shards, kv_heads=8, head_dim=128)
    assert described.balance <= max(plain.balance, 1.05)
    if shards <= 64:
        assert seconds < 10  # 0.02 to 0.6 s on an idle core
    assert plan.mask.nbytes < 64e6


def test_what_is_described():
    mask = (CausalMask() & LocalMask((127, 0))).bind(1024, block_size=32)
    found = context.describe(mask, 4, kv_heads=2, head_dim=16, value_dim=8, batch=3, dtype=jnp.float32)
    np.testing.assert_array_equal(found.work, mask.to_dense()[0, 0].reshape(4, 8, 32, 32, 32).any((2, 4)).sum((1, 2)))
    assert found.received.tolist() == [0, *[3 * 2 * (4 * 32) * (16 + 8) * 4] * 3]
    assert (found.steps, found.gathered) == (1, False)
    assert found.balance == found.work.max() / found.work.mean()
    assert found.by_heads is None
    # Three quarters of a quarter of query, output (4 heads), key and value (4 heads) come from other devices.
    heads = context.describe(mask, 4, kv_heads=4, heads=4, head_dim=16, dtype=jnp.float32).by_heads
    assert heads == 4 * (1024 * 4 * 16 * 4) * 3 // 16
    assert context.describe(mask, 4, kv_heads=2, heads=4, head_dim=16).by_heads is None
    everything = context.describe(CausalMask().bind(1024, block_size=32), 4, kv_heads=1, head_dim=16)
    assert everything.gathered
    assert everything.received.tolist() == [3 * 256 * 32 * 2] * 4
    assert "all keys are gathered" in str(everything)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: context.plan(cast(BlockMask, CausalMask()), 2), TypeError, r"has bind\(length\)"),
        (lambda: context.plan(CausalMask().bind(512, 256), 2), ValueError, "as many queries as keys"),
        (lambda: context.plan(CausalMask().bind(480, block_size=32), 4), ValueError, "multiple of 128"),
        (lambda: context.plan(CausalMask().bind(512, block_size=32), 0), ValueError, "shards must be at least 1"),
        (lambda: context.plan(CausalMask().bind(512, block_size=32), 2, chunk=48), ValueError, "got 48"),
        (
            lambda: context.plan(CausalMask().bind(512), 2).dispatch(np.zeros((1, 500))),
            ValueError,
            "512 tokens",
        ),
        (
            lambda: context.describe(CausalMask().bind(480, block_size=32), 4, kv_heads=1, head_dim=8),
            ValueError,
            "gather",
        ),
        (lambda: context.plan(CausalMask().bind(512), 2).dispatch(np.zeros(512)), ValueError, "axis 1 of an array"),
        (lambda: context.plan(CausalMask().bind(512), 2).dispatch(np.zeros((2, 512)), -3), ValueError, "axis -3"),
        (
            lambda: context.describe(context.plan(CausalMask().bind(512), 2), 4, kv_heads=1, head_dim=8),
            ValueError,
            "one for 2 shards, got 4",
        ),
        (lambda: context.describe(CausalMask().bind(512), 0, kv_heads=1, head_dim=8), ValueError, "at least 1"),
        (lambda: context.describe(CausalMask().bind(512), kv_heads=1, head_dim=8), TypeError, "number of shards"),
        (lambda: jax.jit(lambda m: context.plan(m, 2).order)(CausalMask().bind(512)), TypeError, "traced"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
