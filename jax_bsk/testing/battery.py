"""One case through one implementation, judged against the oracle: the battery that every implementation passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.testing import tolerance
from jax_bsk.testing.cases import Case, Inputs, make_inputs
from jax_bsk.testing.oracle import attention_oracle

# (query, key, value, block_mask, *, bias, lengths, sinks, scale, soft_cap) -> out [B, T, N, Hv], lse [B, N, T]
AttentionFn = Callable[..., tuple[Any, Any]]
_NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


class Mismatch(AssertionError):
    """A case outside the tolerance rule; the message has every figure, the case, and the command that repeats it."""


def run_case(
    case: Case, attention_fn: AttentionFn, *, gradients: bool = True, traced_mask: bool = False, command: str = ""
) -> str:
    """Runs ``case`` through ``attention_fn`` under ``jit`` and judges out, lse and the gradients.

    Args:
        case: what to run.
        attention_fn: arguments and results as ``sparse_attention_xla``; ``from_public`` makes one of the public call.
        gradients: whether to judge gradients too (of query, key, value and sinks, for cotangents of out and lse).
        traced_mask: whether the mask is an argument of the jitted function instead of a constant in it.
        command: appended to the repro line.

    Returns:
        The report, a line a result.

    Raises:
        Mismatch: a result is outside the tolerance rule.
    """
    inputs = make_inputs(case)
    extra: dict[str, Any] = {"lengths": inputs.lengths, "scale": inputs.scale, "soft_cap": inputs.soft_cap}
    oracle = attention_oracle(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.dense,
        bias=inputs.bias,
        sinks=inputs.sinks,
        **extra,
        **_cotangents(inputs) if gradients else {},
    )
    reference = _run(tolerance.dense_attention, inputs, inputs.dense, extra, gradients, traced_mask=True)
    candidate = _run(attention_fn, inputs, inputs.mask, extra, gradients, traced_mask=traced_mask)
    expected_dtypes = {"out": case.dtype, "lse": "float64" if case.dtype == "float64" else "float32"}
    comparisons, problems = [], []
    for name, expected in oracle.values.items():
        if name in expected_dtypes and candidate[name].dtype != jnp.dtype(expected_dtypes[name]):
            problems.append(f"{name} is {candidate[name].dtype}, expected {expected_dtypes[name]}")
        comparisons.append(
            tolerance.compare(
                name,
                candidate[name],
                expected,
                reference[name],
                oracle.magnitudes[name],
                dtype=expected_dtypes["lse"] if name == "lse" else case.dtype,
                gradient=name not in expected_dtypes,
                reach=oracle.reach[name],
            )
        )
    report = "\n".join([str(c) for c in comparisons] + problems)
    if problems or not all(c.ok for c in comparisons):
        raise Mismatch(f"outside the tolerance rule\n{report}\n{case}\nrepro: {case.repro} {command}".rstrip())
    return report


def from_public(implementation: str | None) -> AttentionFn:
    """The public ``sparse_attention`` with the arguments and results that ``run_case`` calls for."""
    from jax_bsk import sparse_attention  # not at the top: the kit can judge an implementation without the rest

    def attention(query, key, value, mask, *, bias, lengths, sinks, scale, soft_cap):
        batch = query.shape[0]
        q_lengths, kv_lengths = (None, None) if lengths is None else jnp.broadcast_to(lengths, (batch, 2)).T
        out, lse = sparse_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            query_seq_lengths=q_lengths,
            key_value_seq_lengths=kv_lengths,
            logits_soft_cap=soft_cap,
            sinks=sinks,
            implementation=implementation,  # pyright: ignore[reportArgumentType]
            return_residual=True,
        )
        return out, jnp.swapaxes(lse, 1, 2)

    return attention


def _cotangents(inputs: Inputs) -> dict[str, Any]:
    return {"dout": inputs.dout, "dlse": inputs.dlse}


def _run(attention_fn, inputs: Inputs, mask, extra, gradients: bool, *, traced_mask: bool) -> dict[str, np.ndarray]:
    """Named results of one jitted call: out, lse and gradients."""
    present = {name: x for name, x in zip(_NAMES, inputs.operands, strict=True) if x is not None}

    def forward(present, mask):
        query, key, value, bias, sinks = (present.get(name) for name in _NAMES)
        return attention_fn(query, key, value, mask, bias=bias, sinks=sinks, **extra)

    def call(present, mask, dout, dlse):
        if not gradients:
            out, lse = forward(present, mask)
            return {"out": out, "lse": lse}
        (out, lse), pullback = jax.vjp(lambda present: forward(present, mask), present)
        # lse is the constant -inf for a row without keys: no cotangent belongs to it.
        (grads,) = pullback((dout, jnp.where(jnp.isneginf(lse), 0, dlse)))
        return {"out": out, "lse": lse} | grads

    if traced_mask:
        results = jax.jit(call)(present, jax.tree.map(jnp.asarray, mask), inputs.dout, inputs.dlse)
    else:
        results = jax.jit(lambda present, dout, dlse: call(present, mask, dout, dlse))(
            present, inputs.dout, inputs.dlse
        )
    return {name: np.asarray(x) for name, x in results.items()}
