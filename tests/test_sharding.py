"""`sparse_attention` on a mesh of eight host devices: batch and heads split with no collective, and the same values.

Where a key/value head is shared by query heads on several devices (MQA, or more shards than key/value heads) the
gradients of key and value are sums over devices: their one all-reduce is the only collective allowed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask, SegmentMask
from jax_bsk.selection import from_topk
from tests.util import assert_close, collectives, dense, loss_of, random_inputs, random_mask

BATCH, HEADS = 4, 8
SPLIT = P("data", None, "model", None)
ONLY_BATCH = P("data")


@dataclasses.dataclass(frozen=True)
class Layout:
    kv_heads: int = 8
    mask_batch: int = 1
    mask_heads: int = 1
    key_spec: P = SPLIT
    mesh: tuple[int, int] = (2, 4)
    summed: bool = False  # dkey and dvalue are sums over devices


LAYOUTS = {
    "mha": Layout(),
    "mha-mask-per-head": Layout(mask_batch=4, mask_heads=8),
    "mha-mask-per-batch": Layout(mask_batch=4),
    "gqa": Layout(kv_heads=4, mask_heads=8),
    "gqa-on-a-wide-data-axis": Layout(kv_heads=2, mesh=(4, 2)),
    "gqa-fewer-kv-heads-than-shards": Layout(kv_heads=2, key_spec=ONLY_BATCH, summed=True),
    "mqa": Layout(kv_heads=1, mask_heads=8, key_spec=ONLY_BATCH, summed=True),
}


def mesh_of(shape, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_batch_and_heads_split_without_collectives(name, axis_type):
    layout = LAYOUTS[name]
    inputs = random_inputs(0, BATCH, heads=HEADS, kv_heads=layout.kv_heads)
    mask = random_mask(0, batch=layout.mask_batch, heads=layout.mask_heads)
    block_mask = BlockMask.from_dense(mask, block_size=32)
    expected = dense(*inputs, mask=mask), jax.grad(loss_of(lambda *a: dense(*a, mask=mask)), (0, 1, 2))(*inputs)
    mesh = mesh_of(layout.mesh, axis_type)

    def attend(q, k, v):
        return sparse_attention(q, k, v, mask=block_mask, implementation="cpu")

    with jax.set_mesh(mesh):
        specs = (SPLIT, layout.key_spec, layout.key_spec)
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True)]
        forward = jax.jit(attend).lower(*sharded).compile()
        cotangent = jax.device_put(jnp.cos(expected[0]), NamedSharding(mesh, SPLIT))
        backward = jax.jit(lambda dout, *a: jax.vjp(attend, *a)[1](dout)).lower(cotangent, *sharded).compile()
        out, grads = forward(*sharded), backward(cotangent, *sharded)
    assert collectives(forward) == []
    assert set(collectives(backward)) <= ({"all-reduce"} if layout.summed else set())
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, SPLIT), 4)
    assert_close(out, expected[0])
    single = jax.vjp(lambda *a: dense(*a, mask=mask), *inputs)[1](jnp.cos(expected[0]))
    assert_close(grads, single, 5e-5)


def test_sharded_is_bit_equal_to_one_device():
    inputs = random_inputs(1, BATCH, heads=HEADS, kv_heads=4)
    block_mask = BlockMask.from_dense(random_mask(1), block_size=32)

    def attend(q, k, v):
        return sparse_attention(q, k, v, mask=block_mask, implementation="cpu")

    grad = jax.jit(jax.grad(loss_of(attend), (0, 1, 2)))
    one = jax.jit(attend)(*inputs), grad(*inputs)
    sharding = NamedSharding(mesh_of((2, 4)), SPLIT)
    sharded = [jax.device_put(x, sharding) for x in inputs]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves((jax.jit(attend)(*sharded), grad(*sharded))), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_vmap_of_sharded_inputs(axis_type):
    inputs, mask = random_inputs(2, BATCH, heads=HEADS, kv_heads=8), random_mask(2)
    block_mask = BlockMask.from_dense(mask, block_size=32)
    stacked = [jnp.stack([x, -x]) for x in inputs]
    expected = jax.vmap(lambda *a: dense(*a, mask=mask))(*stacked)
    mesh = mesh_of((2, 4), axis_type)
    mapped = jax.jit(jax.vmap(lambda *a: sparse_attention(*a, mask=block_mask, implementation="cpu")))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, P(None, *SPLIT))) for x in stacked]
        compiled = mapped.lower(*sharded).compile()
        out = compiled(*sharded)
    assert collectives(compiled) == []
    assert_close(out, expected)


@pytest.mark.parametrize("kv_heads", [8, 1])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, kv_heads):
    inputs, mask = random_inputs(3, BATCH, heads=HEADS, kv_heads=kv_heads), random_mask(3)
    block_mask = BlockMask.from_dense(mask, block_size=32)
    sinks = jnp.linspace(-1.0, 1.0, HEADS, dtype=jnp.float32)
    key_spec = SPLIT if kv_heads == 8 else ONLY_BATCH
    mesh = mesh_of((2, 4))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(SPLIT, key_spec, key_spec, P("model")), out_specs=SPLIT, check_vma=check_vma
    )
    def attend(q, k, v, s):
        return sparse_attention(q, k, v, mask=block_mask, sinks=s, implementation="cpu")

    def expected(q, k, v, s):
        return dense(q, k, v, mask, sinks=s)

    assert_close(jax.jit(attend)(*inputs, sinks), expected(*inputs, sinks))
    actual = jax.jit(jax.grad(loss_of(attend), (0, 1, 2, 3)))(*inputs, sinks)
    assert_close(actual, jax.grad(loss_of(expected), (0, 1, 2, 3))(*inputs, sinks), 5e-5)


def test_partly_manual_shard_map():
    inputs, mask = random_inputs(4, BATCH, heads=HEADS, kv_heads=8), random_mask(4)
    block_mask = BlockMask.from_dense(mask, block_size=32)
    mesh = mesh_of((2, 4))
    attend = jax.shard_map(
        lambda *a: sparse_attention(*a, mask=block_mask, implementation="cpu"),
        mesh=mesh,
        in_specs=(P("data"),) * 3,
        out_specs=P("data"),
        axis_names={"data"},
    )
    sharded = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in inputs]
    assert_close(jax.jit(attend)(*sharded), dense(*inputs, mask=mask))


def test_traced_segments_split_over_the_batch_without_collectives():
    inputs = random_inputs(5, BATCH, q_len=96, heads=HEADS, kv_heads=8)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (BATCH, 96), 0, 4))
    mesh = mesh_of((2, 4))

    @jax.jit
    def attend(q, k, v, ids):
        mask = (SegmentMask(ids) & CausalMask()).bind(96, block_size=32)
        return sparse_attention(q, k, v, mask=mask, implementation="cpu")

    sharded = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in inputs]
    sharded.append(jax.device_put(ids, NamedSharding(mesh, ONLY_BATCH)))
    compiled = attend.lower(*sharded).compile()
    assert collectives(compiled) == []
    expected = (ids[:, None, :, None] == ids[:, None, None, :]) & jnp.tri(96, dtype=bool)[None, None]
    assert_close(compiled(*sharded), dense(*inputs, mask=expected))


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map", "shard_map, unchecked"])
@pytest.mark.parametrize("pattern", ["segments", "top_k"])
def test_traced_lists_and_their_gradients_on_a_mesh(pattern, kind, implementation):
    """Lists made of sharded ids or scores, with padding that plain JAX skips."""
    length, heads = 96, 4
    inputs = random_inputs(7, BATCH, q_len=length, heads=heads, kv_heads=heads)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (BATCH, length), 0, 4))
    scores = jax.random.normal(jax.random.key(2), (BATCH, heads, 3, 3))

    def attend(q, k, v, data):
        if pattern == "segments":
            mask = (SegmentMask(data) & CausalMask()).bind(length, block_size=32)
        else:
            mask = from_topk(data, 2, q_len=length, block_size=32, mask=CausalMask(), own_block=True)
        return sparse_attention(q, k, v, mask=mask, implementation=implementation)

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda *inputs: jnp.sum(function(*inputs) ** 2), (0, 1, 2)))

    everything = (*inputs, ids if pattern == "segments" else scores)
    expected = loss(attend)(*everything)
    if kind.startswith("shard_map"):
        mesh = mesh_of((4, 2))
        specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": kind == "shard_map"}
        got = loss(jax.shard_map(attend, mesh=mesh, **specs))(*everything)
    else:
        mesh = mesh_of((2, 4), AxisType.Explicit if kind == "explicit" else AxisType.Auto)
        with jax.sharding.set_mesh(mesh):
            arrays = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in inputs]
            data = P("data") if pattern == "segments" else P("data", "model")
            arrays.append(jax.device_put(everything[-1], NamedSharding(mesh, data)))
            got = loss(attend)(*arrays)
        if kind == "explicit":
            assert all(x.sharding.spec == SPLIT for x in got[1])
    jax.tree.map(lambda x, y: assert_close(x, y, 2e-5), got, expected)


@pytest.mark.parametrize("which", ["query_seq_lengths", "key_value_seq_lengths"])
def test_lengths_of_one_side_on_an_explicit_mesh(which, implementation):
    inputs, lengths = random_inputs(8, BATCH, q_len=96, kv_len=96, heads=HEADS, kv_heads=8), jnp.array([96, 50, 1, 70])
    mask = CausalMask().bind(96, block_size=32)

    def attend(q, k, v, lengths):
        return sparse_attention(q, k, v, mask=mask, implementation=implementation, **{which: lengths})

    expected = jax.jit(attend)(*inputs, lengths)
    mesh = mesh_of((2, 4), AxisType.Explicit)
    with jax.sharding.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in inputs]
        out = jax.jit(attend)(*sharded, jax.device_put(lengths, NamedSharding(mesh, P("data"))))
    assert_close(out, expected)


def test_a_sharded_sequence_is_gathered_and_right():
    inputs, mask = random_inputs(6, BATCH, heads=HEADS, kv_heads=8), random_mask(6)
    block_mask = BlockMask.from_dense(mask, block_size=32)
    sharding = NamedSharding(mesh_of((2, 4)), P("data", "model"))
    sharded = [jax.device_put(x, sharding) for x in inputs]
    out = jax.jit(lambda *a: sparse_attention(*a, mask=block_mask, implementation="cpu"))(*sharded)
    assert_close(out, dense(*inputs, mask=mask))
