"""The native decoding call: shape rule, refusals, workspace.

Below `call`; `ffi` names its operands, `sharding` splits them over a mesh, and `xla` is the same in plain JAX.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jax_bsk.core import library
from jax_bsk.core.native_call import Avals, NativeCall, like
from jax_bsk.decode import ffi, xla
from jax_bsk.decode.refusals import DecodeFacts
from jax_bsk.decode.sharding import DecodeSplitting


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """Static part of a native call; hashable.

    Attributes:
      attributes: Numbers that travel to the kernel.
      platform: The implementation that was named, or None. "xla" is the call's fallback on every platform: so it splits
        over a mesh as the kernels do, each shard with a loop of its own. What is compiled for another platform than it
        was traced for, or cannot be taken by its kernels, falls back likewise.
    """

    attributes: ffi.DecodeAttributes
    platform: str | None = None


def _shapes(query: Any, key: Any, value: Any, *others: Any, call: DecodeCall) -> tuple[Any, ...]:
    del others, call
    lead, heads = list(range(query.ndim - 3)), query.ndim - 2
    out = (*query.shape[:-1], value.shape[-1] or key.shape[-1])
    return (
        like(query, out, query.dtype, [*lead, -1, heads, -1]),
        like(query, query.shape[:-1], np.float32, [*lead, -1, heads]),
    )


def _refusals(platform: str, avals: Avals, call: DecodeCall) -> list[str]:
    if call.platform == "xla":
        return ["Plain JAX was asked for."]
    query, key, value, _, table, *_ = avals
    value_dim, sequences = value.shape[-1] or query.shape[-1], math.prod(query.shape[:-3]) * table.shape[-2]
    facts = DecodeFacts("decode", query.dtype.name, key.dtype.name, query.shape[-1], value_dim, sequences)
    return facts.problems(platform, library.limits(platform))


FORWARD = NativeCall(
    ffi.DECODE_FORWARD,
    dims=lambda call: ffi.FORWARD,
    shapes=_shapes,
    attributes=lambda call: call.attributes.encode(),
    workspace=lambda avals, call: ffi.forward_workspace(avals, call.attributes),
    refusals=_refusals,
    fallback=lambda call, *operands: xla.forward(call.attributes, *operands),
    splitting=DecodeSplitting(),
)
