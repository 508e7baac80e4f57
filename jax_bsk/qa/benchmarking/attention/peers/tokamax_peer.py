"""tokamax: its Mosaic GPU kernel; causal, window, dense, and the dense boolean mask for everything else."""

from __future__ import annotations

from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import of_jax
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need, need_gpu

from .jax_nn import dense_mask, native

IMPLEMENTATION = "mosaic"


def names(case: Case) -> tuple[str, ...]:
    return ("tokamax",)


def make(name: str, case: Case, inputs: Inputs) -> Contender:
    """The contender; a call that its kernel does not take raises, as no other implementation is named."""
    need_gpu()
    attend = need("tokamax").dot_product_attention
    if case.traced:
        raise Refused("it has no segment ids; see the row with the mask prebuilt")
    options = native(case)
    if options is not None:
        return of_jax(
            case,
            inputs,
            lambda query, key, value, _: attend(query, key, value, implementation=IMPLEMENTATION, **options),
            variant="native",
        )
    return of_jax(
        case,
        inputs,
        lambda query, key, value, mask: attend(query, key, value, mask=mask, implementation=IMPLEMENTATION),
        dense_mask(case),
        variant="dense mask",
    )
