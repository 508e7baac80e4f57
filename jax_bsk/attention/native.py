"""The native calls of attention: shape rules, refusals, workspaces.

Below `derivatives`, which makes one differentiable function of them; `ffi` names their operands and `sharding` splits
them over a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_bsk.attention import ffi, parts, refusals
from jax_bsk.attention.sharding import AttentionSplitting, BiasGradientSplitting, DeltaSplitting
from jax_bsk.context.visits import Visits
from jax_bsk.core import library
from jax_bsk.core.dims import Axes, Dims
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.native_call import Avals, NativeCall, like


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Static part of a native call; hashable, so it can be a static argument of every layer.

    Attributes:
      attributes: Numbers that travel to the kernel.
      platform: The only platform the call may be lowered for, or None for whichever has a native kernel.
      visits: Which key blocks the lists visit, or None where that is not known, or no shard may rely on it.
      axis: Mesh axes of the `shard_map` around the call along which its arrays are shards of a sequence, or None.
      term: The term of the bias whose gradient a call computes, or None for other calls.
      is_part: Whether it is one of several calls that compute a backward, whose workspace is what kernels need at
        least (or 2 GiB).
    """

    attributes: ffi.AttentionAttributes
    platform: str | None = None
    visits: Visits | None = None
    axis: Axes = None
    term: ffi.BiasTerm | None = None
    is_part: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaCall:
    """Static part of the call that computes row sums; hashable.

    Attributes:
      platform: As in `AttentionCall`.
    """

    platform: str | None = None


_COL_GATES = list(ffi.BACKWARD.operands).index("col_gates")
_FORWARD_DISTANCES = list(ffi.FORWARD.operands).index("distance_bias")
_BACKWARD_DISTANCES = list(ffi.BACKWARD.operands).index("distance_bias")


def _forward_shapes(query: Any, key: Any, value: Any, *others: Any, call: AttentionCall) -> tuple[Any, ...]:
    del key, others, call
    *lead, t, n, _ = query.shape
    dims = list(range(query.ndim))
    out = like(query, (*lead, t, n, value.shape[-1]), query.dtype, [*dims[:-1], -1])
    lse = like(query, (*lead, n, t), statistics_dtype(query.dtype), [*dims[:-3], dims[-2], dims[-3]])
    return out, lse, lse


def _delta_shapes(dout: Any, out: Any, dlse: Any, *, call: DeltaCall) -> tuple[Any, ...]:
    del dout, dlse, call
    *lead, t, n, _ = out.shape
    dims = list(range(out.ndim))
    return (like(out, (*lead, n, t), statistics_dtype(out.dtype), [*dims[:-3], dims[-2], dims[-3]]),)


def _delta_refusals(platform: str, avals: Avals, call: DeltaCall) -> list[str]:
    del call
    return refusals.type_problems(avals[1].dtype.name, library.limits(platform))


def _backward_shapes(*operands: Any, call: AttentionCall) -> tuple[Any, ...]:
    del call
    return tuple(like(x, x.shape, x.dtype, range(x.ndim)) for x in (*operands[1:4], operands[_COL_GATES]))


def _bias_gradient_dims(call: AttentionCall) -> Dims:
    assert call.term is not None
    return ffi.BIAS_GRADIENT[call.term]


def _bias_gradient_shapes(*operands: Any, call: AttentionCall) -> tuple[Any, ...]:
    dims = _bias_gradient_dims(call)
    term = operands[list(dims.operands).index(dims.like["dbias"])]
    if call.term is not ffi.BiasTerm.DISTANCES:
        return (like(term, term.shape, term.dtype, range(term.ndim)),)
    *lead, length = term.shape
    return (like(term, (*lead, 2, length), term.dtype, [*range(term.ndim - 1), -1, term.ndim - 1]),)


def _refusals(platform: str, query: Any, value: Any, call: AttentionCall) -> list[str]:
    facts = refusals.AttentionFacts(
        dtype=query.dtype.name,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        block_q=call.attributes.block_q,
        block_kv=call.attributes.block_kv,
    )
    return facts.problems(platform, library.limits(platform))


def _forward_workspace(avals: Avals, call: AttentionCall) -> int:
    query, key, value = (x.shape for x in avals[:3])
    blocks = call.attributes.block_q, call.attributes.block_kv
    return ffi.forward_workspace(query, key, value[-1], blocks, avals[_FORWARD_DISTANCES].shape)


def _backward_workspace(avals: Avals, call: AttentionCall) -> int:
    _, query, key, *_ = (x.shape for x in avals)
    if call.is_part:
        query = (*query[:-1], 0)  # of which kernels would have twice the gradient in float32
    blocks = call.attributes.block_q, call.attributes.block_kv
    gates, distances = avals[_COL_GATES].shape, avals[_BACKWARD_DISTANCES].shape
    return ffi.backward_workspace(query, key, avals[8].shape, blocks, gates, distances)


def _backward_in_parts(platform: str, avals: Avals, call: AttentionCall) -> Callable[..., list[jax.Array]] | None:
    """The same backward as calls of parts, where one call would need more memory than it should."""
    if call.is_part or platform not in parts.BOUNDS:
        return None
    shapes = {name: x.shape for name, x in zip(ffi.BACKWARD.operands, avals, strict=True)}
    group = shapes["query"][-2] // max(1, shapes["key"][-2])
    blocks = shapes["row_offsets"][-1] - 1, shapes["col_offsets"][-1] - 1
    sizes = call.attributes.block_q, call.attributes.block_kv
    cut = parts.division(parts.BOUNDS[platform], group, blocks, shapes["kv_blocks"][-1], sizes)
    if cut is None:
        return None
    bind = functools.partial(BACKWARD.bind, dataclasses.replace(call, is_part=True))

    return lambda *operands: parts.run(bind, ffi.BACKWARD, cut, operands)


FORWARD = NativeCall(
    ffi.ATTENTION_FORWARD,
    dims=lambda call: ffi.FORWARD,
    shapes=_forward_shapes,
    attributes=lambda call: call.attributes.encode(),
    workspace=_forward_workspace,
    refusals=lambda platform, avals, call: _refusals(platform, avals[0], avals[2], call),
    splitting=AttentionSplitting(),
)
DELTA = NativeCall(
    ffi.ATTENTION_DELTA,
    dims=lambda call: ffi.DELTA,
    shapes=_delta_shapes,
    attributes=lambda call: {},
    refusals=_delta_refusals,
    splitting=DeltaSplitting(),
)
BACKWARD = NativeCall(
    ffi.ATTENTION_BACKWARD,
    dims=lambda call: ffi.BACKWARD,
    shapes=_backward_shapes,
    attributes=lambda call: call.attributes.encode(),
    workspace=_backward_workspace,
    workspace_dtype=np.uint8,
    refusals=lambda platform, avals, call: _refusals(platform, avals[1], avals[3], call),
    adapt=_backward_in_parts,
    splitting=AttentionSplitting(),
)
BIAS_GRADIENT = NativeCall(
    ffi.ATTENTION_BIAS_GRADIENT,
    dims=_bias_gradient_dims,
    shapes=_bias_gradient_shapes,
    attributes=lambda call: {**call.attributes.encode(), "term": np.int64(call.term)},
    refusals=lambda platform, avals, call: _refusals(platform, avals[1], avals[3], call),
    splitting=BiasGradientSplitting(),
)
