"""Calls of which a size is zero: batch, heads, query length, key length, head size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import sparse_attention
from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.calls import BLOCK, HEAD_SIZE
from jax_bsk.qa.testing.faults.scenario import Scenario, scenario

EXPECTED = "empty or zero result (LSE -inf), zero gradients of the operands' shapes"


def _zero(name: str, **sizes: int) -> Scenario:
    @scenario(name, "zero-size batch, heads or lengths", EXPECTED)
    def run(implementation: str) -> None:
        size = {"batch": 2, "q_len": BLOCK, "kv_len": BLOCK + 8, "heads": 2, **sizes}
        query_shape = size["batch"], size["q_len"], size["heads"], HEAD_SIZE
        key_shape = size["batch"], size["kv_len"], size["heads"], HEAD_SIZE
        for dtype in calls.dtypes(implementation):
            query, key = jnp.ones(query_shape, dtype), jnp.ones(key_shape, dtype)
            for is_causal in (False, True):
                results = _call(query, key, implementation, is_causal=is_causal)
                shapes = {"out": query_shape, "lse": query_shape[:3], "dq": query_shape, "dk": key_shape}
                for what, shape in {**shapes, "dv": key_shape}.items():
                    assert results[what].shape == shape, f"{what} has shape {results[what].shape}, expected {shape}"
                    checks.check_equal(f"{what} ({dtype})", results[what], -np.inf if what == "lse" else 0)

    return run


def _call(query: Any, key: Any, implementation: Any, **options: Any) -> dict[str, Any]:
    def attend(query, key, value):
        return sparse_attention(query, key, value, implementation=implementation, return_residual=True, **options)

    @jax.jit
    def step(query, key):
        (out, lse), pullback = jax.vjp(attend, query, key, key)
        return out, lse, *pullback((jnp.ones_like(out), jnp.zeros_like(lse)))

    return dict(zip(calls.RESULTS, step(query, key), strict=True))


def _zero_head_size(name: str, head_size: int, value_size: int, argument: str) -> Scenario:
    @scenario(name, "wrong dtype, rank, head size, GQA ratio", "ValueError when traced that names the argument")
    def run(implementation: Any) -> None:
        query, value = (jax.ShapeDtypeStruct((1, BLOCK, 2, size), jnp.float32) for size in (head_size, value_size))
        attend = functools.partial(sparse_attention, is_causal=True, implementation=implementation)
        trace = functools.partial(jax.eval_shape, attend, query, query, value)
        checks.check_raises("when traced", trace, ValueError, f"{argument}'s head size")

    return run


SCENARIOS = (
    _zero("zero-batch", batch=0),
    _zero("zero-heads", heads=0),
    _zero("zero-queries", q_len=0),
    _zero("zero-keys", kv_len=0),
    _zero_head_size("zero-head-size", 0, HEAD_SIZE, "query"),
    _zero_head_size("zero-value-head-size", HEAD_SIZE, 0, "value"),
)
