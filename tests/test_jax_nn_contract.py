"""`sparse_attention` in the place of `jax.nn.dot_product_attention`: the contract of the JAX that is installed.

What JAX's own tests of it cover, here at small sizes: its parameters, and outputs and gradients in 16-bit types against
its "xla" implementation in float32. As there no rank is promoted (see conftest). `DIFFERENCES` has all that is meant
to differ.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import sparse_attention

# More than one block of 128 each way, of which the last is not whole.
BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 136, 136, 4, 16
# Parameters that there are here alone; keywords, so that they are in nobody's way.
MORE_PARAMETERS = {
    *("logits_soft_cap", "sinks", "gates", "axis_name"),
    *("dropout_rate", "dropout_rng", "score_function"),
}


def jax_nn(*args, **kwargs):
    """As JAX's tests call it, which promote types."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(*args, implementation="xla", **kwargs)


def inputs(dtype=jnp.float32, heads=HEADS, kv_heads=HEADS, seed=0):
    """query, key, value and the output's cotangent."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(BATCH, QUERIES, heads, SIZE), *[(BATCH, KEYS, kv_heads, SIZE)] * 2, (BATCH, QUERIES, heads, SIZE)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def in_float32(arrays):
    floating = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if floating(x) else x, arrays)


def assert_near(actual, expected, dtype):
    """Within what the type rounds by: JAX's tests allow 0.01 and 0.02 between two implementations of one type."""
    bound = 0.02 if dtype == jnp.bfloat16 else 0.005
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e), atol=bound, rtol=bound)


# ---- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_have_jax_names_order_kinds_and_defaults():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(sparse_attention).parameters
    assert [name for name in ours if name not in MORE_PARAMETERS] == list(theirs)
    assert ours.keys() - theirs.keys() == MORE_PARAMETERS
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in MORE_PARAMETERS)
    assert {name: ours[name].default for name in MORE_PARAMETERS} == dict.fromkeys(MORE_PARAMETERS) | {
        "dropout_rate": 0.0
    }


# ---- outputs and gradients ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(attend, arrays, dout):
    out, pullback = jax.vjp(attend, *arrays)
    return out, pullback(dout)[:3]


@functools.cache
def expected_of_groups(dtype, groups):
    *arrays, dout = in_float32(inputs(dtype, kv_heads=HEADS // groups))
    return output_and_gradients(jax_nn, arrays, dout)


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_groups_and_vmap(dtype, groups, use_vmap):
    *arrays, dout = inputs(dtype, kv_heads=HEADS // groups)
    attend = jax.vmap(sparse_attention, (0, 0, 0, None, None)) if use_vmap else sparse_attention
    out, gradients = output_and_gradients(attend, (*arrays, None, None), dout)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
    assert_near((out, gradients), expected_of_groups(dtype, groups), dtype)


def tril():
    return jnp.tril(jnp.ones((QUERIES, KEYS), bool))


def lengths(*values):
    return jnp.array(values, jnp.int32)


PADDING = {
    "query_seq_lengths": lengths(QUERIES // 2, QUERIES // 4),
    "key_value_seq_lengths": lengths(KEYS // 4, KEYS // 2),
}
KEEPS_KEYS = jnp.arange(KEYS) % 7 != 3
# Arrays among the options are arguments of the function that is differentiated, as in JAX's tests.
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scale": 0.5},
    "causal": {"is_causal": True},
    "padding": PADDING,
    "query lengths": {"query_seq_lengths": lengths(QUERIES, 5)},
    "key lengths": {"key_value_seq_lengths": lengths(1, 131)},
    "key lengths from 0 to all": {"key_value_seq_lengths": lengths(KEYS, KEYS), "is_causal": True},
    "custom": {"mask": tril()[None, None]},
    "causal and padding": {"is_causal": True, **PADDING},
    "custom and padding": {"mask": tril()[None, None], **PADDING},
    "causal and window": {"is_causal": True, "local_window_size": (3, 2)},
    "window": {"local_window_size": (3, 2)},
    "window to the left": {"local_window_size": (3, 0)},
    "window to the right": {"local_window_size": (0, 9)},
    "window of its own": {"local_window_size": (0, 0)},
    "window of one number": {"local_window_size": 5},
    "window past the ends": {"local_window_size": (1000, 1000)},
    "window, causal and padding": {"local_window_size": 130, "is_causal": True, **PADDING},
    "mask BNTS": {"mask": jnp.broadcast_to(tril(), (BATCH, HEADS, QUERIES, KEYS))},
    "mask 1NTS": {"mask": jnp.stack([tril(), ~tril() | jnp.eye(QUERIES, dtype=bool)] * 2)[None]},
    "mask B11S": {"mask": jnp.stack([KEEPS_KEYS, ~KEEPS_KEYS])[:, None, None]},
    "mask B1T1": {"mask": jnp.ones((BATCH, 1, QUERIES, 1), bool)},
    "mask 1111": {"mask": jnp.ones((1, 1, 1, 1), bool)},
    "mask NTS": {"mask": jnp.broadcast_to(tril(), (HEADS, QUERIES, KEYS))},
    "mask TS": {"mask": tril()},
    "mask 1S": {"mask": KEEPS_KEYS[None]},
    "mask S": {"mask": KEEPS_KEYS},
}


def run(attend: Callable[..., Any], arrays, options):
    """Output and gradients of query, key and value, with the options' arrays as arguments."""
    *arrays, dout = arrays
    traced = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in options.items() if name not in traced}

    @jax.jit
    def call(arrays, traced, dout):
        out, pullback = jax.vjp(lambda arrays: attend(*arrays, **traced, **static), arrays)
        return out, pullback(dout)[0]

    return call(arrays, traced, dout)


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_windows_and_lengths(name):
    arrays = inputs(jnp.bfloat16)
    expected = run(jax_nn, in_float32(arrays), OPTIONS[name])
    assert_near(run(sparse_attention, arrays, OPTIONS[name]), expected, jnp.bfloat16)


def test_unbatched_arrays():
    arrays = [x[0] for x in inputs(jnp.float16)]
    for options in ({"is_causal": True}, {"mask": tril()[None]}, {"mask": tril()[None, None]}):
        expected = run(jax_nn, in_float32(arrays), options)
        assert_near(run(sparse_attention, arrays, options), expected, jnp.float16)


@pytest.mark.parametrize("name", ["causal", "window", "key lengths", "mask B11S"])
@pytest.mark.parametrize("unbatched", [False, True])
def test_residuals(name, unbatched):
    arrays = inputs(jnp.bfloat16)[:3]
    options = OPTIONS[name]
    if unbatched:
        arrays = [x[0] for x in arrays]
        rest = {"key lengths": lengths(1), "mask B11S": KEEPS_KEYS[None, None]}
        options = {key: rest[name] if isinstance(x, jax.Array) else x for key, x in options.items()}
    actual = sparse_attention(*arrays, return_residual=True, **options)
    expected = jax_nn(*in_float32(arrays), return_residual=True, **options)
    assert actual[1].shape == expected[1].shape == arrays[0].shape[:-1]
    assert_near(actual, expected, jnp.bfloat16)


# ---- bias -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, PADDING], ids=["bias", "causal", "padding"])
def test_bias_and_its_gradient(options):
    *arrays, dout = inputs(jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(9), (1, HEADS, QUERIES, KEYS), jnp.bfloat16)
    attend = functools.partial(sparse_attention, implementation="xla")
    operands = [*arrays, bias, dout]
    assert_near(run(attend, operands, options), run(jax_nn, in_float32(operands), options), jnp.bfloat16)


@pytest.mark.parametrize(("batch", "use_vmap"), [(2, False), (3, True)])
def test_bias_of_each_example(batch, use_vmap):
    """One array as query, key and value, a mask of three dimensions, and under vmap no batch but the mapped one."""
    keys = jax.random.split(jax.random.key(batch), 2)
    x = jax.random.normal(keys[0], (batch, 33, HEADS, SIZE), jnp.bfloat16)
    bias = jax.random.normal(keys[1], (batch, HEADS, 33, 33), jnp.bfloat16)
    mask = jnp.ones((1, 1, 33), bool)

    def results(attend, x, bias):
        function = lambda x, bias, mask: attend(x, x, x, bias=bias, mask=mask)  # noqa: E731
        if use_vmap:
            function = jax.vmap(function, (0, 0, None))
        out, pullback = jax.vjp(function, x, bias, mask)
        return out, pullback(out)[:2]

    actual = jax.jit(functools.partial(results, functools.partial(sparse_attention, implementation="xla")))(x, bias)
    expected = jax.jit(functools.partial(results, jax_nn))(*in_float32((x, bias)))
    assert_near(actual, expected, jnp.bfloat16)


SHAPES = [(BATCH, 1, QUERIES, KEYS), (1, 1, 1, KEYS), (HEADS, QUERIES, KEYS), (QUERIES, KEYS), (KEYS,), ()]


@pytest.mark.parametrize("shape", SHAPES)
def test_biases_broadcast(shape):
    arrays = inputs()[:3]
    bias = jax.random.normal(jax.random.key(8), shape)
    assert_near(sparse_attention(*arrays, bias=bias, implementation="xla"), jax_nn(*arrays, bias), jnp.float16)


@pytest.mark.parametrize("unbatched", [False, True])
def test_masks_and_integer_biases_broadcast_alike(unbatched):
    """Every shape with the call's sizes or ones, with fewer dimensions and (without a batch) with four."""
    arrays = [x[0] if unbatched else x for x in inputs()[:3]]
    rng = np.random.default_rng(8)
    for shape in [*SHAPES[1:], (1, HEADS, QUERIES, 1), (HEADS, 1, 1)]:
        mask, bias = jnp.asarray(rng.random(shape) < 0.8), jnp.asarray(rng.integers(-2, 3, shape))
        mask = mask.at[..., :1].set(True) if shape else jnp.asarray(True)
        actual = sparse_attention(*arrays, bias=bias, mask=mask, implementation="xla")
        assert_near(actual, jax_nn(*arrays, bias, mask), jnp.float16)


# ---- what is meant to differ ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """One documented difference.

    Attributes:
      reason: Why it is one.
      shown: Raises AssertionError where there is none, or another.
    """

    reason: str
    shown: Callable[[], None]


def empty_rows():
    query, key, value, _ = inputs()
    nothing = {"mask": jnp.zeros((1, 1, QUERIES, KEYS), bool), "return_residual": True}
    out, lse = sparse_attention(query, key, value, **nothing)
    assert not out.any()
    assert jnp.isneginf(lse).all()
    theirs, _ = jax_nn(query, key, value, **nothing)
    np.testing.assert_allclose(theirs, jnp.broadcast_to(value.mean(1, keepdims=True), out.shape), atol=1e-5)


def residual_type():
    arrays = inputs(jnp.bfloat16)[:3]
    assert sparse_attention(*arrays, return_residual=True)[1].dtype == jnp.float32
    assert jax_nn(*arrays, return_residual=True)[1].dtype == jnp.bfloat16


def residual_gradient():
    query, key, value, _ = inputs()
    gradient = lambda attend: jax.grad(lambda q: attend(q, key, value, return_residual=True)[1].sum())(query)  # noqa: E731
    assert gradient(sparse_attention).any()
    assert not gradient(jax_nn).any()


def value_size():
    query, key, value, _ = inputs()
    assert sparse_attention(query, key, value[..., :8]).shape == (*query.shape[:-1], 8)
    with pytest.raises(ValueError, match="value shape"):
        jax_nn(query, key, value[..., :8])


def implementation_names():
    query, key, value, _ = inputs()
    with pytest.raises(ValueError, match="'cpu', 'cuda', 'xla'"):
        sparse_attention(query, key, value, implementation="cudnn")  # type: ignore[arg-type]


def length_types():
    query, key, value, _ = inputs()
    ours = sparse_attention(query, key, value, key_value_seq_lengths=np.array([9, 99], np.uint8))
    with pytest.raises(ValueError, match="int32"):
        jax_nn(query, key, value, key_value_seq_lengths=np.array([9, 99], np.uint8))
    np.testing.assert_array_equal(ours, sparse_attention(query, key, value, key_value_seq_lengths=lengths(9, 99)))


def negative_windows():
    query, key, value, _ = inputs()
    jax_nn(query, key, value, local_window_size=(-1, 3))
    with pytest.raises(ValueError, match=r"window\[0\] must be at least 0"):
        sparse_attention(query, key, value, local_window_size=(-1, 3))


def open_windows():
    query, key, value, _ = inputs()
    ours = sparse_attention(query, key, value, local_window_size=(None, 0))
    assert_near(ours, jax_nn(query, key, value, is_causal=True), jnp.float16)
    with pytest.raises(TypeError):
        jax_nn(query, key, value, local_window_size=(None, 0))


def mixed_ranks():
    query, key, value, _ = (x[:1] for x in inputs())
    assert jax_nn(query[0], key, value).shape == query[0].shape
    with pytest.raises(ValueError, match="all three"):
        sparse_attention(query[0], key, value)


DIFFERENCES = {
    "rows that attend to nothing": Difference(
        "their mean of all values is an accident of a large negative number, and reads what is masked", empty_rows
    ),
    "type of the residual": Difference("a log-sum-exp in bfloat16 cannot join two parts of a softmax", residual_type),
    "gradient of the residual": Difference("so that such joins can be trained", residual_gradient),
    "head size of value": Difference("the kernels take any, as multi-head latent attention has", value_size),
    "names of implementations": Difference("cuDNN's attention has no block-sparse masks", implementation_names),
    "types of lengths": Difference("any integers are lengths", length_types),
    "windows of negative size": Difference("a window has the query in it; FunctionMask makes others", negative_windows),
    "open windows": Difference("None says what a number past all lengths does", open_windows),
    "ranks": Difference("one array without a batch among others with one is a mistake more often", mixed_ranks),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(name):
    DIFFERENCES[name].shown()
