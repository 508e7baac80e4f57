"""fa4-jax: FlashAttention-4's CuTe kernels for JAX; causal, window, dense, and documents by a mask function."""

from __future__ import annotations

from typing import Any

from jax_bsk.qa.benchmarking.attention.cases import DENSE, Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.ours import segment_ids
from jax_bsk.qa.benchmarking.attention.passes import of_jax
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need, need_gpu

NAME = "fa4-jax"


def names(case: Case) -> tuple[str, ...]:
    """Unmasked where calls are short: a mask function skips no block."""
    return (f"{NAME} unmasked",) if case.calls > 1 else (NAME,)


def make(name: str, case: Case, inputs: Inputs) -> Contender:
    """The contender."""
    need_gpu()
    fa4 = need("fa4_jax")
    unmasked = case.calls > 1
    if case.pattern.kind == "documents":
        return of_jax(
            case,
            inputs,
            lambda query, key, value, ids: fa4.flash_attn(
                query, key, value, causal=True, mask_mod=fa4.document_mask(ids)
            ),
            segment_ids(case),
            variant="causal and mask function",
        )
    patterns: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window_size": (case.pattern.window, 0)},
        "dense": {},
    }
    options = {} if unmasked else patterns.get(case.pattern.kind)
    if options is None:
        raise Refused("it skips no block for a mask function")
    return of_jax(
        case,
        inputs,
        lambda query, key, value, _: fa4.flash_attn(query, key, value, **options),
        variant="unmasked" if unmasked else "native",
        pattern=DENSE if unmasked else None,
    )
