"""Native sparse attention against dense attention with explicit masks, and its Flax modules."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_bsk.flax
from jax_bsk import nsa_attention
from jax_bsk.compositions.nsa import CompressedMask
from jax_bsk.selection import nsa
from tests.util import assert_close, dense, loss_of

LENGTH, BLOCK, L, D, WINDOW = 256, 32, 16, 8, 50
SELECTION = {
    "top_k": 4,
    "compression_block": L,
    "compression_stride": D,
    "selection_block": BLOCK,
    "local_blocks": 1,
    "block_size": BLOCK,
}
OPTIONS: dict[str, Any] = {**SELECTION, "window": WINDOW}
select = jax.jit(functools.partial(nsa, **SELECTION))
attend = jax.jit(functools.partial(nsa_attention, **OPTIONS))


def inputs(seed: int, batch=2, length=LENGTH, heads=4, kv_heads=2, size=16, value_size=24, dtype=np.float32):
    rng = np.random.default_rng(seed)
    sizes = [(heads, size), (kv_heads, size), (kv_heads, value_size), (heads, 3)]
    q, k, v, g = (rng.normal(size=(batch, length, *tail)).astype(np.float32) for tail in sizes)
    return tuple(jnp.asarray(x, dtype) for x in (q * 3, k, v, 1 / (1 + np.exp(-g))))


def stretches(x, length=L, stride=D):
    """The definition of the means, a key at a time."""
    count = (x.shape[1] - length) // stride + 1
    return jnp.stack([x[:, i * stride : i * stride + length].mean(1) for i in range(count)], 1)


def seen(length: int, count: int, block: int = L, stride: int = D) -> np.ndarray:
    return np.array([[i * stride + block - 1 <= t for i in range(count)] for t in range(length)], bool)


def reference(query, key, value, gates, chosen, compressed=None):
    """Three dense attentions with masks of all elements."""
    keys, values = (stretches(key), stretches(value)) if compressed is None else compressed
    t, s = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])
    branches = (
        dense(query, keys, values, seen(query.shape[1], keys.shape[1])[None, None]),
        dense(query, key, value, chosen),
        dense(query, key, value, ((s <= t) & (t - s < WINDOW))[None, None]),
    )
    return sum(gates[..., n, None] * branch for n, branch in enumerate(branches))


def step_of(attention):
    def step(*arrays):
        return attention(*arrays), jax.grad(loss_of(attention), tuple(range(len(arrays))))(*arrays)

    return step


def test_values_and_gradients():
    arrays = inputs(0)
    chosen = select(*arrays[:2])
    assert chosen.density < 0.8 * np.tri(LENGTH // BLOCK).mean()  # it leaves blocks out
    expected = jax.jit(step_of(functools.partial(reference, chosen=chosen.to_dense())))(*arrays)
    actual = jax.jit(step_of(functools.partial(nsa_attention, **OPTIONS)))(*arrays)
    assert_close(actual, expected, 1e-4)
    assert np.all(np.asarray(actual[1][3])[:, : L - 1, :, 0] == 0)  # nothing compressed ends there
    other = jax.jit(functools.partial(nsa_attention, **OPTIONS, implementation="xla"))(*arrays)
    assert_close(other, expected[0])


def test_given_compressions():
    """Their gradients are those of the compressed branch; the selection goes by the given keys."""
    arrays = inputs(1)
    rng = np.random.default_rng(2)
    given = tuple(jnp.asarray(rng.normal(size=stretches(x).shape), jnp.float32) for x in arrays[1:3])
    chosen = select(*arrays[:2], compressed_key=given[0]).to_dense()
    assert (chosen != select(*arrays[:2]).to_dense()).any()

    def actual(q, k, v, g, ck, cv):
        return nsa_attention(q, k, v, g, compressed_key=ck, compressed_value=cv, **OPTIONS)

    def expected(q, k, v, g, ck, cv):
        return reference(q, k, v, g, chosen, (ck, cv))

    assert_close(jax.jit(step_of(actual))(*arrays, *given), jax.jit(step_of(expected))(*arrays, *given), 1e-4)


def test_eager_is_jit_and_unbatched_is_batched():
    arrays = inputs(3)
    eager = nsa_attention(*(x[0] for x in arrays), **OPTIONS)
    assert_close(eager, attend(*arrays)[0], 1e-6)


def test_bfloat16():
    """Scores are in float32, so the selection is the same; the rest is a few roundings of half an ulp, 2^-9, each."""
    arrays = inputs(4, dtype=jnp.bfloat16)
    out, exact = attend(*arrays), attend(*(x.astype(jnp.float32) for x in arrays))
    assert out.dtype == jnp.bfloat16
    error = float(jnp.abs(out.astype(jnp.float32) - exact).max())
    assert 0 < error < 2**-7 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("length", [20, L - 1])
def test_short_inputs(length):
    """One compressed key, or none; a window that is longer."""
    arrays = inputs(5, length=length)
    out = attend(*arrays)
    causal = dense(*arrays[:3], mask=np.tri(length, dtype=bool)[None, None])
    expected = (arrays[3][..., 1:2] + arrays[3][..., 2:]) * causal
    if length >= L:
        first = dense(arrays[0], *map(stretches, arrays[1:3]), mask=seen(length, 1)[None, None])
        expected += arrays[3][..., :1] * first
    assert_close(out, expected)


@pytest.mark.parametrize(("length", "block", "stride"), [(200, 32, 16), (331, 8, 8), (700, 12, 4), (40, 1, 1)])
def test_mask_of_compressed_keys(length, block, stride):
    count = (length - block) // stride + 1
    mask = CompressedMask(block, stride)
    assert mask == CompressedMask(block, stride)
    assert mask != CompressedMask(block + 1, stride)
    bound = mask.bind(length, count, block_size=32)
    np.testing.assert_array_equal(bound.to_dense()[0, 0], seen(length, count, block, stride))


def test_mask_of_a_long_sequence_is_small():
    """A causal staircase: about half of all blocks, and one tile for all that look alike."""
    bound = CompressedMask(32, 16).bind(2**16, 2**12 - 1)
    assert 0.45 < bound.density < 0.55
    assert bound.nbytes < 2**20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gates": np.ones((2, LENGTH, 4, 2), np.float32)}, ValueError, "gates are floating-point"),
        ({"gates": np.ones((2, LENGTH, 4, 3), np.int32)}, ValueError, "gates are floating-point"),
        ({"value": np.ones((2, LENGTH, 4, 8), np.float32)}, ValueError, "same length and heads"),
        ({"window": 0}, ValueError, "window is at least 1"),
        ({"compression_stride": 5}, ValueError, "compression_stride divides"),
        ({"compressed_key": np.ones((2, 3, 2, 16), np.float32)}, ValueError, "compressed_key has shape"),
        ({"compressed_value": np.ones((2, 31, 2, 16), np.float32)}, ValueError, "compressed_value has shape"),
        ({"compressed_value": np.ones((2, 31, 2, 24), np.int32)}, TypeError, "compressed_value is a floating-point"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arrays = dict(zip(("query", "key", "value", "gates"), inputs(6), strict=True))
    with pytest.raises(error, match=re.escape(message)):
        nsa_attention(**{**arrays, **OPTIONS, **change})


# ---- Flax -----------------------------------------------------------------------------------------------------------

FEATURES, HEADS = 32, 4
MODULE = {"num_kv_heads": 2, "attention_fn": functools.partial(nsa_attention, **OPTIONS)}


@pytest.fixture
def standard_promotion():
    """Flax and optax rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def modules(x, **changes):
    """The Linen module with its parameters, and the NNX module with the same."""
    linen = jax_bsk.flax.linen.NSASelfAttention(HEADS, **MODULE, **changes)
    params = jax.jit(linen.init)(jax.random.key(0), x)["params"]
    module = jax_bsk.flax.nnx.NSASelfAttention(HEADS, FEATURES, **MODULE, **changes, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    return linen, params, module


@pytest.mark.usefixtures("standard_promotion")
def test_modules_train_a_step_and_agree():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, FEATURES)), jnp.float32)
    linen, params, module = modules(x)
    projections = jax_bsk.flax.linen.SparseSelfAttention(HEADS, num_kv_heads=2)
    projections = jax.jit(projections.init)(jax.random.key(0), x)["params"]
    gate = {"kernel": (FEATURES, 3 * HEADS), "bias": (3 * HEADS,)}
    assert jax.tree.map(jnp.shape, params) == {**jax.tree.map(jnp.shape, projections), "gate": gate}
    optimizer = optax.sgd(1e-1)

    @jax.jit
    def linen_step(params):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((jnp.asarray(linen.apply({"params": p}, x)) - x) ** 2))(
            params
        )
        return loss, optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0]), grads

    @nnx.jit
    def nnx_step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(module)
        optimizer.update(module, grads)
        return loss

    loss, updated, grads = linen_step(params)
    del grads["key"]["bias"]  # shifts the logits of a query alike: 0
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads))
    assert_close(nnx_step(module, nnx.Optimizer(module, optimizer, wrt=nnx.Param)), loss, 1e-6)
    assert_close(nnx.to_pure_dict(nnx.state(module, nnx.Param)), updated, 1e-6)
    assert linen_step(updated)[0] < loss


@pytest.mark.usefixtures("standard_promotion")
def test_module_is_the_function_between_dense_layers():
    """Any leading dimensions, bfloat16 on float32 parameters, and the gates' order."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 64, FEATURES)), jnp.float32)
    linen, params, module = modules(x, out_features=8, use_bias=False)
    out = jax.jit(linen.apply)({"params": params}, x)
    assert out.shape == (2, 1, 64, 8)
    q, k, v = (jnp.einsum("btf,fnh->btnh", x[:, 0], params[name]["kernel"]) for name in ("query", "key", "value"))
    gates = nn.sigmoid(x[:, 0] @ params["gate"]["kernel"]).reshape(2, 64, HEADS, 3)
    attended = attend(q, k, v, gates)
    assert_close(out[:, 0], jnp.einsum("btnh,nhf->btf", attended, params["out"]["kernel"]))
    call = nnx.jit(lambda module, x: module(x))
    assert_close(call(module, x), out)
    assert_close(call(module, x[0, 0]), out[0, 0])
    low = jax_bsk.flax.linen.NSASelfAttention(HEADS, **MODULE, out_features=8, use_bias=False, dtype=jnp.bfloat16)
    assert jax.eval_shape(low.apply, {"params": params}, x).dtype == jnp.bfloat16
