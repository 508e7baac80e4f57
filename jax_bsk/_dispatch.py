"""Which implementation takes a call: the only place that knows what each one can and cannot do.

Between `attention` (what was asked) and the implementations. A refusal is one sentence with its remedy; the automatic
choice collects the sentences and says them once, a named implementation raises them.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Literal

import jax

from jax_bsk import _compat, _ffi
from jax_bsk._errors import FallbackWarning, UnsupportedError

Implementation = Literal["cpu", "cuda", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "cuda", "xla")
NATIVE: tuple[Implementation, ...] = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """What an implementation must know of a call to accept or refuse it.

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


def choose(implementation: str | None, facts: AttentionFacts) -> tuple[Implementation, bool]:
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


def _automatic(facts: AttentionFacts) -> Implementation:
    platform = _compat.default_platform()
    if platform in NATIVE:
        reasons = refusals(platform, facts)
        if not reasons:
            return platform  # type: ignore[return-value]
    else:
        reasons = [f"jax_bsk has no native kernel for {platform}."]
    if tuple(reasons) not in _already_said:
        _already_said.add(tuple(reasons))
        warnings.warn(
            "jax_bsk.sparse_attention uses its slower pure-JAX implementation: "
            + " ".join(reasons)
            + " (Pass implementation='xla' to choose it on purpose.)",
            FallbackWarning,
            stacklevel=4,
        )
    return "xla"


def unavailable(implementation: str) -> list[str]:
    """Why an implementation cannot run here at all; empty when it can."""
    if implementation == "xla":
        return []
    library = _ffi.library(implementation)
    reasons = [] if library.usable else [_sentence(library.problem or "")]
    if implementation == "cuda":
        reasons += _cuda_device_problem(library.info.get("min_compute_capability", 0))
    return reasons


def refusals(implementation: str, facts: AttentionFacts) -> list[str]:
    """Why an implementation cannot take a call; empty when it can."""
    if implementation == "xla":
        return []
    reasons = unavailable(implementation)
    info = _ffi.library(implementation).info
    if facts.bias:
        reasons.append("The native kernels take no bias; use implementation='xla', or express it as a mask.")
    if not info or not _ffi.library(implementation).usable:  # another version's may say other things of itself
        return reasons
    if facts.dtype not in info["dtypes"]:
        reasons.append(f"Its kernels take {', '.join(info['dtypes'])}, got {facts.dtype}; cast the inputs.")
    for name, size in (("query's", facts.head_dim), ("value's", facts.value_dim)):
        if size > info["max_head_dim"]:
            reasons.append(f"The {name} head size is at most {info['max_head_dim']}, got {size}.")
        elif size % info.get("head_dim_multiple", 1) != 0:
            reasons.append(f"The {name} head size is a multiple of {info['head_dim_multiple']}, got {size}; pad it.")
    for block in dict.fromkeys((facts.block_q, facts.block_kv)):
        if "blocks" in info and block not in info["blocks"]:
            reasons.append(f"Block sizes are {' or '.join(map(str, info['blocks']))}, got {block}; rebuild the mask.")
        elif block > info.get("max_block", block):
            reasons.append(f"Block sizes are at most {info['max_block']}, got {block}; rebuild the mask.")
    return reasons


def _cuda_device_problem(least: int) -> list[str]:
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return ["JAX sees no CUDA device; install jax[cuda13] on a machine with an NVIDIA GPU, or leave it out."]
    capability = str(device.compute_capability)
    if int(capability.replace(".", "")) < least:
        return [f"The GPU has compute capability {capability}; the kernels need {least / 10} or later."]
    return []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
