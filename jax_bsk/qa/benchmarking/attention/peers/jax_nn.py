"""`jax.nn.dot_product_attention`: cuDNN, with its own masks where it has them, and XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.qa.benchmarking.attention.cases import DENSE, Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.ours import segment_ids
from jax_bsk.qa.benchmarking.attention.passes import Pass, of_jax
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need_gpu

MOST_LOGITS = 20e9  # bytes of float32 logits that XLA may hold
# A dense mask is S^2 numbers, and a bias of as many in cuDNN: with gradients more time and memory than it tells.
LONGEST_DENSE_MASK_WITH_GRADIENTS = 16384
XLA_CALLS = 10  # chained calls: XLA's programs grow with them, and its calls are long enough


def names(case: Case) -> tuple[str, ...]:
    """cuDNN without the mask too where calls are so short that skipping blocks need not pay."""
    return ("cudnn", "cudnn unmasked", "xla") if case.calls > 1 else ("cudnn", "xla")


def native(case: Case) -> dict[str, Any] | None:
    """Arguments that make it apply the pattern by itself, or None."""
    return {
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "local_window_size": (case.pattern.window, 0)},
        "dense": {},
    }.get(case.pattern.kind)


def dense_mask(case: Case) -> jax.Array:
    """The boolean mask [1, 1, S, S].

    Raises:
      Refused: it is too large for a pass with gradients.
    """
    if case.measured is not Pass.FORWARD and case.length > LONGEST_DENSE_MASK_WITH_GRADIENTS:
        raise Refused("its dense mask is S x S numbers, and so is the bias made of it")
    positions = jnp.arange(case.length)
    return jax.jit(lambda i: case.pattern.attends(i[:, None], i[None, :], case.length, jnp)[None, None])(positions)


def make(name: str, case: Case, inputs: Inputs) -> Contender:
    """The contender of that name."""
    if name != "xla":
        need_gpu()
    matrices = 1 if case.measured is Pass.FORWARD else 2  # probabilities, and their gradient
    logits = matrices * 4 * case.batch * case.heads * case.length**2
    if name == "xla" and logits > MOST_LOGITS:
        raise Refused(f"its logits are more than {MOST_LOGITS / 1e9:.0f} GB")
    implementation: Any = "xla" if name == "xla" else "cudnn"
    calls = min(case.calls, XLA_CALLS) if name == "xla" else case.calls
    attend = jax.nn.dot_product_attention

    options = {} if name == "cudnn unmasked" else native(case)
    if options is not None:
        return of_jax(
            case,
            inputs,
            lambda query, key, value, _: attend(query, key, value, implementation=implementation, **options),
            variant="unmasked" if name == "cudnn unmasked" else "native",
            pattern=DENSE if name == "cudnn unmasked" else None,
            calls=calls,
        )
    if case.traced:

        def packed(query, key, value, ids):
            q, kv = jnp.arange(case.length)[:, None], jnp.arange(case.length)[None]
            mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (q >= kv)[None, None]
            return attend(query, key, value, mask=mask, implementation=implementation)

        return of_jax(case, inputs, packed, segment_ids(case), variant="dense mask built in the jit", calls=calls)
    return of_jax(
        case,
        inputs,
        lambda query, key, value, mask: attend(query, key, value, mask=mask, implementation=implementation),
        dense_mask(case),
        variant="dense mask",
        calls=calls,
    )
