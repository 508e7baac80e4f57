"""flash-attn3-jax: FlashAttention-3's Hopper kernels for JAX; causal, window, dense."""

from __future__ import annotations

from typing import Any

from jax_bsk.qa.benchmarking.attention.cases import DENSE, Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import of_jax
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need, need_gpu

NAME = "fa3-jax"


def names(case: Case) -> tuple[str, ...]:
    """Unmasked where calls are short, as it has no mask for the blocks there."""
    return (f"{NAME} unmasked",) if case.calls > 1 else (NAME,)


def make(name: str, case: Case, inputs: Inputs) -> Contender:
    """The contender."""
    need_gpu()
    flash_mha = need("flash_attn3_jax").flash_mha
    if case.head_dim != 128:
        raise Refused("its published wheels hold head size 128 only")
    unmasked = case.calls > 1
    patterns: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"window_size": (case.pattern.window, 0)},
        "dense": {},
    }
    options = {} if unmasked else patterns.get(case.pattern.kind)
    if options is None:
        raise Refused("it has no such mask")
    return of_jax(
        case,
        inputs,
        lambda query, key, value, _: flash_mha(query, key, value, **options),
        variant="unmasked" if unmasked else "native",
        pattern=DENSE if unmasked else None,
    )
