"""The Flax modules of SparseK attention: what they hold, that they are the function between dense layers, training."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_bsk.flax
from jax_bsk import sparsek_attention
from tests.util import assert_close

LENGTH, FEATURES, HEADS, KV_HEADS, BLOCK = 256, 32, 4, 2, 32
OPTIONS: dict[str, Any] = {"window": 1, "top_k": 2, "block_size": BLOCK}
MODULE: dict[str, Any] = {
    "num_kv_heads": KV_HEADS,
    "attention_fn": functools.partial(sparsek_attention, **OPTIONS),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def inputs(*batch: int, seed: int = 0, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*batch, length, FEATURES)), jnp.float32)


def modules(x, **changes):
    """The Linen module with its parameters, and the NNX module with the same."""
    changes = {**MODULE, **changes}
    linen: Any = jax_bsk.flax.linen.SparseKSelfAttention(HEADS, **changes)
    params = jax.jit(linen.init)(jax.random.key(0), x)["params"]
    module = jax_bsk.flax.nnx.SparseKSelfAttention(HEADS, FEATURES, **changes, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (nnx.to_pure_dict(state), params)]
    assert shapes[0] == shapes[1]
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    return linen, params, module


def test_parameters():
    """Those of `SparseSelfAttention`, a score a key/value head (or as told) without a bias, and its slope."""
    x = inputs(1)
    _, params, _ = modules(x)
    plain = jax_bsk.flax.linen.SparseSelfAttention(HEADS, num_kv_heads=KV_HEADS)
    expected = jax.tree.map(jnp.shape, jax.jit(plain.init)(jax.random.key(0), x)["params"])
    assert jax.tree.map(jnp.shape, params) == {
        **expected,
        "score": {"kernel": (FEATURES, KV_HEADS)},
        "slope": (KV_HEADS,),
    }
    np.testing.assert_array_equal(params["slope"], np.full(KV_HEADS, 0.1, np.float32))
    for heads in (1, HEADS):
        _, params, _ = modules(x, score_heads=heads, slope_init=jax.nn.initializers.ones)
        assert params["score"]["kernel"].shape == (FEATURES, heads)
        np.testing.assert_array_equal(params["slope"], np.ones(heads))


@pytest.mark.parametrize("score_heads", [None, 1, HEADS])
def test_module_is_the_function_between_dense_layers(score_heads):
    x = inputs(2, 1, seed=1)
    linen, params, module = modules(x, score_heads=score_heads, out_features=8, use_bias=False)
    out = jax.jit(linen.apply)({"params": params}, x)
    assert out.shape == (2, 1, LENGTH, 8)
    q, k, v = (jnp.einsum("btf,fnh->btnh", x[:, 0], params[name]["kernel"]) for name in ("query", "key", "value"))
    attended = sparsek_attention(q, k, v, x[:, 0] @ params["score"]["kernel"], slope=params["slope"], **OPTIONS)
    assert_close(out[:, 0], jnp.einsum("btnh,nhf->btf", attended, params["out"]["kernel"]))
    call = nnx.jit(lambda module, x: module(x))
    assert_close(call(module, x), out, 1e-6)
    assert_close(call(module, x[0, 0]), out[0, 0], 1e-6)


def test_every_parameter_has_a_gradient_and_steps_agree():
    x = inputs(2, seed=2)
    linen, params, module = modules(x)
    optimizer = optax.sgd(1e-1)

    @jax.jit
    def linen_step(params):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((linen.apply({"params": p}, x) - x) ** 2))(params)
        return loss, optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0]), grads

    @nnx.jit
    def nnx_step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(module)
        optimizer.update(module, grads)
        return loss

    loss, updated, grads = linen_step(params)
    del grads["key"]["bias"]  # shifts the logits of a query alike: 0
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads)), jax.tree.map(lambda g: np.abs(g).max(), grads)
    assert_close(nnx_step(module, nnx.Optimizer(module, optimizer, wrt=nnx.Param)), loss, 1e-6)
    assert_close(nnx.to_pure_dict(nnx.state(module, nnx.Param)), updated, 1e-6)
    assert linen_step(updated)[0] < loss


def marked(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of noise with one marked block, whose content the last block's queries are to tell."""
    x = rng.normal(size=(count, LENGTH, FEATURES)) * 0.2
    content = rng.normal(size=(count, FEATURES - 1)) * 0.5
    for n, block in enumerate(rng.integers(0, LENGTH // BLOCK - 1, count)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        x[n, rows, 0], x[n, rows, 1:] = 1, x[n, rows, 1:] + content[n]
    return x.astype(np.float32), content.astype(np.float32)


@pytest.mark.parametrize("gate", ["soft", "straight-through"])
def test_training_teaches_the_scorer_what_to_choose(gate):
    """What to tell is in one block that only its mark gives away: at first it is chosen by chance.

    A soft gate below 1 always asks for more. One of 1 with a soft gradient has little to ask for once the rest of the
    layer gives the right output where the right block happens to be chosen: it learns, too, but less in these steps.
    """
    options = {**OPTIONS, "gate": gate}
    layer = jax_bsk.flax.nnx.SparseKSelfAttention(
        2, FEATURES, attention_fn=functools.partial(sparsek_attention, **options), rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x, content):
        def loss_fn(layer):
            return jnp.mean((layer(x)[:, -BLOCK:, 1:] - content[:, None]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(layer)
        optimizer.update(layer, grads)
        return loss

    def found(layer, x) -> float:
        """How often the last row chooses the marked block, of all examples and heads."""
        scores = layer.score(x) + jnp.arange(LENGTH)[None, :, None] / 1024 * layer.slope[...][None, None]
        mask, _ = jax_bsk.selection.sparsek(scores, **options)
        chosen = np.asarray(mask.to_dense())[:, :, -1, ::BLOCK]
        return float((chosen & (np.asarray(x)[:, None, ::BLOCK, 0] == 1)).any(-1).mean())

    rng = np.random.default_rng(3)
    test = jnp.asarray(marked(rng, 64)[0])
    before = found(layer, test)
    losses = [float(step(layer, optimizer, *map(jnp.asarray, marked(rng, 16)))) for _ in range(250)]
    after = found(layer, test)
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert before < 0.6
    assert after > (0.95 if gate == "soft" else before + 0.1), (before, after)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_low_precision(framework):
    """bfloat16 computation on float32 parameters; scores stay float32, so the choice is the same."""
    x = inputs(2, seed=4)
    linen, params, _ = modules(x)
    exact = jax.jit(linen.apply)({"params": params}, x)
    low, _, module = modules(x, dtype=jnp.bfloat16)
    if framework == "linen":
        out = jax.jit(low.apply)({"params": params}, x)
    else:
        out = nnx.jit(lambda module, x: module(x))(module, x)
        assert module.score(x).dtype == jnp.float32
        assert module.query.kernel[...].dtype == jnp.float32
    assert out.dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(out.astype(jnp.float32) - exact).max()) < 2**-6 * float(jnp.abs(exact).max())


def test_short_inputs_and_mistakes():
    """Fewer tokens than a block: causal attention. Heads that do not fit are named."""
    x = inputs(1, seed=5, length=20)
    linen, params, module = modules(x)
    plain = jax_bsk.flax.linen.SparseSelfAttention(HEADS, jax_bsk.masks.CausalMask(), num_kv_heads=KV_HEADS)
    rest = {name: params[name] for name in ("query", "key", "value", "out")}
    expected = plain.apply({"params": rest}, x)
    assert_close(linen.apply({"params": params}, x), expected, 1e-6)
    assert_close(module(x), expected, 1e-6)
    with pytest.raises(ValueError, match="scores has one number a key and key/value or query head"):
        modules(x, score_heads=3)
    with pytest.raises(ValueError, match="num_heads=3 does not divide"):
        jax_bsk.flax.nnx.SparseKSelfAttention(3, FEATURES, rngs=nnx.Rngs(0))
