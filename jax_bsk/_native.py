"""What the primitives of all native calls share: abstract values, and one lowering a platform.

Between the operations (`_attention_op`, `_matmul_native`) and `_ffi`, which names the custom calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jax_bsk import _compat
from jax_bsk._errors import UnsupportedError

PLATFORMS = ("cpu", "cuda")


def like(source: Any, shape: Sequence[int], dtype: Any, dims: Sequence[int]) -> Any:
    """Abstract value with `source`'s varying axes, and in dimension i its sharding of `dims[i]` (-1: none)."""
    spec = tuple(source.sharding.spec) + (None,) * (source.ndim - len(source.sharding.spec))
    sharding = source.sharding.update(spec=PartitionSpec(*(None if d < 0 else spec[d] for d in dims)))
    return source.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def primitive(name: str, shapes: Callable[..., Any], lower: Callable[..., Any]) -> Any:
    """A primitive whose static parameter is `call`.

    Args:
      name: Of the primitive.
      shapes: Its shape rule, `shapes(*operands, call=call)`.
      lower: Its lowering, `lower(ctx, operands, call.attributes, platform)`; where `call.platform` is given, for no
        other platform.
    """
    new = _compat.Primitive(name)
    new.multiple_results = True
    new.def_abstract_eval(shapes)
    # One function for all calls: jit finds what it has compiled by the identity of its function.
    new.def_impl(jax.jit(lambda *args, call: new.bind(*args, call=call), static_argnames="call"))
    for platform in PLATFORMS:

        def rule(ctx, *operands, call, platform=platform):
            if call.platform not in (None, platform):
                raise UnsupportedError(call.platform, [f"The computation is being compiled for {platform}."])
            return lower(ctx, operands, call.attributes, platform)

        _compat.mlir.register_lowering(new, rule, platform=platform)
    return new
