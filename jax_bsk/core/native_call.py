"""What the primitives of all native calls share: abstract values, and one lowering a platform.

Between the operations (`_attention_op`, `_matmul_native`) and `_ffi`, which names the custom calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jax_bsk.core import compat
from jax_bsk.core.errors import UnsupportedError

PLATFORMS = ("cpu", "cuda")


def like(source: Any, shape: Sequence[int], dtype: Any, dims: Sequence[int]) -> Any:
    """Abstract value with `source`'s varying axes, and in dimension i its sharding of `dims[i]` (-1: none)."""
    spec = tuple(source.sharding.spec) + (None,) * (source.ndim - len(source.sharding.spec))
    sharding = source.sharding.update(spec=PartitionSpec(*(None if d < 0 else spec[d] for d in dims)))
    return source.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def primitive(name: str, shapes: Callable[..., Any], lower: Callable[..., Any], problems: Callable[..., Any]) -> Any:
    """A primitive whose static parameter is `call`.

    Args:
      name: Of the primitive.
      shapes: Its shape rule, `shapes(*operands, call=call)`.
      lower: Its lowering, `lower(ctx, operands, call.attributes, platform)`; where `call.platform` is given, for no
        other platform.
      problems: Sentences on why a platform's kernels cannot take the call, `problems(platform, ctx.avals_in,
        call.attributes)`. What was traced for one platform may be compiled for another, as `jax.export` does.
    """
    new = compat.Primitive(name)
    new.multiple_results = True
    new.def_abstract_eval(shapes)
    # JAX's own rule for eager calls. With a `jax.jit` of one's own around `bind`, `jax.disable_jit` and the second run
    # that follows a NaN under `jax_debug_nans` (or an infinity under `jax_debug_infs`) come back here, without end.
    new.def_impl(functools.partial(compat.apply_primitive, new))
    for platform in PLATFORMS:

        def rule(ctx, *operands, call, platform=platform):
            if call.platform not in (None, platform):
                raise _compiled_for(platform, call.platform)
            if reasons := problems(platform, ctx.avals_in, call.attributes):
                raise _compiled_for(platform, platform, reasons)
            return lower(ctx, operands, call.attributes, platform)

        compat.mlir.register_lowering(new, rule, platform=platform)

    def no_rule(ctx, *operands, call):
        del operands
        platforms = " and ".join(compat.lowering_platforms(ctx)) or "another platform"
        raise _compiled_for(platforms, call.platform, [f"jax_bsk has no native kernel for {platforms}."])

    compat.mlir.register_lowering(new, no_rule)
    return new


def _compiled_for(platform: str, implementation: str | None, reasons: Sequence[str] = ()) -> UnsupportedError:
    remedy = "Pass implementation='xla', which every platform compiles."
    return UnsupportedError(implementation, [f"The computation is being compiled for {platform}.", *reasons, remedy])
