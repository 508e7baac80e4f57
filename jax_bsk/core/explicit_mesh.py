"""Explicit meshes: list building is integer work that XLA partitions by itself, so it runs with automatic axes.

In explicit mode JAX asks every reshape, gather and scatter for an output sharding. Only the leading (example, head)
dims of the results are worth one, and that is their inputs'. The mesh is that of the arrays, whether or not
`jax.set_mesh` made it the current one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def call(function: Callable[..., Any], arrays: Sequence[Any], dims: Sequence[str]) -> Any:
    """`function(*arrays)`, whose results all begin with [examples, heads].

    Args:
      function: of the arrays; returns a tuple.
      arrays: its arguments.
      dims: the leading dims of each array: "", "b", "h" or "bh".
    """
    if not shards(arrays):  # a mask's function may close over arrays of the explicit mesh, and then goes on as it is
        return function(*arrays)
    spec = PartitionSpec(*(_sharding(dim, arrays, dims) for dim in "bh"))
    with mesh_of(arrays):
        return jax.sharding.auto_axes(function, out_sharding=spec)(*arrays)


def shards(arrays: Sequence[Any]) -> bool:
    """Whether an explicit mesh shards any of the arrays."""
    return any(axes for array in _explicit(arrays) for axes in jax.typeof(array).sharding.spec)


def mesh_of(arrays: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Makes the explicit mesh that the arrays are on the current one, where there is none."""
    current = jax.sharding.get_abstract_mesh()
    found = [jax.typeof(array).sharding.mesh for array in _explicit(arrays)]
    if not current.empty or not found:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(found[0])


def _explicit(arrays: Sequence[Any]) -> list[Any]:
    """The arrays that are on a mesh with an explicit axis."""
    return [x for x in arrays if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types]


def _sharding(dim: str, arrays: Sequence[Any], dims: Sequence[str]) -> Any:
    """Mesh axes of the first array that is sharded along `dim`."""
    for array, names in zip(arrays, dims, strict=True):
        if dim in names and array.shape[names.index(dim)] > 1:
            spec = jax.typeof(array).sharding.spec
            axes = spec[names.index(dim)] if names.index(dim) < len(spec) else None
            if axes is not None and axes is not PartitionSpec.UNCONSTRAINED:
                return axes
    return None
