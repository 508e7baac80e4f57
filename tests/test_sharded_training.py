"""Two devices, split over data and, apart, over heads: attention bit-equal, and no collective beside it in training.

Runs on host devices and, marked `gpu`, on two GPUs. `test_sharding.py` has the layouts of attention alone.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import sparse_attention
from jax_bsk.core.dispatch import Implementation
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, MultiHeadMask
from tests.hlo import Program
from tests.util import assert_close, collectives, random_inputs

BATCH, LENGTH, HEADS, HEAD_DIM, LAYERS = 4, 320, 8, 64, 2
CAUSAL = CausalMask() & (LocalMask((100, 0)) | GlobalMask(3))
MASKS = {"shared": CAUSAL, "per-head": MultiHeadMask([CAUSAL, CausalMask()] * (HEADS // 2))}
SPLITS = {"data": P("split"), "heads": P(None, None, "split")}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request) -> str:
    if len(jax.devices(request.param)) < 2:
        pytest.skip("needs two devices")
    return request.param


def mesh_of(platform: str) -> Mesh:
    return jax.make_mesh((2,), ("split",), axis_types=(AxisType.Auto,), devices=jax.devices(platform)[:2])


def dtype_of(platform: str):
    return jnp.float32 if platform == "cpu" else jnp.bfloat16


def attention(platform: Implementation, mask):
    return functools.partial(sparse_attention, mask=mask.bind(LENGTH, block_size=64), implementation=platform)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_attention_and_its_gradients_are_bit_equal_without_collectives(platform, split, mask, kv_heads):
    sizes = BATCH, LENGTH, LENGTH, HEADS, kv_heads, HEAD_DIM, HEAD_DIM
    inputs = random_inputs(0, *sizes, dtype=dtype_of(platform))
    dout = jnp.cos(inputs[0])
    attend = attention(platform, MASKS[mask])

    @jax.jit
    def run(dout, *inputs):
        out, pullback = jax.vjp(attend, *inputs)
        return out, *pullback(dout)

    one = run(*jax.device_put((dout, *inputs), jax.devices(platform)[0]))
    arguments = jax.device_put((dout, *inputs), NamedSharding(mesh_of(platform), SPLITS[split]))
    compiled = run.lower(*arguments).compile()
    two = compiled(*arguments)
    assert collectives(compiled) == []
    for name, a, b in zip(("out", "dquery", "dkey", "dvalue"), one, two, strict=True):
        assert b.sharding.is_equivalent_to(NamedSharding(mesh_of(platform), SPLITS[split]), 4)
        bits = np.uint32 if a.dtype == jnp.float32 else np.uint16
        np.testing.assert_array_equal(np.asarray(a).view(bits), np.asarray(b).view(bits), err_msg=name)


# ---- A training step ------------------------------------------------------------------------------------------------

FEATURES = 48


def parameters():
    shapes = {"q": (FEATURES, HEADS, HEAD_DIM), "k": (FEATURES, 4, HEAD_DIM), "v": (FEATURES, 4, HEAD_DIM)}
    shapes["out"] = HEADS, HEAD_DIM, FEATURES
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(0, 0.1, (LAYERS, *s)), jnp.float32) for n, s in shapes.items()}


def specs(split: str):
    """Of the parameters and of the batch: data parallel, or every projection split by heads."""
    if split == "data":
        return dict.fromkeys(parameters(), P()), P("split")
    return {n: P(None, "split") if n == "out" else P(None, None, "split") for n in parameters()}, P()


def training_step(attend, dtype):
    def loss_of(params, x, target):
        for layer in range(LAYERS):
            weights = {name: p[layer].astype(dtype) for name, p in params.items()}
            q, k, v = (jnp.einsum("btf,fnh->btnh", x.astype(dtype), weights[name]) for name in "qkv")
            x = x + jnp.einsum("btnh,nhf->btf", attend(q, k, v), weights["out"]).astype(jnp.float32)
        return ((x - target) ** 2).mean()

    def step(params, x, target):
        loss, grads = jax.value_and_grad(loss_of)(params, x, target)
        return jax.tree.map(lambda p, g: p - 10 * g, params, grads), loss

    return jax.jit(step)


def batch():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, LENGTH, FEATURES)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("split", SPLITS)
def test_training_step(platform, split):
    dtype = dtype_of(platform)
    step, mesh = training_step(attention(platform, CAUSAL), dtype), mesh_of(platform)
    one = jax.device_put((parameters(), *batch()), jax.devices(platform)[0])
    param_specs, batch_spec = specs(split)
    params = {n: jax.device_put(p, NamedSharding(mesh, param_specs[n])) for n, p in parameters().items()}
    two = params, *jax.device_put(batch(), NamedSharding(mesh, batch_spec))
    compiled = step.lower(*two).compile()
    # Gradients of replicated parameters are summed over data; partial sums of the projections over heads.
    assert set(collectives(compiled)) == {"all-reduce"}
    assert Program(compiled).beside_attention() == []
    (params_one, loss_one), (params_two, loss_two) = step(*one), compiled(*two)
    # The sums over devices are in another order than on one: close, not bit-equal.
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(loss_two, loss_one, rtol=tolerance)
    for name, before in parameters().items():
        change = np.asarray(params_one[name] - before)
        assert_close(np.asarray(params_two[name]) - np.asarray(before), change, tolerance * np.abs(change).max())


# What `beside_attention` must find: a sharded sequence is gathered; one key/value head's gradients are summed.
BESIDE = {
    "sequence": (HEADS, P(None, "split"), P(None, "split"), "all-gather -> attention"),
    "one-kv-head": (1, P(None, None, "split"), P(), "attention -> all-reduce"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_collective_beside_attention_is_found(platform, name):
    kv_heads, query_spec, key_spec, expected = BESIDE[name]
    sizes = BATCH, LENGTH, LENGTH, HEADS, kv_heads, HEAD_DIM, HEAD_DIM
    inputs = random_inputs(0, *sizes, dtype=dtype_of(platform))
    shardings = (NamedSharding(mesh_of(platform), s) for s in (query_spec, key_spec, key_spec))
    inputs = [jax.device_put(x, s) for x, s in zip(inputs, shardings, strict=True)]
    attend = attention(platform, CAUSAL)
    run = jax.jit(lambda dout, *inputs: jax.vjp(attend, *inputs)[1](dout))
    found = Program(run.lower(inputs[0], *inputs).compile()).beside_attention()
    assert any(expected in re.sub("-(start|done)", "", f) for f in found), found
