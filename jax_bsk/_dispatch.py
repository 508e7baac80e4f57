"""Which implementation takes a call: the only place that knows what each one can and cannot do.

Between `attention` and `matmul` (what was asked) and the implementations. A refusal is one sentence with its remedy;
the automatic choice collects the sentences and says them once, a named implementation raises them.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax

from jax_bsk import _compat, _ffi
from jax_bsk._errors import FallbackWarning, UnsupportedError

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


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """A call of attention.

    Attributes:
      dtype: Name of the inputs' type.
      head_dim: Head size of query and key.
      value_dim: Head size of value.
      block_q: Queries a block.
      block_kv: Keys a block.
      bias: Whether a bias is added to the logits.
    """

    dtype: str
    head_dim: int
    value_dim: int
    block_q: int
    block_kv: int
    bias: bool

    function = "sparse_attention"

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        del implementation
        reasons = []
        if self.bias:
            reasons.append("The native kernels take no bias; use implementation='xla', or express it as a mask.")
        if not info:
            return reasons
        if self.dtype not in info["dtypes"]:
            reasons.append(f"Its kernels take {', '.join(info['dtypes'])}, got {self.dtype}; cast the inputs.")
        for name, size in (("query's", self.head_dim), ("value's", self.value_dim)):
            if size > info["max_head_dim"]:
                reasons.append(f"The {name} head size is at most {info['max_head_dim']}, got {size}.")
            elif size % info.get("head_dim_multiple", 1) != 0:
                multiple = info["head_dim_multiple"]
                reasons.append(f"The {name} head size is a multiple of {multiple}, got {size}; pad it.")
        for block in dict.fromkeys((self.block_q, self.block_kv)):
            if "blocks" in info and block not in info["blocks"]:
                reasons.append(
                    f"Block sizes are {' or '.join(map(str, info['blocks']))}, got {block}; rebuild the mask."
                )
            elif block > info.get("max_block", block):
                reasons.append(f"Block sizes are at most {info['max_block']}, got {block}; rebuild the mask.")
        return reasons


@dataclasses.dataclass(frozen=True)
class MatmulFacts:
    """A call of a block-sparse matrix product.

    Attributes:
      function: The public function's name.
      dtype: Name of the factors' common type.
      block_size: (bm, bk).
    """

    function: str
    dtype: str
    block_size: tuple[int, int]

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        if not info:
            return []
        reasons = []
        if self.dtype not in info["matmul_dtypes"]:
            reasons.append(f"Its kernels take {', '.join(info['matmul_dtypes'])}, got {self.dtype}; cast the factors.")
        for block in dict.fromkeys(self.block_size):
            if "matmul_blocks" in info and block not in info["matmul_blocks"]:
                reasons.append(f"Block sizes are {' or '.join(map(str, info['matmul_blocks']))}, got {block}.")
            elif block > info.get("matmul_max_block", block):
                reasons.append(f"Block sizes are at most {info['matmul_max_block']}, got {block}.")
        needed = info.get("matmul_compute_capability")
        if implementation == "cuda" and needed and (found := _capability()) not in (None, needed):
            reasons.append(f"The products need compute capability {needed / 10}, and the GPU has {found / 10}.")
        return reasons


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


_already_said: set[tuple[str, ...]] = set()


def _automatic(facts: Facts) -> Implementation:
    platform = _compat.default_platform()
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
    library = _ffi.library(implementation)
    reasons = [] if library.usable else [_sentence(library.problem or "")]
    if implementation == "cuda":
        reasons += _cuda_device_problem(library.info.get("min_compute_capability", 0))
    return reasons


def refusals(implementation: str, facts: Facts) -> list[str]:
    """Why an implementation cannot take a call; empty when it can."""
    if implementation == "xla":
        return []
    library = _ffi.library(implementation)
    # What another version's library says of itself may be other things.
    return unavailable(implementation) + facts.problems(implementation, library.info if library.usable else {})


def _cuda_device_problem(least: int) -> list[str]:
    found = _capability()
    if found is None:
        return ["JAX sees no CUDA device; install jax[cuda13] on a machine with an NVIDIA GPU, or leave it out."]
    if found < least:
        return [f"The GPU has compute capability {found / 10}; the kernels need {least / 10} or later."]
    return []


def _capability() -> int | None:
    """Compute capability of the first CUDA device, major * 10 + minor."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return int(str(device.compute_capability).replace(".", ""))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
