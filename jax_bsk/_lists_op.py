"""The native transpose of block lists: custom_vmap -> custom_partitioning -> primitive, as attention's calls.

Below `masks`, which says what the key-major lists are and has them in plain JAX. A table is one example's and head's
list; all leading dimensions count tables, and split over a mesh without a collective.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_bsk import _compat, _ffi
from jax_bsk._native import PLATFORMS, like


@dataclasses.dataclass(frozen=True)
class TransposeCall:
    """Static part of a call; hashable.

    Attributes:
      columns: Columns of blocks.
      fallback: The same of one table in plain JAX, `fallback(row_offsets, kv_blocks, tiles, columns)`, for what has no
        native kernel.
    """

    columns: int
    fallback: Callable[..., tuple[Any, ...]]


def transpose(lists: tuple[Any, Any, Any], call: TransposeCall) -> tuple[Any, ...]:
    """Key-major lists, and the two permutations between the orders.

    Args:
      lists: int32 row_offsets [tables.., rows + 1], kv_blocks and tiles [tables.., capacity].
      call: Static part.

    Returns:
      col_offsets [.., columns + 1]; q_blocks, col_tiles, entries and places, all [.., capacity].
    """
    return _mapped(call)(lists)


def _shapes(offsets, ids, tiles, *, call: TransposeCall):
    del tiles
    lead = list(range(ids.ndim - 1))
    col_offsets = like(offsets, (*offsets.shape[:-1], call.columns + 1), np.int32, [*lead, -1])
    return (col_offsets, *[like(ids, ids.shape, np.int32, [*lead, -1]) for _ in range(4)])


def _in_jax(call: TransposeCall):
    def function(*lists):
        def one(*table):
            return call.fallback(*table, call.columns)

        for _ in range(lists[0].ndim - 1):
            one = jax.vmap(one)
        return one(*lists)

    return function


_transpose_p = _compat.Primitive("jax_bsk_lists_transpose")
_transpose_p.multiple_results = True
_transpose_p.def_abstract_eval(_shapes)
_transpose_p.def_impl(lambda *lists, call: jax.jit(functools.partial(_transpose_p.bind, call=call))(*lists))


def _lower_in_jax(ctx, *operands, call: TransposeCall):
    return _compat.mlir.lower_fun(_in_jax(call), multiple_results=True)(ctx, *operands)


def _lower_natively(ctx, *operands, call: TransposeCall, platform: str):
    if _ffi.takes_transpose(platform, rows=ctx.avals_in[0].shape[-1] - 1, columns=call.columns):
        return _ffi.lists_transpose(ctx, operands, call.columns)
    return _lower_in_jax(ctx, *operands, call=call)


_compat.mlir.register_lowering(_transpose_p, _lower_in_jax)
for _platform in PLATFORMS:
    _compat.mlir.register_lowering(
        _transpose_p, functools.partial(_lower_natively, platform=_platform), platform=_platform
    )


@functools.cache
def _mapped(call: TransposeCall):
    @custom_vmap
    def mapped(lists):
        return _partitioned(call, lists)

    @mapped.def_vmap
    def rule(axis_size, in_batched, lists):
        (batched,) = in_batched
        moved = (
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(lists, batched, strict=True)
        )
        results = mapped(tuple(moved))
        return results, tuple(True for _ in results)

    return mapped


@functools.partial(custom_partitioning, static_argnums=(0,))
def _partitioned(call: TransposeCall, lists):
    return tuple(_transpose_p.bind(*lists, call=call))


def _partition(call: TransposeCall, mesh: Any, arg_shapes: Any, result_shapes: Any):
    (lists,) = arg_shapes
    bind = functools.partial(_partitioned.fun, call)
    shardings = [x.sharding for x in lists]
    if not isinstance(shardings[0], NamedSharding):  # partial-manual shard_map hands out GSPMDSharding
        return mesh, bind, tuple(r.sharding for r in result_shapes), (tuple(shardings),)
    tables = NamedSharding(mesh, PartitionSpec(*_leading(shardings[0], lists[0].ndim)))
    return mesh, bind, (tables,) * 5, ((tables,) * 3,)


def _leading(sharding: NamedSharding, rank: int) -> list[Any]:
    """Mesh axes of the leading dimensions."""
    spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    return [*spec[:-1], None]


def _rule(call: TransposeCall, mesh: Any, operands: Sequence[Any], results: Sequence[Any]):
    del call, mesh, results
    lead = [f"t{chr(97 + i)}" for i in range(len(operands[0].shape) - 1)]

    def words(*lasts: str) -> str:
        return ", ".join(" ".join([*lead, last]) for last in lasts)

    rule = f"{words('r', 'e', 'e')} -> {words('c', 'e', 'e', 'e', 'e')}"
    return rule, {"need_replication_factors": ("r", "e", "c")}


_partitioned.def_partition(partition=_partition, sharding_rule=_rule)
