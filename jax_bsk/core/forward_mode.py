"""A function whose tangents one implementation computes and whose cotangents another: forward mode for native kernels.

Below `attention.derivatives`, whose kernels have a backward and no forward-mode derivative. `define` binds a primitive
in the tangents, in place of the linear map. Where the primitive is evaluated (`jax.jvp`, `jacfwd`, `linearize`), it is
lowered to the tangents in plain JAX. Where it is transposed (`jax.grad` and everything else in reverse mode), the
pullback takes its place, and the tangents are never even traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.core import compat
from jax_bsk.core.native_call import like


def define(name: str, pushforward: Callable[..., Any], pullback: Callable[..., Any]) -> Callable[..., Any]:
    """A linear map of tangents.

    Args:
      name: Name of the primitive.
      pushforward: `pushforward(static, residuals, tangents)`, the tangents of the results, in plain JAX.
      pullback: `pullback(static, residuals, present, cotangents, zero)`, the cotangents of the tangents that `present`
        says are there; `zero` says which of the cotangents are known to be zeros.

    Returns:
      `apply(static, residuals, results, tangents)`, with residuals a list of arrays, the last of which are the results,
      `results` their ranks without axes of `vmap`, and tangents a list of arrays or None. Returns tangents of the
      results.
    """
    primitive = compat.Primitive(name)
    primitive.multiple_results = True

    def split(args: Sequence[Any], present: Sequence[bool]) -> tuple[Sequence[Any], list[Any]]:
        tangents = iter(args[len(args) - sum(present) :])
        return args[: len(args) - sum(present)], [next(tangents) if there else None for there in present]

    def evaluate(*args: Any, static: Any, ranks: Any, present: Any, axes: Any) -> Sequence[Any]:
        del ranks

        def function(*args: Any) -> Sequence[Any]:
            return pushforward(static, *split(args, present))

        for size, in_axes in axes:
            function = jax.vmap(function, in_axes, axis_size=size)
        return function(*args)

    @primitive.def_abstract_eval
    def _shapes(*args: Any, static: Any, ranks: Any, present: Any, axes: Any) -> list[Any]:
        del static
        residuals, _ = split(args, present)
        lead = [size for size, _ in reversed(axes)]

        def shape(result: Any, rank: int) -> Any:
            dims = [-1] * len(lead) + list(range(result.ndim - rank, result.ndim))
            return like(result, (*lead, *result.shape[result.ndim - rank :]), result.dtype, dims)

        return [shape(x, rank) for x, rank in zip(residuals[len(residuals) - len(ranks) :], ranks, strict=True)]

    def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        count = len(primals) - sum(params["present"])
        if all(type(t) is compat.ad.Zero for t in tangents[:count]):  # linear in the others
            changes = [compat.ad.instantiate_zeros(t) for t in tangents[count:]]
            return primitive.bind(*primals, **params), primitive.bind(*primals[:count], *changes, **params)
        moving = [i for i, t in enumerate(tangents) if type(t) is not compat.ad.Zero]

        def function(*some: Any) -> Sequence[Any]:
            args = list(primals)
            for i, x in zip(moving, some, strict=True):
                args[i] = x
            return evaluate(*args, **params)

        return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])

    def _transpose(
        cotangents: Sequence[Any], *args: Any, static: Any, ranks: Any, present: Any, axes: Any
    ) -> list[Any]:
        del ranks
        count = len(args) - sum(present)
        zero = tuple(type(x) is compat.ad.Zero for x in cotangents)
        cotangents = [compat.ad.instantiate_zeros(x) for x in cotangents]

        def function(*args: Any) -> Sequence[Any]:
            return pullback(static, args[:count], present, args[count:], zero)

        for size, in_axes in axes:
            function = _mapped_pullback(function, size, in_axes, count, len(cotangents))
        results = function(*args[:count], *cotangents)
        unknown = [compat.ad.is_undefined_primal(x) for x in args[count:]]
        return [None] * count + [x if wanted else None for x, wanted in zip(results, unknown, strict=True)]

    def _batch(args: Sequence[Any], dims: Sequence[int | None], *, axes: Any, **params: Any) -> tuple[Any, Any]:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
        level = size, tuple(None if d is None else 0 for d in dims)
        results = primitive.bind(*moved, axes=(*axes, level), **params)
        return results, [0] * len(results)

    primitive.def_impl(functools.partial(compat.apply_primitive, primitive))
    compat.mlir.register_lowering(primitive, compat.mlir.lower_fun(evaluate, multiple_results=True))
    compat.ad.primitive_jvps[primitive] = _jvp
    compat.ad.primitive_transposes[primitive] = _transpose
    compat.batching.primitive_batchers[primitive] = _batch

    def apply(static: Any, residuals: Sequence[Any], ranks: tuple[int, ...], tangents: Sequence[Any]) -> Sequence[Any]:
        present = tuple(t is not None for t in tangents)
        given = [t for t in tangents if t is not None]
        return primitive.bind(*residuals, *given, static=static, ranks=ranks, present=present, axes=())

    return apply


def _mapped_pullback(function: Any, size: int, in_axes: Sequence[int | None], count: int, cotangents: int) -> Any:
    """A pullback under one `vmap` of the tangents: what was shared along it has the sum of the cotangents."""
    mapped = jax.vmap(function, (*in_axes[:count], *[0] * cotangents), axis_size=size)

    def total(*args: Any) -> list[Any]:
        return [x if a == 0 else x.sum(0) for x, a in zip(mapped(*args), in_axes[count:], strict=True)]

    return total
