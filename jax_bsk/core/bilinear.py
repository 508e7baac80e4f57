"""Primitives that are linear in each of their first two operands, with every transformation of JAX.

Stands below `matmul.products`, which gives the two products as such primitives. What the other operands hold (lists of
integers) has no derivative. A primitive's derivatives are given as calls of such primitives, so that they nest: forward
mode, reverse mode, `jax.linear_transpose` and any mixture of them.

`vmap` adds leading dimensions to the operands. Each factor for itself, and the other operands together, have all of
them or ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import compat
from jax_bsk.core.compat import ad, batching, mlir

FACTORS = 2


class BilinearPrimitive:
    """A primitive with one result whose first two operands are its factors.

    Args:
      name: Name of the primitive.
      ranks: Ranks of the two factors, without leading dimensions; all other operands have rank 1.
      shapes: Its shape rule, `shapes(*operands, call=call)`, with leading dimensions.
      run: What it computes, `run(call, *operands)` to the result, with leading dimensions.
      transposes: For each factor its cotangent, `transpose(call, cotangent, other factor, other operands)`, with all
        leading dimensions. Both factors and what is given as the cotangent have one dtype.
    """

    def __init__(
        self,
        name: str,
        ranks: tuple[int, int],
        shapes: Callable[..., Any],
        run: Callable[..., jax.Array],
        transposes: tuple[Callable[..., jax.Array], Callable[..., jax.Array]],
    ):
        self.ranks = ranks
        self._run = run
        self._transposes = transposes
        self._primitive = primitive = compat.Primitive(name)
        primitive.def_impl(functools.partial(compat.apply_primitive, primitive))
        primitive.def_abstract_eval(shapes)
        mlir.register_lowering(primitive, self._lower)
        compat.needs_devices(primitive)
        ad.primitive_jvps[primitive] = self._jvp
        ad.primitive_transposes[primitive] = self._transpose
        batching.primitive_batchers[primitive] = self._batch

    def bind(self, *operands: Any, call: Any) -> jax.Array:
        """The result for a hashable static part `call`."""
        return self._primitive.bind(*operands, call=call)

    def _lower(self, ctx: Any, *operands: Any, call: Any):
        def run(*args: Any) -> list[jax.Array]:
            return [self._run(call, *args)]

        return compat.lower_without_mesh(run, ctx, *operands)

    def _jvp(self, primals: Sequence[Any], tangents: Sequence[Any], *, call: Any):
        terms = []
        for i in range(FACTORS):
            if not isinstance(tangents[i], ad.Zero):
                operands = [*primals]
                operands[i] = tangents[i]
                terms.append(self.bind(*operands, call=call))
        out = self.bind(*primals, call=call)
        return out, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out)

    def _transpose(self, cotangent: Any, *operands: Any, call: Any):
        results: list[Any] = [None] * len(operands)
        if isinstance(cotangent, ad.Zero):
            return results
        (linear,) = [i for i in range(FACTORS) if ad.is_undefined_primal(operands[i])]
        other, wanted = operands[1 - linear], operands[linear].aval
        cotangent = cotangent.astype(other.dtype)
        found = self._transposes[linear](call, cotangent, other, operands[FACTORS:])
        shared = [i for i in range(found.ndim - self.ranks[linear]) if wanted.shape[i] == 1 != found.shape[i]]
        results[linear] = found.sum(shared, keepdims=True) if shared else found
        return results

    def _batch(self, operands: Sequence[Any], dims: Sequence[int | None], *, call: Any):
        (size, *_) = {x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None}
        moved = [x[None] if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
        lists = moved[FACTORS:]
        if any(d is not None for d in dims[FACTORS:]):
            lists = [jnp.broadcast_to(x, (size, *x.shape[1:])) for x in lists]
        return self.bind(*moved[:FACTORS], *lists, call=call), 0


def lead_of(operands: Sequence[Any], ranks: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the leading dimensions, along each of which an operand has all or 1; they may be 0."""
    return np.broadcast_shapes(*(x.shape[: x.ndim - rank] for x, rank in zip(operands, ranks, strict=True)))


def one_by_one(function: Callable[..., Any], ranks: Sequence[int], *operands: Any) -> Any:
    """A function of operands without leading dimensions, mapped over those that these have.

    Args:
      function: (operands) to an array or a pytree of arrays.
      ranks: Rank of each operand without leading dimensions.
      *operands: Arrays [*leading, ...], of which each has all of a leading dimension or 1.

    Returns:
      What the function returns, each array with all leading dimensions.
    """
    lead = lead_of(operands, ranks)
    if not lead:
        return function(*operands)
    axes = [None if x.shape[0] == 1 else 0 for x in operands]
    if all(axis is None for axis in axes):
        results = one_by_one(function, ranks, *(x[0] for x in operands))
        return jax.tree.map(lambda x: x[None], results)
    rest = functools.partial(one_by_one, function, ranks)
    return jax.vmap(rest, axes)(*(x[0] if axis is None else x for x, axis in zip(operands, axes, strict=True)))
