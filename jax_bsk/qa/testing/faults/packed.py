"""Packed sequences whose numbers make no sense, or break what was promised of them, as traced data may."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import packed_attention
from jax_bsk.masks import CausalMask, PackedMask
from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.scenario import Scenario, scenario

TOKENS, KEYS, BLOCK = 192, 256, 64
GOOD = np.array([0, 50, 50, 170], np.int32), np.array([0, 100, 130, 256], np.int32)
FAULT = "sequences that end before they begin, lie outside the tokens, or are longer than promised"
BIG = 2**31 - 1
# Numbers of queries and of keys, of which one makes no sense.
SENSELESS: dict[str, tuple[list[int], list[int]]] = {
    "queries fall": ([0, 90, 50, 170], GOOD[1].tolist()),
    "keys fall": (GOOD[0].tolist(), [0, 200, 130, 256]),
    "queries end past the tokens": ([0, 50, 60, TOKENS + 1], GOOD[1].tolist()),
    "keys end far past the tokens": (GOOD[0].tolist(), [0, 100, 130, BIG]),
    "queries begin before the tokens": ([-1, 50, 60, 170], GOOD[1].tolist()),
    "most negative": (GOOD[0].tolist(), [-BIG - 1, 100, 130, 256]),
    "huge in the middle": ([0, BIG, 60, 170], GOOD[1].tolist()),
}


@functools.cache
def _program(implementation: Any, longest: int | None = None) -> Any:
    @jax.jit
    def run(query: Any, key: Any, value: Any, dout: Any, q_numbers: Any, kv_numbers: Any) -> dict[str, Any]:
        def attend(query: Any, key: Any, value: Any) -> Any:
            return packed_attention(
                *(query, key, value, q_numbers, kv_numbers),
                is_causal=True,
                alignment="bottom_right",
                max_seqlen_kv=longest,
                block_size=BLOCK,
                implementation=implementation,
                return_residual=True,
            )

        (out, lse), pullback = jax.vjp(attend, query, key, value)
        return {
            "out": out,
            "lse": lse,
            **dict(zip(("dq", "dk", "dv"), pullback((dout, jnp.zeros_like(lse))), strict=True)),
        }

    return run


def _run(
    implementation: str, dtype: str, numbers: Any, longest: int | None = None, times: int = 1
) -> dict[str, np.ndarray]:
    operands = calls.Operands.random(dtype, times * TOKENS, times * KEYS)
    arrays = [x[0] for x in (operands.query, operands.key, operands.value, operands.dout)]
    results = _program(implementation, longest)(*arrays, *(np.array(x, np.int32) for x in numbers))
    return {name: np.asarray(x) for name, x in results.items()}


@scenario(
    "packed-senseless", FAULT, "never dereferenced; all rows are NaN; the host's check names them", may_crash=True
)
def senseless(implementation: str) -> None:
    for dtype in calls.dtypes(implementation):
        checks.check_finite(f"out ({dtype})", _run(implementation, dtype, GOOD)["out"])
        for what, numbers in SENSELESS.items():
            results = _run(implementation, dtype, numbers)
            for name in ("out", "lse", "dq"):
                checks.check_nan(f"{name}, {what} ({dtype})", results[name])
    for what, (q, kv) in SENSELESS.items():
        words = r"cu_seqlens_(q|kv) must (never decrease|lie in \[0, \d+\])"
        checks.check_raises(what, lambda q=q, kv=kv: PackedMask(q, kv).bind(TOKENS, KEYS), ValueError, words)


@scenario("packed-longer-than-promised", FAULT, "rows that find no room are NaN, the others right", may_crash=True)
def longer_than_promised(implementation: str) -> None:
    numbers = [0, *[2 * TOKENS] * 3], [0, *[2 * KEYS] * 3]  # and no sequence has a key, was the promise
    for dtype in calls.dtypes(implementation):
        right, found = (_run(implementation, dtype, numbers, longest, times=2) for longest in (None, 0))
        poisoned = np.isnan(found["out"]).all((1, 2))
        assert poisoned.any(), "every row found room: the case shows nothing"
        for name in ("out", "lse", "dq"):
            checks.check_nan(f"{name} of poisoned rows ({dtype})", found[name][poisoned])
            checks.check_close(f"{name} of the others ({dtype})", found[name][~poisoned], right[name][~poisoned], dtype)


@scenario("packed-no-tokens", "zero-size batch, heads or lengths", "empty or zero result, no launch")
def no_tokens(implementation: str) -> None:
    for dtype in calls.dtypes(implementation):
        results = _run(implementation, dtype, ([0, 0, 0, 0], [0, 100, 100, 256]))
        for name in ("out", "dq", "dk", "dv"):
            checks.check_equal(f"{name} ({dtype})", results[name], 0)
        checks.check_equal(f"lse ({dtype})", results["lse"], -np.inf)


@scenario("packed-arguments", "wrong dtype, rank, head size, GQA ratio", "an error that names argument and remedy")
def arguments(implementation: str) -> None:
    query, key = (np.zeros((n, 2, 16), np.float32) for n in (TOKENS, KEYS))
    mistakes: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "a batch": ({"query": query[None]}, ValueError, r"TNH.*query\[0\]"),
        "floating numbers": ({"cu_seqlens_q": np.array([0.0, 1.0])}, TypeError, r"cu_seqlens_q must hold integers"),
        "a matrix of numbers": ({"cu_seqlens_kv": np.zeros((1, 4), int)}, ValueError, r"cu_seqlens_kv is \[sequences"),
        "another number of sequences": ({"cu_seqlens_kv": np.array([0, 1])}, ValueError, r"same number of sequences"),
        "no numbers of keys": ({"cu_seqlens_kv": None}, ValueError, r"cu_seqlens_kv is given where"),
        "a bound mask": ({"mask": CausalMask().bind(TOKENS)}, ValueError, r"got a BlockMask; bind PackedMask"),
        "an array": ({"mask": np.zeros((TOKENS, KEYS), bool)}, TypeError, r"mask is a lazy mask.*ArrayMask"),
        "a negative promise": ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q must be at least 0"),
        "another alignment": ({"alignment": "right"}, ValueError, r"'top_left' or 'bottom_right'"),
    }
    good = {"query": query, "key": key, "value": key, "cu_seqlens_q": GOOD[0], "cu_seqlens_kv": GOOD[1]}
    for what, (changes, error, words) in mistakes.items():
        call = functools.partial(packed_attention, **{**good, **changes}, implementation=implementation)
        checks.check_raises(what, functools.partial(jax.eval_shape, call), error, words)


SCENARIOS: tuple[Scenario, ...] = (senseless, longer_than_promised, no_tokens, arguments)
