"""One case of packed attention through one implementation, judged against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import packed_attention
from jax_bsk.qa.testing import grid, tolerance
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.oracle import attention_oracle
from jax_bsk.qa.testing.packed.cases import Case, Inputs, make_inputs, within


def judge_case(
    case: Case, implementation: Any, *, gradients: bool = True, multiprocessors: int | None = None
) -> Judgement:
    """Runs a case under `jit`, its numbers of tokens traced, and judges the results.

    It runs twice, on CUDA the second time on so many multiprocessors (`grid.limited`). There, whose kernel may be
    another, errors are judged again; elsewhere the bits must be the same.
    """
    with jax.enable_x64(case.dtype == "float64"):
        return _judge(case, implementation, gradients, multiprocessors)


def run_case(case: Case, implementation: Any, **options: Any) -> str:
    """The report of `judge_case`, whose options it takes.

    Raises:
      Mismatch: A result is outside the tolerance rule.
    """
    return judge_case(case, implementation, **options).report(f"--implementation {implementation}")


def _judge(case: Case, implementation: Any, gradients: bool, multiprocessors: int | None) -> Judgement:
    inputs = make_inputs(case)
    scale = 1 / math.sqrt(case.head_size) if case.scale is None else case.scale
    options: dict[str, Any] = {"scale": scale, "soft_cap": case.soft_cap}
    query, key, value = (x[None] for x in (inputs.query, inputs.key, inputs.value))
    cotangents: dict[str, Any] = {"dout": inputs.dout[None], "dlse": inputs.dlse.T[None]} if gradients else {}
    oracle = attention_oracle(query, key, value, inputs.dense, sinks=inputs.sinks, **options, **cotangents)
    shared = jax.jit(_call(_dense(scale, case.soft_cap), gradients))
    reference = _run(shared, inputs, inputs.dense)
    program = _program(_static(case), implementation, gradients)
    run = functools.partial(_run, program, inputs, (inputs.q_numbers, inputs.kv_numbers))
    statistics = "float64" if case.dtype == "float64" else "float32"

    def compare(results: dict[str, np.ndarray]) -> list[tolerance.Comparison]:
        return [
            tolerance.compare(
                name,
                results[name],
                expected,
                reference[name],
                oracle.magnitudes[name],
                dtype=statistics if name == "lse" else case.dtype,
                gradient=name not in ("out", "lse"),
                reach=oracle.reach[name],
            )
            for name, expected in oracle.values.items()
        ]

    first = run()
    comparisons, problems = compare(first), []
    if (first["out"].dtype, first["lse"].dtype) != (jnp.dtype(case.dtype), jnp.dtype(statistics)):
        problems.append(f"out is {first['out'].dtype} and lse {first['lse'].dtype}")
    with contextlib.nullcontext() if multiprocessors is None else grid.limited(multiprocessors):
        again = run()
    if multiprocessors is None:
        problems += [
            f"{n} has other bits when it runs again" for n, x in first.items() if x.tobytes() != again[n].tobytes()
        ]
    else:
        problems += [f"on {multiprocessors} multiprocessors: {c}" for c in compare(again) if not c.ok]
    return Judgement(case, tuple(comparisons), tuple(problems))


def _static(case: Case) -> Case:
    """The case without what its program does not depend on."""
    return dataclasses.replace(case, name="", layout="", seed=0, amplitude=0.0)


@functools.lru_cache(maxsize=8)
def _program(case: Case, implementation: Any, gradients: bool) -> Callable[..., Any]:
    longest = case.longest if case.promised else None

    def attention(query, key, value, sinks, numbers):
        return packed_attention(
            query,
            key,
            value,
            *numbers,
            mask=within(case),
            alignment="bottom_right" if case.bottom_right else "top_left",
            scale=1 / math.sqrt(case.head_size) if case.scale is None else case.scale,
            logits_soft_cap=case.soft_cap,
            sinks=sinks,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            block_size=case.block_size,
            implementation=implementation,
            return_residual=True,
        )

    return jax.jit(_call(attention, gradients))


def _dense(scale: float, soft_cap: float | None) -> Callable[..., Any]:
    def attention(query, key, value, sinks, dense):
        query, key, value = (x[None] for x in (query, key, value))
        extra = {"bias": None, "lengths": None, "sinks": sinks, "scale": scale, "soft_cap": soft_cap}
        out, lse = tolerance.dense_attention(query, key, value, dense, **extra)
        return out[0], lse[0].T

    return attention


def _call(attention: Callable[..., Any], gradients: bool) -> Callable[..., Any]:
    """(operands by gradient, mask, dout, dlse) -> named results, as packed as the operands."""

    def call(present, mask, dout, dlse):
        def forward(present):
            return attention(*(present.get(name) for name in ("dq", "dk", "dv", "dsinks")), mask)

        if not gradients:
            out, lse = forward(present)
            return {"out": out, "lse": lse}
        (out, lse), pullback = jax.vjp(forward, present)
        (found,) = pullback((dout, jnp.where(jnp.isneginf(lse), 0, dlse)))
        return {"out": out, "lse": lse, **found}

    return call


def _run(program: Callable[..., Any], inputs: Inputs, mask: Any) -> dict[str, np.ndarray]:
    """Results of the shapes that the oracle gives them, with a batch."""
    results = program(inputs.present, mask, inputs.dout, inputs.dlse)
    named = {name: np.asarray(x) for name, x in results.items()}
    named["lse"] = named["lse"].T
    return {name: x if name == "dsinks" else x[None] for name, x in named.items()}
