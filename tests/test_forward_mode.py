"""Forward mode and second derivatives of the native calls: tangents in plain JAX, cotangents natively."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import sparse_attention
from jax_bsk.masks import CausalMask

KEYS = jax.random.split(jax.random.key(0), 4)
QUERY, KEY, VALUE = (jax.random.normal(k, (1, 32, 1, 8)) for k in KEYS[:3])
SINKS = jnp.array([0.5])
MASK = CausalMask().bind(32, block_size=32)
GATES = jnp.full((1, 1, 1), 0.75)


def attend(query, key, value, sinks, gates, implementation: Any = "cpu"):
    return sparse_attention(
        query, key, value, mask=MASK, sinks=sinks, gates=gates, implementation=implementation, return_residual=True
    )


def loss(implementation):
    return lambda *args: jnp.stack([jnp.sin(x).sum() for x in attend(*args, implementation=implementation)]).sum()


ARGS = QUERY, KEY, VALUE, SINKS, GATES
TANGENTS = tuple(jnp.cos(3 * x) for x in ARGS)


def same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def expected():
    return jax.jit(lambda *args: jax.jvp(lambda *a: attend(*a, implementation="xla"), args, TANGENTS))(*ARGS)


def test_jvp_of_every_argument(expected):
    same(jax.jit(lambda *args: jax.jvp(attend, args, TANGENTS))(*ARGS), expected)


def test_linearize(expected):
    results, tangents = jax.linearize(attend, *ARGS)
    same((results, tangents(*TANGENTS)), expected)


def test_a_product_with_the_hessian():
    def product(implementation):
        gradient = jax.grad(loss(implementation), range(5))
        return jax.jit(lambda *args: jax.jvp(gradient, args, TANGENTS))(*ARGS)

    same(product("cpu"), product("xla"))


def test_reverse_mode_is_the_native_backward_and_traces_no_tangents():
    text = jax.jit(jax.grad(loss("cpu"), range(5))).lower(*ARGS).as_text()
    assert text.count("jax_bsk_attention_backward") == 1
    assert "while" not in text


def test_gradient_of_a_vmap_over_some_arguments():
    def total(query, key):
        return jnp.sum(jax.vmap(lambda q: loss("cpu")(q, key, VALUE, SINKS, GATES))(query))

    both = jnp.stack([QUERY, -QUERY])
    dquery, dkey = jax.jit(jax.grad(total, (0, 1)))(both, KEY)
    one = jax.jit(jax.grad(loss("cpu"), (0, 1)))
    single = [one(q, KEY, VALUE, SINKS, GATES) for q in both]
    same((dquery, dkey), (jnp.stack([d[0] for d in single]), single[0][1] + single[1][1]))
