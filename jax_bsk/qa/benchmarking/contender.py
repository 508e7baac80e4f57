"""What a contender is: one implementation, ready to run one case, with one way to time and to check all of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from jax_bsk.core import compat

OURS = "jax_bsk"
MOST_SCRATCH = {"gpu": 40e9, "cpu": 2e9}  # bytes that a peer may take beyond its operands


class Refused(Exception):
    """Why a contender has no part in a case: a result to report, not an error."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation with the operands of a case.

    Attributes:
      once: one call; its results in the order of the operation, ready.
      pick: the spots of one such result as float64, and whether all of it is finite.
      dispatch: queues dispatch number i and returns something that `jax.block_until_ready` waits for.
      calls: calls in a dispatch.
      variant: how it is told of the sparsity, for the report.
      instead: what it computes in place of the case's own: a pattern without the mask, a dense W of other numbers.
      temp_bytes: scratch memory of one call, where it was asked for and is known.
    """

    once: Callable[[], tuple[Any, ...]]
    pick: Callable[[Any, Any], tuple[np.ndarray, bool]]
    dispatch: Callable[[int], Any]
    calls: int
    variant: str
    instead: Any = None
    temp_bytes: int | None = None


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


def need_memory(count: float, what: str) -> None:
    """Raises `Refused` where that many bytes are too many."""
    most = MOST_SCRATCH["cpu" if compat.default_platform() == "cpu" else "gpu"]
    if count > most:
        raise Refused(f"{what} takes {count / 1e9:.1f} GB of scratch memory, more than {most / 1e9:g} GB")


def first_line(error: BaseException) -> str:
    """Name and first line of an error; those of compilers are pages long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
