"""`jax.disable_jit`, `jax_debug_nans` and `jax_debug_infs`: calls work under them, and give no false alarm."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BSR, sampled_matmul, selection, sparse_attention, sparse_matmul
from jax_bsk.masks import CausalMask

QUERY = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
MASK = CausalMask().bind(64, block_size=32)
LENGTHS = jnp.array([3])  # so that most rows attend to nothing
MATRIX = BSR.from_dense(np.tril(np.ones((64, 64), np.float32)), 32)
FACTOR = jax.random.normal(jax.random.key(1), (64, 8))


def attend(query, **options):
    return sparse_attention(query, query, query, query_seq_lengths=LENGTHS, **options)


def gated(query, **options):
    # A scalar times ones: its gradient goes through that of the gates.
    return attend(query, mask=MASK, gates=query.sum() * jnp.ones((1, 2, MASK.kv_blocks.shape[-1])), **options)


CALLS = {
    "attention": (attend, QUERY),
    "sinks": (lambda x: attend(x, sinks=x[0, 0, :, 0]), QUERY),
    "gates": (lambda x: gated(x, sinks=x[0, 0, :, 0]), QUERY),
    "selection": (
        lambda x: attend(x, mask=selection.moba(x, x, top_k=1, moba_block=32, block_size=32)),
        QUERY,
    ),
    "product": (lambda x: sparse_matmul(MATRIX, x), FACTOR),
    "sampled": (lambda x: sampled_matmul(x, x.T, MATRIX).data, FACTOR),
}


@contextlib.contextmanager
def alarms():
    """Both checks at once, of the results of each operation that runs eagerly and of each jitted function."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def loss(function):
    return lambda x: (function(x) ** 2).sum()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [jax.disable_jit, alarms])
def test_native_calls_and_gradients_eagerly(name, mode):
    function, x = CALLS[name]
    expected = jax.jit(jax.value_and_grad(loss(function)))(x)
    with mode():
        actual = jax.value_and_grad(loss(function))(x)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sinks", "product"])
def test_native_calls_and_gradients_under_vmap_and_jit(name):
    function, x = CALLS[name]
    with alarms():
        mapped = jax.vmap(jax.grad(loss(function)))(x[None])
        jitted = jax.jit(jax.grad(loss(function)))(x)
    np.testing.assert_allclose(mapped[0], jitted, rtol=1e-5, atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(jax.vmap(function)(x[None])[0], function(x), rtol=1e-5, atol=1e-6)


def test_xla_gives_no_false_alarm():
    function, x = (lambda x: gated(x, sinks=x[0, 0, :, 0], implementation="xla")), QUERY
    with alarms():
        assert np.isfinite(jax.grad(loss(function))(x)).all()


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_an_alarm_that_is_due_comes(implementation):
    bad = QUERY.at[0, 0, 0, 0].set(jnp.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.jit(lambda x: attend(x, implementation=implementation))(bad)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_an_infinite_log_sum_exp_is_an_alarm_where_it_is_asked_for(implementation):
    out, lse = attend(QUERY, implementation=implementation, return_residual=True)
    assert np.isneginf(lse[:, 3:]).all()
    assert np.isfinite(lse[:, :3]).all()
    assert np.isfinite(out).all()
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        attend(QUERY, implementation=implementation, return_residual=True)
