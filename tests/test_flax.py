"""Flax Linen and NNX: values, gradients and training against Flax's own dense attention, and every refusal."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_bsk.flax
from jax_bsk.masks import (
    BlockMask,
    CausalMask,
    FullMask,
    GlobalMask,
    LocalMask,
    MultiHeadMask,
    SegmentMask,
)

BATCH, LENGTH, FEATURES, HEADS = 2, 200, 32, 4
MASK = CausalMask() & (LocalMask((40, 0)) | GlobalMask(3))
DENSE = MASK.bind(LENGTH).to_dense()  # [1, 1, LENGTH, LENGTH]


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def inputs(*batch: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    shape = (*(batch or (BATCH,)), LENGTH, FEATURES)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def linen_attention(**kwargs) -> nn.MultiHeadDotProductAttention:
    return nn.MultiHeadDotProductAttention(num_heads=HEADS, **kwargs)


def nnx_attention(**kwargs) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **kwargs)


def close(actual, expected, rtol=2e-5):
    """float32 sums in another order: relative to the largest entry, as single ones cancel (a key bias's gradient)."""
    actual, expected = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (actual, expected))
    atol = rtol * max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


# ---- attention_fn in Flax's modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_linen_values_and_gradients(implementation):
    x = inputs()
    sparse = linen_attention(attention_fn=jax_bsk.flax.attention_fn(MASK, implementation=implementation))
    dense = linen_attention()
    params = dense.init(jax.random.key(0), x)

    def loss(module, mask):
        return lambda p, x: jnp.sum(jnp.sin(module.apply(p, x, mask=mask)))

    close(jax.jit(sparse.apply)(params, x), dense.apply(params, x, mask=DENSE))
    close(jax.jit(jax.grad(loss(sparse, None), (0, 1)))(params, x), jax.grad(loss(dense, DENSE), (0, 1))(params, x))


def test_nnx_values_and_gradients():
    x = inputs()
    sparse = nnx_attention(attention_fn=jax_bsk.flax.attention_fn(MASK))
    dense = nnx_attention()

    def loss(mask):
        return lambda module, x: jnp.sum(jnp.sin(module(x, mask=mask)))

    close(nnx.jit(lambda m, x: m(x))(sparse, x), dense(x, mask=DENSE))
    close(nnx.to_pure_dict(nnx.grad(loss(None))(sparse, x)), nnx.to_pure_dict(nnx.grad(loss(DENSE))(dense, x)))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_leading_dimensions(batch):
    x = np.random.default_rng(0).standard_normal((*batch, LENGTH, FEATURES)).astype(np.float32)
    valid = np.arange(LENGTH) < 150
    padding = np.broadcast_to(valid, (*batch, 1, 1, LENGTH)).copy()
    sparse, dense = nnx_attention(attention_fn=jax_bsk.flax.attention_fn(MASK)), nnx_attention()
    both = DENSE[0] & valid if not batch else DENSE & padding
    given = jnp.asarray(x)
    expected = dense(given, mask=jnp.broadcast_to(jnp.asarray(both), (*batch, 1, LENGTH, LENGTH)))
    close(sparse(given, mask=jnp.asarray(padding)), expected)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", [(BATCH, 1, 1), (1, 1, LENGTH), (BATCH, HEADS, LENGTH)])
def test_mask_of_the_module_is_combined(shape, jit, dtype):
    x = inputs()
    extra = np.random.default_rng(1).uniform(size=(*shape, LENGTH)) < 0.7
    extra[..., 0] = True  # token 0 is global: each query keeps a key, without which Flax averages all values
    sparse = linen_attention(attention_fn=jax_bsk.flax.attention_fn(MASK))
    params = sparse.init(jax.random.key(0), x)
    apply = jax.jit(sparse.apply) if jit else sparse.apply
    close(apply(params, x, mask=jnp.asarray(extra, dtype)), linen_attention().apply(params, x, mask=DENSE & extra))


def test_mask_of_the_module_alone():
    x, mask = inputs(), nn.make_causal_mask(jnp.zeros((BATCH, LENGTH)))
    sparse = linen_attention(attention_fn=jax_bsk.flax.attention_fn())
    params = sparse.init(jax.random.key(0), x)
    close(sparse.apply(params, x, mask=mask), linen_attention().apply(params, x, mask=mask))


def test_is_causal_scale_and_soft_cap():
    x = inputs()
    sparse = nnx_attention(attention_fn=jax_bsk.flax.attention_fn(LocalMask((40, 0)) | GlobalMask(3)))
    close(sparse(x, is_causal=True), nnx_attention()(x, mask=DENSE))
    query = key = value = x.reshape(BATCH, LENGTH, HEADS, -1)
    attend = jax_bsk.flax.attention_fn(MASK, scale=0.3, logits_soft_cap=2.0)
    expected = jax_bsk.sparse_attention(query, key, value, mask=MASK, scale=0.3, logits_soft_cap=2.0)
    np.testing.assert_array_equal(attend(query, key, value), expected)


def test_bias_and_dtype():
    query, key, value = (inputs(seed=n).reshape(BATCH, LENGTH, HEADS, -1) for n in range(3))
    bias = jnp.asarray(np.random.default_rng(4).standard_normal((1, HEADS, LENGTH, LENGTH)), jnp.float32)
    attend = jax.jit(jax_bsk.flax.attention_fn(MASK, implementation="xla"), static_argnames="dtype")
    close(attend(query, key, value, bias), nnx.dot_product_attention(query, key, value, bias, DENSE))
    close(attend(query[0], key[0], value[0], bias[0]), attend(query, key, value, bias)[0])
    native = jax_bsk.flax.attention_fn(MASK, implementation="cpu")
    close(native(query, key, value, bias), attend(query, key, value, bias))
    slopes = jax_bsk.biases.AlibiBias(jax_bsk.biases.alibi_slopes(HEADS))
    distances = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH)).astype(np.float32)
    close(
        native(query, key, value, slopes),
        attend(query, key, value, -slopes.slopes[None, :, None, None] * distances[None, None]),
    )
    assert attend(query, key, value.astype(jnp.bfloat16)).dtype == jnp.float32  # promoted, as in Flax
    assert attend(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_grouped_heads_in_nnx():
    x = inputs()
    sparse = nnx_attention(num_kv_heads=2, attention_fn=jax_bsk.flax.attention_fn(MASK))
    close(sparse(x), nnx_attention(num_kv_heads=2)(x, mask=DENSE))


def test_signature_names_all_that_flax_passes():
    names = set(inspect.signature(jax_bsk.flax.attention_fn()).parameters)
    linen_only_in_flax = set(inspect.signature(nn.dot_product_attention).parameters) - names
    nnx_only_in_flax = set(inspect.signature(nnx.dot_product_attention).parameters) - names
    assert not linen_only_in_flax
    assert nnx_only_in_flax <= {"promote_dtype"}  # its module passes none


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_dropout():
    """As `sparse_attention` with the module's key: other examples and steps drop other pairs."""
    query, key, value = (inputs(seed=n).reshape(BATCH, LENGTH, HEADS, -1) for n in range(3))
    fn = jax_bsk.flax.attention_fn(MASK, implementation="cpu")
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    expected = jax_bsk.sparse_attention(query, key, value, mask=MASK, implementation="cpu", **options)
    np.testing.assert_array_equal(fn(query, key, value, **options, deterministic=False), expected)
    plain = fn(query, key, value)
    np.testing.assert_array_equal(fn(query, key, value, **options), plain)  # deterministic
    with pytest.raises(ValueError, match="dropout_rng is a key"):
        fn(query, key, value, dropout_rate=0.5, deterministic=False)
    x = inputs()
    params = linen_attention().init(jax.random.key(0), x)
    layer = linen_attention(attention_fn=fn, dropout_rate=0.5)
    of_key = [layer.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(n)}) for n in (1, 1, 2)]
    np.testing.assert_array_equal(of_key[0], of_key[1])
    assert (np.asarray(of_key[0]) != np.asarray(of_key[2])).mean() > 0.9
    close(layer.apply(params, x, deterministic=True), linen_attention(attention_fn=fn).apply(params, x))
    module = nnx_attention(attention_fn=fn, dropout_rate=0.5)
    assert (np.asarray(module(x, deterministic=False)) != np.asarray(module(x, deterministic=True))).mean() > 0.9


def test_refusals():
    x = inputs()
    fn = jax_bsk.flax.attention_fn(MASK)
    params = linen_attention().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="sow_weights"):
        linen_attention(attention_fn=fn).apply(params, x, sow_weights=True, mutable=["intermediates"])
    with pytest.raises(ValueError, match="sow_weights"):
        nnx_attention(attention_fn=fn)(x, sow_weights=True)
    preset = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    with pytest.raises(ValueError, match=r"precision.*default_matmul_precision"):
        fn(*(x.reshape(BATCH, LENGTH, HEADS, -1),) * 3, precision=preset)
    with pytest.raises(ValueError, match="qk_attn_weights_einsum"):
        linen_attention(
            attention_fn=fn,
            qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: jnp.einsum,
        ).apply(params, x)
    bound = jax_bsk.flax.attention_fn(MASK.bind(LENGTH))
    with pytest.raises(ValueError, match="lazy masks"):
        linen_attention(attention_fn=bound).apply(params, x, mask=DENSE)
    with pytest.raises(ValueError, match=r"mask broadcasts to.*got \(2, 1, 1, 199\)"):
        linen_attention(attention_fn=fn).apply(params, x, mask=jnp.ones((BATCH, 1, 1, LENGTH - 1)))
    with pytest.raises(ValueError, match="mask broadcasts to"):
        linen_attention(attention_fn=fn).apply(params, x, mask=jnp.ones((BATCH + 1, 1, 1, LENGTH)))
    with pytest.raises(TypeError, match="boolean"):
        jax_bsk.flax.attention_fn(np.zeros((LENGTH, LENGTH), np.float32))
    with pytest.raises(ValueError, match="batch"):
        fn(x[0], x, x)


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGHEST, ("high", None), "default"])
def test_precision_is_honoured(precision):
    """The kernels have the highest; the products of "xla" are traced with it."""
    heads = inputs().reshape(BATCH, LENGTH, HEADS, -1)
    np.testing.assert_array_equal(
        jax_bsk.flax.attention_fn(MASK)(heads, heads, heads, precision=precision),
        jax_bsk.flax.attention_fn(MASK)(heads, heads, heads),
    )
    fn = jax_bsk.flax.attention_fn(MASK, implementation="xla")
    text = jax.jit(lambda x: fn(x, x, x, precision=precision)).lower(heads).as_text()
    name = str(precision[0] if isinstance(precision, tuple) else precision).split(".")[-1].upper()
    assert f"precision = [{name}, {name}]" in text


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_attention_fn_uncalled(framework):
    if framework == "nnx":
        call = nnx_attention(attention_fn=jax_bsk.flax.attention_fn)
    else:
        call = functools.partial(linen_attention(attention_fn=jax_bsk.flax.attention_fn).init, jax.random.key(0))
    with pytest.raises(TypeError, match=r"attention_fn makes an attention function.*call it: attention_fn="):
        call(inputs())


def test_sparse_attention_as_attention_fn():
    with pytest.raises(TypeError, match=r"give them attention_fn=jax_bsk.flax.attention_fn\(mask\)"):
        nnx_attention(attention_fn=jax_bsk.sparse_attention)(inputs())


def test_without_flax_the_error_names_the_remedy():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import jax_bsk\n"
        "try:\n    import jax_bsk.flax\n"
        "except ImportError as error:\n    assert 'flax>=0.12' in str(error), error\n"
        "else:\n    raise AssertionError('imported')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- SparseSelfAttention --------------------------------------------------------------------------------------------

MODULE_MASKS = {
    "lazy": MASK,
    "bound": MASK.bind(LENGTH),
    "heads": MultiHeadMask([MASK, CausalMask(), MASK, FullMask()]),
    "segments": CausalMask() & SegmentMask(np.arange(LENGTH) // 70),
    "none": None,
}


@pytest.mark.parametrize("name", MODULE_MASKS)
def test_self_attention_is_flax_attention(name):
    """The parameters of Flax's multi-head attention fit, and give its results."""
    mask, x = MODULE_MASKS[name], inputs()
    bound = mask if isinstance(mask, BlockMask) or mask is None else mask.bind(LENGTH)
    dense = None if bound is None else jnp.asarray(bound.to_dense())
    reference = linen_attention()
    params = reference.init(jax.random.key(0), x)
    expected = reference.apply(params, x, mask=dense)
    close(jax.jit(jax_bsk.flax.linen.SparseSelfAttention(HEADS, mask).apply)(params, x), expected)

    module = jax_bsk.flax.nnx.SparseSelfAttention(HEADS, FEATURES, mask, rngs=nnx.Rngs(0))
    nnx.update(module, nnx.state(nnx_attention(), nnx.Param))
    close(nnx.jit(lambda m, x: m(x))(module, x), nnx_attention()(x, mask=dense))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_self_attention_call_arguments(framework):
    x, lengths = inputs(), jnp.array([200, 130])
    options = {"num_kv_heads": 2, "head_dim": 16, "out_features": 24, "sinks": True, "use_bias": False}
    if framework == "linen":
        layer = jax_bsk.flax.linen.SparseSelfAttention(HEADS, MASK, **options)
        params = layer.init(jax.random.key(0), x)
        shapes = jax.tree.map(jnp.shape, params["params"])
        assert shapes["sinks"] == (HEADS,)
        assert shapes["key"] == {"kernel": (FEATURES, 2, 16)}
        assert shapes["out"] == {"kernel": (HEADS, 16, 24)}
        call = jax.jit(lambda *args, **kwargs: layer.apply(params, *args, **kwargs))
    else:
        layer = jax_bsk.flax.nnx.SparseSelfAttention(HEADS, FEATURES, MASK, rngs=nnx.Rngs(0), **options)
        call = jax.jit(layer)
    out = call(x, lengths=lengths)
    assert out.shape == (BATCH, LENGTH, 24)
    assert np.all(np.asarray(out[1, 130:]) == 0)
    close(out[1, :130], call(x[1:, :130])[0])
    ids = jnp.asarray(np.arange(LENGTH)[None] // np.array([[64], [90]]))
    by_segments, by_array = call(x, SegmentMask(ids)), call(x, (ids[:, :, None] == ids[:, None, :])[:, None])
    close(by_segments, by_array)
    assert not np.allclose(by_segments, out)


def test_wrong_head_count():
    with pytest.raises(ValueError, match="head_dim"):
        jax_bsk.flax.nnx.SparseSelfAttention(3, FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple of key's"):
        jax_bsk.flax.nnx.SparseSelfAttention(4, FEATURES, num_kv_heads=3, rngs=nnx.Rngs(0))(inputs())


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_mixed_precision(framework):
    """bfloat16 computation on float32 parameters and inputs: no further from float32 than Flax's own."""
    x = inputs()
    exact: Any
    dense: Any
    sparse: Any
    if framework == "linen":
        params = linen_attention().init(jax.random.key(0), x)
        exact = linen_attention().apply(params, x, mask=DENSE)
        dense = linen_attention(dtype=jnp.bfloat16).apply(params, x, mask=DENSE)
        sparse = jax_bsk.flax.linen.SparseSelfAttention(HEADS, MASK, dtype=jnp.bfloat16).apply(params, x)
    else:
        exact, dense = nnx_attention()(x, mask=DENSE), nnx_attention(dtype=jnp.bfloat16)(x, mask=DENSE)
        module = jax_bsk.flax.nnx.SparseSelfAttention(HEADS, FEATURES, MASK, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        nnx.update(module, nnx.state(nnx_attention(), nnx.Param))
        sparse = module(x)
        assert module.query.kernel[...].dtype == jnp.float32
    assert sparse.dtype == dense.dtype == jnp.bfloat16
    error = np.abs(np.asarray(sparse, np.float64) - np.asarray(exact)).max()
    bound = np.abs(np.asarray(dense, np.float64) - np.asarray(exact)).max()
    assert error <= 2 * bound + np.finfo(np.float32).eps


# ---- training -------------------------------------------------------------------------------------------------------

TARGETS = jnp.asarray(np.random.default_rng(9).standard_normal((BATCH, LENGTH, FEATURES)), jnp.float32)
STEPS = 12


def test_linen_training_agrees_with_dense():
    x = inputs()
    optimizer = optax.adam(1e-2)

    def train(module, mask):
        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((module.apply(p, x, mask=mask) - TARGETS) ** 2))(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss

        params = module.init(jax.random.key(0), x)
        state, losses = optimizer.init(params), []
        for _ in range(STEPS):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        return losses

    sparse = train(jax_bsk.flax.linen.SparseSelfAttention(HEADS, MASK), None)
    assert sparse[-1] < sparse[0]
    # Adam amplifies rounding where a gradient is near zero; 1e-4 is 100 times what this run shows.
    np.testing.assert_allclose(sparse, train(linen_attention(), DENSE), rtol=1e-4)


def test_nnx_training_agrees_with_dense():
    x = inputs()

    def train(module, mask):
        @nnx.jit
        def step(module, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x, mask) - TARGETS) ** 2))(module)
            optimizer.update(module, grads)
            return loss

        optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
        return [float(step(module, optimizer)) for _ in range(STEPS)]

    def sparse_module(mask):
        return jax_bsk.flax.nnx.SparseSelfAttention(
            HEADS, FEATURES, mask, num_kv_heads=2, sinks=True, logits_soft_cap=20.0, rngs=nnx.Rngs(0)
        )

    sparse = train(sparse_module(MASK), None)
    assert sparse[-1] < sparse[0]
    # The same layer with the mask traced in as a dense array: other code, the same numbers.
    np.testing.assert_allclose(sparse, train(sparse_module(None), jnp.asarray(DENSE)), rtol=1e-4)
