"""Which implementation takes a call.

Between the public functions (what was asked) and the implementations; the `refusals` of each operation say what its
kernels cannot take. A refusal is one sentence with its remedy. The automatic choice collects the sentences and says
them once, a named implementation raises them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax

from jax_bsk.core import compat, library
from jax_bsk.core.errors import FallbackWarning, UnsupportedError

Implementation = Literal["cpu", "cuda", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "cuda", "xla")
NATIVE: tuple[Implementation, ...] = ("cpu", "cuda")


class Facts(Protocol):
    """What an implementation must know of a call to accept or refuse it."""

    @property
    def function(self) -> str:
        """The public function's name."""
        ...

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        """Why a native library's kernels cannot take the call, from what the library says of itself."""
        ...


def choose(implementation: str | None, facts: Facts) -> tuple[Implementation, bool]:
    """Picks the implementation of a call.

    Args:
      implementation: A name, or None for the platform's native kernel where it can take the call, else "xla".
      facts: The call.

    Returns:
      The implementation, and whether it was named (so the call may be compiled for no other platform).

    Raises:
      ValueError: No such implementation.
      UnsupportedError: The named implementation cannot take the call.
    """
    if implementation is None:
        return _automatic(facts), False
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {(None, *IMPLEMENTATIONS)}, got {implementation!r}")
    reasons = refusals(implementation, facts)
    if reasons:
        raise UnsupportedError(implementation, reasons)
    return implementation, True


def choose_native(implementation: str | None, facts: Facts, argument: str) -> tuple[Implementation, bool]:
    """Picks the implementation of a call that only native kernels can take; see `choose`.

    Args:
      implementation: A name, or None for the platform's native kernel.
      facts: The call.
      argument: Name of the argument that "xla" does not take.
    """
    name = compat.default_platform() if implementation is None else implementation
    if name in NATIVE:
        reasons = refusals(name, facts)
    else:
        reasons = [f"{argument} needs a native kernel, of which {name} has none; use jit without a shard_map."]
    if reasons:
        raise UnsupportedError(implementation, reasons)
    return choose(name, facts)[0], implementation is not None


_already_said: set[tuple[str, ...]] = set()


def _automatic(facts: Facts) -> Implementation:
    platform = compat.default_platform()
    if platform in NATIVE:
        reasons = refusals(platform, facts)
        if not reasons:
            return platform  # type: ignore[return-value]
    else:
        reasons = [f"jax_bsk has no native kernel for {platform}."]
    said = (facts.function, *reasons)
    if said not in _already_said:
        _already_said.add(said)
        warnings.warn(
            f"jax_bsk.{facts.function} uses its slower pure-JAX implementation: "
            + " ".join(reasons)
            + " (Pass implementation='xla' to choose it on purpose.)",
            FallbackWarning,
            stacklevel=_level_of_caller(),
        )
    return "xla"


def _level_of_caller() -> int:
    """`stacklevel` of the first frame outside of this package, counted from the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "jax_bsk":
        level, frame = level + 1, frame.f_back
    return level


def unavailable(implementation: str) -> list[str]:
    """Why an implementation cannot run here at all; empty when it can."""
    if implementation == "xla":
        return []
    native = library.load(implementation)
    reasons = [] if native.usable else [_sentence(native.problem or "")]
    if implementation == "cuda":
        reasons += _cuda_device_problem(native.info.get("min_compute_capability", 0))
    return reasons


def refusals(implementation: str, facts: Facts) -> list[str]:
    """Why an implementation cannot take a call; empty when it can."""
    if implementation == "xla":
        return []
    native = library.load(implementation)
    # What another version's library says of itself may be other things.
    return unavailable(implementation) + facts.problems(implementation, native.info if native.usable else {})


def _cuda_device_problem(least: int) -> list[str]:
    found = capability()
    if found is None:
        return ["JAX sees no CUDA device; install jax[cuda13] on a machine with an NVIDIA GPU, or leave it out."]
    if found < least:
        return [f"The GPU has compute capability {found / 10}; the kernels need {least / 10} or later."]
    return []


def capability() -> int | None:
    """Compute capability of the first CUDA device, major * 10 + minor."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return int(str(device.compute_capability).replace(".", ""))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
