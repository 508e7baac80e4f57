"""Gradients where logits are large: a probability is exp(logit - lse), and lse, rounded, would decide what it is.

At logits of 10^6 the last bit of a float32 log-sum-exp is 0.06. So the forward keeps what rounding took from it, and
the backward forms the forward's logits to the last bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import sparse_attention
from jax_bsk.masks import CausalMask
from jax_bsk.qa.testing.oracle import attention_oracle
from tests.util import random_inputs

SHAPE = {"batch": 1, "q_len": 80, "kv_len": 80, "heads": 2, "kv_heads": 1, "head_dim": 16, "value_dim": 16}


def gradients(inputs, dout, implementation, **options):
    def call(*inputs):
        return sparse_attention(*inputs, mask=CausalMask(), implementation=implementation, **options)

    out, pullback = jax.vjp(call, *inputs)
    return out, *pullback(dout)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_values_have_the_right_gradient_at_every_scale(implementation, scale):
    query, key, value = random_inputs(0, **SHAPE)
    inputs = query * scale, key, value
    dout = jax.random.normal(jax.random.key(1), query.shape)
    out, _, _, dvalue = gradients(inputs, dout, implementation)
    mask = np.tril(np.ones((80, 80), bool))[None, None]
    oracle = attention_oracle(*map(np.asarray, inputs), mask=mask, scale=16**-0.5, dout=np.asarray(dout)).values
    for name, got in (("out", out), ("dv", dvalue)):
        error = np.linalg.norm(np.asarray(got) - oracle[name]) / np.linalg.norm(oracle[name])
        # Where rows have two keys of nearly the same logit, the rounding of logits shows: of 2^-24 of their size.
        assert error < 1e-4, name


@pytest.mark.parametrize("scale", [1e7, 1e12, 1e20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 1e6}, {"sinks": [3e5, -1e7]}], ids=str)
def test_what_is_finite_has_finite_gradients(implementation, scale, dtype, options):
    query, key, value = (x.astype(dtype) for x in random_inputs(2, **SHAPE))
    inputs = query * jnp.asarray(scale, dtype), key, value
    dout = jax.random.normal(jax.random.key(1), query.shape).astype(dtype)
    if "sinks" in options:
        options = {"sinks": jnp.array(options["sinks"], jnp.float32)}
    out, *grads = gradients(inputs, dout, implementation, **options)
    assert jnp.isfinite(out).all()
    assert all(jnp.isfinite(x).all() for x in grads)
