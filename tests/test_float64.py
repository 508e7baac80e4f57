"""float64 inputs have float64 results: scale and soft cap travel to the CPU kernels in float64 too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import sparse_attention
from jax_bsk.qa.testing.oracle import attention_oracle


# Neither 1 / sqrt(80) nor the cap is a float32 number. Logits near 900 make of a scale in float32 an error of 4e-7.
@pytest.mark.parametrize(
    ("amplitude", "cap", "bounds"),
    [(1.0, None, (4e-15, 1e-14)), (200.0, None, (4e-12, 1e-10)), (1.0, 1.7, (4e-15, 1e-14))],
)
def test_precision(amplitude, cap, bounds, implementation):
    rng = np.random.default_rng(0)
    query, key, value, dout = rng.standard_normal((4, 1, 64, 1, 80))
    query *= amplitude
    dense = np.tril(np.ones((1, 1, 64, 64), bool))
    expected = attention_oracle(query, key, value, dense, scale=80**-0.5, soft_cap=cap, dout=dout).values
    with jax.enable_x64(True):

        def attend(*inputs):
            return sparse_attention(*inputs, is_causal=True, logits_soft_cap=cap, implementation=implementation)

        out, pullback = jax.vjp(attend, *map(jnp.asarray, (query, key, value)))
        results = dict(zip(("out", "dq", "dk", "dv"), (out, *pullback(jnp.asarray(dout))), strict=True))
    for name, result in results.items():
        bound = bounds[name != "out"] * max(1, np.abs(expected[name]).max())
        assert np.abs(np.asarray(result) - expected[name]).max() < bound, name
