"""One case through one implementation, judged against float64: the battery that every implementation passes.

The program runs twice: the second time must give the first one's bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BSR, sampled_matmul, sparse_matmul
from jax_bsk.qa.testing import grid, tolerance
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.matmul.cases import Case, make_inputs
from jax_bsk.qa.testing.matmul.oracle import oracle


def judge_case(
    case: Case, implementation: str, *, gradients: bool = True, multiprocessors: int | None = None
) -> Judgement:
    """Runs a case under `jit` and judges its result, its gradients and their bits when it runs again.

    Args:
      case: what to run. One with a fault has no gradients: they are of lists that make no sense.
      implementation: of the public functions.
      gradients: of both factors, for a cotangent; under vmap each example's own.
      multiprocessors: on CUDA, the second run is confined to so many (`grid.limited`).
    """
    gradients = gradients and case.fault is None
    inputs = make_inputs(case)
    expected = oracle(case, inputs, gradients=gradients)
    options = case.form, case.shape, case.block_size, case.wide, case.mapped, gradients, implementation
    operands, constant = dict(inputs.operands), None
    if case.lists == "carried":
        operands["lists"] = _with_columns(case, *operands["lists"])
    elif case.lists == "constant" and "lists" not in case.mapped:
        constant = operands.pop("lists")
    program = _kept(*options) if constant is None else jax.jit(_program(*options, constant=constant))
    first = jax.block_until_ready(program(operands, inputs.cotangent))
    with contextlib.nullcontext() if multiprocessors is None else grid.limited(multiprocessors):
        again = jax.block_until_ready(program(operands, inputs.cotangent))
    elsewhere = "" if multiprocessors is None else f" on {multiprocessors} multiprocessors"
    comparisons, problems = [], []
    summed_in = np.float64 if case.dtype == "float64" else np.float32
    for name, want in expected.items():
        got = np.asarray(first[name])
        dtype = case.result_dtype if name == "out" else case.dtype
        if got.dtype != jnp.dtype(dtype):
            problems.append(f"{name} is {got.dtype}, expected {dtype}")
        if got.tobytes() != np.asarray(again[name]).tobytes():
            problems.append(f"{name} has other bits when it is computed again{elsewhere}")
        comparisons.append(
            tolerance.compare_product(name, got, want.value, want.magnitude, want.terms, summed_in=summed_in)
        )
    return Judgement(case, tuple(comparisons), tuple(problems))


def run_case(case: Case, implementation: str, *, gradients: bool = True, multiprocessors: int | None = None) -> str:
    """The report of `judge_case`.

    Raises:
      Mismatch: a result is outside the tolerance rule.
    """
    command = f"--implementation {implementation}" + ("" if gradients else " --no-gradients")
    command += "" if multiprocessors is None else f" --multiprocessors {multiprocessors}"
    judgement = judge_case(case, implementation, gradients=gradients, multiprocessors=multiprocessors)
    return judgement.report(command)


def _with_columns(case: Case, indptr: np.ndarray, indices: np.ndarray) -> tuple[Any, ...]:
    """The lists, and beside them those by columns that the host makes."""

    def columns(indptr: np.ndarray, indices: np.ndarray) -> tuple[Any, ...]:
        numbers: Any = jax.ShapeDtypeStruct((indices.size, *case.block_size), np.float32)
        return BSR(numbers, indptr, indices, case.shape).columns()

    if "lists" not in case.mapped:
        return indptr, indices, columns(indptr, indices)
    examples = [columns(*lists) for lists in zip(indptr, indices, strict=True)]
    return indptr, indices, tuple(np.stack(x) for x in zip(*examples, strict=True))


@functools.lru_cache(maxsize=4)
def _kept(*options: Any) -> Callable[..., Any]:
    """Kept for the cases that differ in data alone."""
    return jax.jit(_program(*options))


def _program(form, shape, block_size, wide, mapped, gradients, implementation, constant=None) -> Callable[..., Any]:
    """(operands, cotangents [examples, ...]) -> named results [examples, ...]; the lists may be constants."""
    options: dict[str, Any] = {"implementation": implementation}
    if wide:
        options["preferred_element_type"] = np.float32

    def matrix_of(data: Any, lists: tuple[Any, ...]) -> BSR:
        indptr, indices, *columns = lists
        return BSR(data, indptr, indices, shape, columns[0] if columns else None)

    def product(factors: dict[str, Any], lists: tuple[Any, ...]) -> jax.Array:
        if form == "sampled":
            numbers = jax.ShapeDtypeStruct((lists[1].shape[0], *block_size), factors["left"].dtype)
            return sampled_matmul(factors["left"], factors["right"], matrix_of(numbers, lists), **options).data
        matrix, dense = matrix_of(factors["data"], lists), factors["dense"]
        pair = (dense, matrix) if form.startswith("X") else (matrix, dense)
        return sparse_matmul(*pair, transpose="^T" in form, **options)

    def one(operands: dict[str, Any], cotangent: Any) -> dict[str, Any]:
        factors = {name: x for name, x in operands.items() if name != "lists"}
        places = operands["lists"] if constant is None else constant
        if not gradients:
            return {"out": product(factors, places)}
        out, pullback = jax.vjp(lambda factors: product(factors, places), factors)
        (found,) = pullback(cotangent)
        return {"out": out} | {f"d{name}": x for name, x in found.items()}

    def call(operands: dict[str, Any], cotangents: Any) -> dict[str, Any]:
        if not mapped:
            return jax.tree.map(lambda x: x[None], one(operands, cotangents[0]))
        return jax.vmap(one, ({name: 0 if name in mapped else None for name in operands}, 0))(operands, cotangents)

    return call
