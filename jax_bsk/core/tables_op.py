"""What the native calls on block lists share: custom_vmap -> custom_partitioning -> primitive, as attention's calls.

Below `_lists_op`, which has the calls. A table is one example's and head's list; all leading dimensions of the first
operand count tables, and split over a mesh without a collective. Other operands have the same leading dimensions, or
none, and are then one for all tables.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_bsk.core import compat
from jax_bsk.core.native_call import PLATFORMS


@dataclasses.dataclass(frozen=True)
class Layout:
    """Dimensions behind those of the tables, a letter each, array by array.

    Attributes:
      operands: of those that have tables.
      shared: of the operands behind these, one for all tables.
      results: of the results, which have tables.
    """

    operands: tuple[str, ...]
    shared: tuple[str, ...]
    results: tuple[str, ...]


def tables_op(
    name: str,
    layout: Layout,
    shapes: Callable[..., Sequence[Any]],
    natively: Callable[..., Any],
    in_jax: Callable[..., Sequence[Any]],
) -> Callable[[Sequence[Any], Any], tuple[Any, ...]]:
    """A native call, as a function of its operands and its static part (hashable).

    Args:
      name: Of the primitive.
      layout: Of the arrays.
      shapes: Abstract values of the results, `shapes(*operands, call=call)`.
      natively: `natively(ctx, operands, call, platform)` lowers to the platform's call, or returns None where it cannot
        take this one.
      in_jax: The same of one table in plain JAX, `in_jax(call, *operands)`, for what has no native kernel.
    """
    primitive = compat.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(functools.partial(compat.apply_primitive, primitive))

    def all_in_jax(*operands: Any, call: Any) -> Sequence[Any]:
        one = functools.partial(in_jax, call)
        axes = (0,) * len(layout.operands) + (None,) * len(layout.shared)
        for _ in range(_tables(operands[0], layout)):
            one = jax.vmap(one, axes)
        return one(*operands)

    def lower_in_jax(ctx, *operands: Any, call: Any):
        return compat.mlir.lower_fun(functools.partial(all_in_jax, call=call), multiple_results=True)(ctx, *operands)

    def lower_natively(ctx, *operands: Any, call: Any, platform: str):
        results = natively(ctx, operands, call, platform)
        return lower_in_jax(ctx, *operands, call=call) if results is None else results

    compat.mlir.register_lowering(primitive, lower_in_jax)
    for platform in PLATFORMS:
        rule = functools.partial(lower_natively, platform=platform)
        compat.mlir.register_lowering(primitive, rule, platform=platform)

    partitioned = _partitioned(primitive, layout)

    @functools.cache
    def mapped(call: Any):
        @custom_vmap
        def function(operands):
            return partitioned(call, operands)

        @function.def_vmap
        def rule(axis_size, in_batched, operands):
            (batched,) = in_batched
            count = len(layout.operands)
            if any(batched[count:]):
                raise NotImplementedError(f"{name}: what is shared by all tables cannot be mapped over")
            moved = (
                x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, is_batched in zip(operands[:count], batched[:count], strict=True)
            )
            results = function((*moved, *operands[count:]))
            return results, tuple(True for _ in results)

        return function

    return lambda operands, call: mapped(call)(tuple(operands))


def _tables(first: Any, layout: Layout) -> int:
    """How many dimensions count tables, by the first operand."""
    return len(first.shape) - len(layout.operands[0])


def _partitioned(primitive: Any, layout: Layout):
    """custom_partitioning of `(call, operands)`: tables may be split, the other dimensions are whole."""

    @functools.partial(custom_partitioning, static_argnums=(0,))
    def partitioned(call: Any, operands):
        return tuple(primitive.bind(*operands, call=call))

    def partition(call: Any, mesh: Any, arg_shapes: Any, result_shapes: Any):
        (operands,) = arg_shapes
        bind = functools.partial(partitioned.fun, call)
        shardings = [x.sharding for x in operands]
        if not isinstance(shardings[0], NamedSharding):  # partial-manual shard_map hands out GSPMDSharding
            return mesh, bind, tuple(r.sharding for r in result_shapes), (tuple(shardings),)
        rank = _tables(operands[0], layout)
        lead = [*shardings[0].spec, *[None] * rank][:rank]
        tables, whole = NamedSharding(mesh, PartitionSpec(*lead)), NamedSharding(mesh, PartitionSpec())
        arguments = (tables,) * len(layout.operands) + (whole,) * len(layout.shared)
        return mesh, bind, (tables,) * len(layout.results), (arguments,)

    def rule(call: Any, mesh: Any, operands: Sequence[Any], results: Sequence[Any]):
        del call, mesh, results
        lead = [f"t{chr(97 + i)}" for i in range(_tables(operands[0], layout))]
        split = [" ".join([*lead, *last]) for last in layout.operands]
        words = ", ".join([*split, *[" ".join(last) for last in layout.shared]])
        made = ", ".join(" ".join([*lead, *last]) for last in layout.results)
        # In order of first appearance.
        whole = tuple(dict.fromkeys("".join([*layout.operands, *layout.shared, *layout.results])))
        return f"{words} -> {made}", {"need_replication_factors": whole}

    partitioned.def_partition(partition=partition, sharding_rule=rule)
    return partitioned
