"""What a contender is: one implementation, ready to run one case, with one way to time and to check all of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking.cases import Case, Pattern
from jax_bsk.qa.benchmarking.check import Spots, pick
from jax_bsk.qa.benchmarking.inputs import Inputs
from jax_bsk.qa.benchmarking.passes import program


class Refused(Exception):
    """Why a contender has no part in a case: a result to report, not an error."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation with the inputs of a case.

    Attributes:
      once: one call; its results in the order of the pass (`Pass.results`), ready.
      rows: the spots' rows of one such result as float64 [n, r, D], and whether all of it is finite.
      dispatch: queues dispatch number i and returns something that `jax.block_until_ready` waits for.
      calls: calls in a dispatch.
      pattern: what it computes; the case's, except of a peer that is measured without a mask.
      variant: how it is told of the mask, for the report.
    """

    once: Callable[[], tuple[Any, ...]]
    rows: Callable[[Any, Spots], tuple[np.ndarray, bool]]
    dispatch: Callable[[int], Any]
    calls: int
    pattern: Pattern
    variant: str


def of_jax(
    case: Case,
    inputs: Inputs,
    attention: Callable[..., jax.Array],
    operand: Any = None,
    *,
    variant: str,
    pattern: Pattern | None = None,
    calls: int | None = None,
) -> Contender:
    """A contender of a JAX function, in the pass that the case measures.

    Args:
      attention: (query, key, value, operand) -> out, all [B, S, H, D].
      operand: an argument of the jit, whatever the mask is made of.
      variant: as in `Contender`.
      pattern: as in `Contender`; the case's by default.
      calls: calls chained in one jit; the case's by default.
    """
    calls = case.calls if calls is None else calls
    run = program(case.measured, attention, inputs.of(case.measured), operand, calls)
    return Contender(
        once=lambda: jax.block_until_ready(run.once()),
        rows=pick,
        dispatch=lambda i: run.dispatch(),
        calls=calls,
        pattern=case.pattern if pattern is None else pattern,
        variant=variant,
    )


@functools.cache
def _imported(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a library that is missing or too old raises whatever it likes
        return f"{name} does not import: {first_line(error)}"


def need(name: str) -> Any:
    """The optional module of that name.

    Raises:
      Refused: it cannot be imported.
    """
    module = _imported(name)
    if isinstance(module, str):
        raise Refused(module)
    return module


def need_gpu() -> None:
    """Raises `Refused` where JAX runs on no NVIDIA GPU."""
    if compat.default_platform() != "cuda":
        raise Refused("it is measured on an NVIDIA GPU only")


def first_line(error: BaseException) -> str:
    """Name and first line of an error; those of compilers are pages long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
