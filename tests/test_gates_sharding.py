"""Gates on a mesh of eight host devices: they and their gradient split over batch and heads with no collective."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.core.dispatch import Implementation
from jax_bsk.masks import CausalMask, SegmentMask
from tests.test_sharding import BATCH, HEADS, LAYOUTS, ONLY_BATCH, SPLIT, mesh_of
from tests.util import assert_close, collectives, loss_of, random_inputs, random_mask

GATES = P("data", "model")  # [B, N, capacity]


def bind(seed, **lists) -> BlockMask:
    return BlockMask.from_dense(random_mask(seed, **lists), block_size=32)


def gates_of(mask, batch=BATCH, heads=HEADS):
    shape = batch, heads, mask.kv_blocks.shape[-1]
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def attend(query, key, value, gates, mask, implementation: Implementation = "cpu"):
    return sparse_attention(query, key, value, mask=mask, gates=gates, implementation=implementation)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_batch_and_heads_split_without_collectives(name, axis_type):
    layout = LAYOUTS[name]
    mask = bind(0, batch=layout.mask_batch, heads=layout.mask_heads)
    operands = *random_inputs(0, BATCH, heads=HEADS, kv_heads=layout.kv_heads), gates_of(mask)
    cotangent = jnp.cos(operands[0][..., :1])
    expected, pullback = jax.vjp(lambda *a: attend(*a, mask=mask, implementation="xla"), *operands)
    cotangent = jnp.broadcast_to(cotangent, expected.shape)
    mesh = mesh_of(layout.mesh, axis_type)
    with jax.set_mesh(mesh):
        specs = (SPLIT, layout.key_spec, layout.key_spec, GATES)
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
        dout = jax.device_put(cotangent, NamedSharding(mesh, SPLIT))
        forward = jax.jit(lambda *a: attend(*a, mask=mask)).lower(*sharded).compile()
        step = jax.jit(lambda dout, *a: jax.vjp(lambda *b: attend(*b, mask=mask), *a)[1](dout))
        backward = step.lower(dout, *sharded).compile()
        out, grads = forward(*sharded), backward(dout, *sharded)
    assert collectives(forward) == []
    assert set(collectives(backward)) <= ({"all-reduce"} if layout.summed else set())
    assert grads[3].sharding.is_equivalent_to(NamedSharding(mesh, GATES), 3)
    assert_close(out, expected)
    assert_close(grads, pullback(cotangent), 5e-5)


def test_sharded_is_bit_equal_to_one_device():
    mask = bind(1, heads=HEADS)
    operands = *random_inputs(1, BATCH, heads=HEADS, kv_heads=4), gates_of(mask)
    grad = jax.jit(jax.value_and_grad(loss_of(lambda *a: attend(*a, mask=mask)), (0, 1, 2, 3)))
    mesh = mesh_of((2, 4))
    sharded = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, (SPLIT, SPLIT, SPLIT, GATES), strict=True)
    ]
    (_, one), (_, two) = grad(*operands), grad(*sharded)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (1, HEADS)])
def test_shared_gates_are_summed_by_one_reduction(shape, axis_type):
    """Their gradient is a sum over devices: nothing else is."""
    mask = bind(2)
    operands = *random_inputs(2, BATCH, heads=HEADS, kv_heads=8), gates_of(mask, *shape)
    expected = jax.grad(loss_of(lambda *a: attend(*a, mask=mask, implementation="xla")), (0, 1, 2, 3))(*operands)
    dout = jax.grad(lambda out: loss_of(lambda out: out)(out))(attend(*operands, mask=mask, implementation="xla"))
    mesh = mesh_of((2, 4), axis_type)
    gates_spec = P(*(axis if n > 1 else None for axis, n in zip(("data", "model"), shape, strict=True)))
    with jax.set_mesh(mesh):
        specs = (SPLIT, SPLIT, SPLIT, gates_spec)
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
        dout = jax.device_put(dout, NamedSharding(mesh, SPLIT))
        step = jax.jit(lambda dout, *a: jax.vjp(lambda *b: attend(*b, mask=mask), *a)[1](dout))
        compiled = step.lower(dout, *sharded).compile()
        grads = compiled(dout, *sharded)
    assert set(collectives(compiled)) == {"all-reduce"}
    assert_close(grads, expected, 5e-5)


def test_replicated_gates_of_sharded_inputs():
    """Each device takes its part of them; only the gradient must be put together."""
    mask = bind(3)
    operands = *random_inputs(3, BATCH, heads=HEADS, kv_heads=8), gates_of(mask)

    def summed(*operands):
        out = attend(*operands, mask=mask)
        return jnp.sum(jnp.sin(out) * jnp.cos(out))

    expected = jax.grad(loss_of(lambda *a: attend(*a, mask=mask, implementation="xla")), (0, 1, 2, 3))(*operands)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of((2, 4), axis_type)
        with jax.set_mesh(mesh):
            specs = (SPLIT, SPLIT, SPLIT, P())
            sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
            forward = jax.jit(lambda *a: attend(*a, mask=mask)).lower(*sharded).compile()
            step = jax.jit(jax.grad(summed, 3))
            dgates = step(*sharded)
        assert collectives(forward) == []
        single = jax.grad(summed, 3)(*operands)
        assert_close(dgates, single, 5e-5)
    assert expected[3].shape == dgates.shape


def test_traced_masks_split_over_the_batch_without_collectives():
    inputs = random_inputs(5, BATCH, q_len=96, heads=HEADS, kv_heads=8)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (BATCH, 96), 0, 4))
    gates = jnp.asarray(np.random.default_rng(5).standard_normal((BATCH, HEADS, 6)), jnp.float32)

    def loss(q, k, v, gates, ids, implementation: Implementation = "cpu"):
        mask = (SegmentMask(ids) & CausalMask()).bind(96, block_size=32)
        return attend(q, k, v, gates, mask, implementation)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, dout, *args):
        *operands, ids = args
        return jax.vjp(lambda *a: loss(*a, ids=ids, implementation=implementation), *operands)[1](dout)

    dout = jnp.cos(jnp.arange(inputs[0][..., :1].size, dtype=jnp.float32)).reshape(inputs[0][..., :1].shape)
    dout = jnp.broadcast_to(dout, (*inputs[0].shape[:3], inputs[2].shape[-1]))
    mesh = mesh_of((2, 4))
    specs = (SPLIT, SPLIT, SPLIT, SPLIT, GATES, ONLY_BATCH)
    args = (dout, *inputs, gates, ids)
    sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)]
    compiled = run.lower("cpu", *sharded).compile()
    assert collectives(compiled) == []
    assert_close(compiled(*sharded), run("xla", *args), 5e-5)


@pytest.mark.parametrize("kv_heads", [8, 1])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_shard_map(check_vma, kv_heads, shared):
    mask = bind(6)
    operands = *random_inputs(6, BATCH, heads=HEADS, kv_heads=kv_heads), gates_of(mask, *((1, 1) if shared else ()))
    key_spec = SPLIT if kv_heads == 8 else ONLY_BATCH
    mapped = jax.shard_map(
        lambda *a: attend(*a, mask=mask),
        mesh=mesh_of((2, 4)),
        in_specs=(SPLIT, key_spec, key_spec, P() if shared else GATES),
        out_specs=SPLIT,
        check_vma=check_vma,
    )
    expected = jax.value_and_grad(loss_of(lambda *a: attend(*a, mask=mask, implementation="xla")), (0, 1, 2, 3))(
        *operands
    )
    assert_close(jax.jit(jax.value_and_grad(loss_of(mapped), (0, 1, 2, 3)))(*operands), expected, 5e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_vmap_of_sharded_inputs(axis_type):
    mask = bind(7)
    operands = *random_inputs(7, BATCH, heads=HEADS, kv_heads=8), gates_of(mask)
    stacked = [jnp.stack([x, -x]) for x in operands]
    expected = jax.vmap(lambda *a: attend(*a, mask=mask, implementation="xla"))(*stacked)
    mesh = mesh_of((2, 4), axis_type)
    mapped = jax.jit(jax.vmap(lambda *a: attend(*a, mask=mask)))
    with jax.set_mesh(mesh):
        specs = (SPLIT, SPLIT, SPLIT, GATES)
        sharded = [jax.device_put(x, NamedSharding(mesh, P(None, *s))) for x, s in zip(stacked, specs, strict=True)]
        compiled = mapped.lower(*sharded).compile()
        out = compiled(*sharded)
    assert collectives(compiled) == []
    assert_close(out, expected)
