"""The row sums that the backward is given: right, and the same bits whatever is in the call or around it.

The kernels alone are in `csrc/cpu_check_delta.cc` (also with several workers) and `csrc/cuda_check_delta.cu`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import sparse_attention
from jax_bsk.attention import ffi
from jax_bsk.attention.native import DELTA, DeltaCall
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import CausalMask
from tests.util import collectives, random_inputs, text_of

CALL = 'custom_call_target="jax_bsk_attention_delta"'


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request) -> str:
    return request.param


def arrays(dtype, batch=3, length=37, heads=3, size=64):
    shape = batch, length, heads, size
    dout, out = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (0, 1))
    dlse = jax.random.normal(jax.random.key(2), (batch, heads, length), statistics_dtype(dtype))
    return dout, out, dlse


def row_sums(dout, out, dlse=None):
    absent = np.zeros(ffi.NO_LSE_COTANGENT, statistics_dtype(out.dtype))
    return DELTA(DeltaCall(), dout, out, absent if dlse is None else dlse)[0]


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        bits = np.dtype(f"uint{8 * a.dtype.itemsize}")
        np.testing.assert_array_equal(np.asarray(a).view(bits), np.asarray(b).view(bits))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 5, 17, 64, 130])
def test_row_sums(platform, dtype, size):
    if platform == "cuda" and dtype == "float64":
        pytest.skip("the CUDA kernels take no float64")
    with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices(platform)[0]):
        dout, out, dlse = arrays(dtype, size=size)
        actual, without = row_sums(dout, out, dlse), row_sums(dout, out)
    products = np.einsum("btnh,btnh->bnth", *(np.asarray(x, np.float64) for x in (dout, out)))
    actual, without, dlse = map(np.asarray, (actual, without, dlse))
    scale = np.abs(products).sum(-1) + np.abs(dlse)
    assert actual.dtype == statistics_dtype(dtype)
    # As many roundings as a sum of 40 terms has: lanes sum at most 32 of these products, and are summed in pairs.
    allowed = 40 * np.finfo(actual.dtype).eps / 2 * scale
    assert (np.abs(actual - (products.sum(-1) - dlse)) <= allowed).all()
    assert (np.abs(without - products.sum(-1)) <= allowed).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_has_the_same_bits_in_every_call(platform, dtype):
    with jax.default_device(jax.devices(platform)[0]):
        dout, out, dlse = arrays(dtype, length=1100)  # several tasks an example
        whole = row_sums(dout, out, dlse)
        for part in (np.s_[1:2], np.s_[:, :7], np.s_[2:, 513:640, 1:2], np.s_[:, -1:]):
            examples, queries, heads = (*((part,) if isinstance(part, slice) else part), np.s_[:], np.s_[:])[:3]
            parts = dout[part], out[part], dlse[examples, heads, queries]
            assert_same_bits(row_sums(*parts), whole[examples, heads, queries])
        assert_same_bits(jax.jit(row_sums)(dout, out, dlse), whole)
        # Under vmap the examples are a leading dimension; of one cotangent all share the output.
        assert_same_bits(jax.vmap(row_sums)(dout[:, None], out[:, None], dlse[:, None])[:, 0], whole)
        assert_same_bits(jax.vmap(row_sums, (0, None, None))(dout[None], out, dlse)[0], whole)
        # Within a program that makes the operands and uses the result.
        scaled = jax.jit(lambda dout, out, dlse: 4 * row_sums(2 * dout, out / 2, dlse))
        assert_same_bits(scaled(dout, out, dlse), 4 * whole)


def test_a_gradient_makes_one_call_without_zeros_for_the_log_sum_exp(platform):
    q, k, v = random_inputs(0, q_len=64, kv_len=64, head_dim=16, value_dim=16)
    attend = functools.partial(
        sparse_attention, mask=CausalMask().bind(64, block_size=64), implementation=platform, return_residual=True
    )
    program = jax.jit(jax.grad(lambda q: attend(q, k, v)[0].sum())).lower(q).as_text()
    calls = [line for line in program.splitlines() if "@jax_bsk_attention_delta(" in line]
    assert len(calls) == 1
    assert "tensor<1x1x0xf32>" in calls[0]
    both = jax.jit(jax.grad(lambda q: sum(x.sum() for x in attend(q, k, v)))).lower(q).as_text()
    calls = [line for line in both.splitlines() if "@jax_bsk_attention_delta(" in line]
    assert len(calls) == 1
    assert "tensor<1x1x0xf32>" not in calls[0]
    # What nobody asks for is not computed.
    unused = jax.jit(lambda q: jax.vjp(lambda q: attend(q, k, v)[0], q)[0])
    assert CALL not in text_of(unused.lower(q).compile())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_gradients_of_split_examples_have_the_bits_of_one_device(platform, axis_type):
    devices = jax.devices(platform)
    if len(devices) < 2:
        pytest.skip("needs two devices")
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    inputs = random_inputs(1, 2, 320, 320, 4, 2, 64, 64, dtype=dtype)
    sinks = jnp.linspace(-1.0, 1.0, 4, dtype=jnp.float32)
    attend = functools.partial(
        sparse_attention, mask=CausalMask().bind(320, block_size=64), implementation=platform, return_residual=True
    )

    @jax.jit
    def gradients(dout, dlse, query, key, value):
        pullback = jax.vjp(lambda *x: attend(*x, sinks=sinks), query, key, value)[1]
        return pullback((dout, dlse))

    (out, lse) = attend(*inputs)
    arguments = jnp.cos(out), jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape), *inputs
    one = gradients(*jax.device_put(arguments, devices[0]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=devices[:2])
    with jax.set_mesh(mesh):
        split = jax.device_put(arguments, NamedSharding(mesh, P("data")))
        compiled = gradients.lower(*split).compile()
        two = compiled(*split)
    assert collectives(compiled) == []
    assert_same_bits(two, one)


def test_a_sequence_that_was_cut_unevenly():
    """Of `x[:, :-1]` the compiler's shards have unequal lengths, which the call is not given."""
    x = random_inputs(2, 1, 256)[0]
    sums = jax.jit(lambda x: row_sums(jnp.sin(x[:, :-1]), x[:, :-1]))
    mesh = jax.make_mesh((4,), ("tokens",), axis_types=(AxisType.Auto,))
    split = sums(jax.device_put(x, NamedSharding(mesh, P(None, "tokens"))))
    np.testing.assert_allclose(split, sums(x), rtol=1e-5, atol=1e-5)
