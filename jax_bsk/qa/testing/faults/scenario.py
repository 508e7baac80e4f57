"""What a scenario is. Below the modules that hold them, above `calls`, whose valid call ends every one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jax_bsk.qa.testing.faults import calls

EVERYWHERE = ("xla", "cpu", "cuda")
NATIVE = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One fault, and a function that provokes it.

    Attributes:
      name: its key, also on the command line.
      fault: which row of the fault table it belongs to, in words.
      expected: what must happen, in words.
      run: takes the name of an implementation; raises AssertionError with the values when it does not happen.
      platforms: the implementations for which the fault can be provoked.
      environment: variables its process must start with, because JAX reads them once.
      may_crash: whether a wrong answer to the fault can be the end of the process or no answer at all: then it belongs
        in a process of its own (`run_all_in_subprocesses`).
    """

    name: str
    fault: str
    expected: str
    run: Callable[[str], None]
    platforms: tuple[str, ...] = EVERYWHERE
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    may_crash: bool = False


def scenario(name: str, fault: str, expected: str, **fields: Any) -> Callable[[Callable[[str], None]], Scenario]:
    """Makes a scenario of the decorated function, which need not know JAX's settings nor make the valid call."""
    return lambda run: Scenario(name, fault, expected, _ending_with_a_valid_call(run), **fields)


def _ending_with_a_valid_call(run: Callable[[str], None]) -> Callable[[str], None]:
    @functools.wraps(run)
    def whole(implementation: str) -> None:
        with _settings(implementation):
            try:
                run(implementation)
                calls.check_valid_call(implementation)
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(f"unexpected {type(error).__name__}: {error}") from error

    return whole


@contextlib.contextmanager
def _settings(implementation: str) -> Iterator[None]:
    """JAX as the scenarios and their references expect it, whatever the process has chosen."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.default_matmul_precision("highest"))  # a GPU's float32 products are rounded otherwise
        if implementation in NATIVE:
            stack.enter_context(jax.default_device(jax.devices(implementation)[0]))
        yield
