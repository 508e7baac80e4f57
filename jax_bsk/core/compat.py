"""Facts of the installed jax and jaxlib that have no stable public home. The only module that may touch private JAX."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.core
from jax._src.core import Primitive, trace_state_clean  # jax.extend.core's Primitive, which takes 40 ms to import
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.interpreters import ad, batching, mlir
from jax.interpreters.xla import apply_primitive

__all__ = [
    "Primitive",
    "ad",
    "apply_primitive",
    "batching",
    "call_without_mesh",
    "default_device",
    "default_platform",
    "lower_without_mesh",
    "lowering_platforms",
    "match_varying",
    "mlir",
    "needs_devices",
    "outside_traces",
    "runtime_ffi_api",
]


def default_device() -> Any:
    """What `jax.default_device` or the option of that name says: a device, the name of a platform, or None."""
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


def default_platform() -> str:
    """Platform that an unplaced computation is lowered for: "cpu", "cuda", "rocm", "tpu", ..."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.local_devices()[0].client.platform_version.lower() else "cuda"


@functools.cache
def runtime_ffi_api() -> tuple[int, int] | None:
    """XLA FFI API version (major, minor) of the installed jaxlib, None when it does not say.

    jaxlib states it only in the C header it ships.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return None
    header = Path(spec.origin).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", text))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


def outside_traces() -> bool:
    """Whether no transformation is tracing: what is computed now is computed at once, and its result has a value."""
    return trace_state_clean()


def staged(x: Any) -> Any:
    """An operand as it is, but an array without elements as one that the program being traced makes, if there is one.

    Around a `shard_map` a constant is an operand of it, and XLA of jax 0.11.2 dies while it compiles one without
    elements, in Shardy's ManualComputationUnusedInputsPattern.
    """
    if isinstance(x, jax.core.Tracer) or 0 not in getattr(x, "shape", ()) or outside_traces():
        return x
    return jax.numpy.zeros(x.shape, x.dtype)


def manual_axes() -> tuple[str, ...]:
    """Mesh axes of the `shard_map` that is being traced, if any."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes (of an enclosing `shard_map` that checks them) along which `x` differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """Marks every array as varying along the axes that any of them varies along.

    A shared array that meets a varying one has a varying cotangent; the cast's transpose sums it, as JAX's own
    operations do implicitly.
    """
    everywhere = frozenset[str]().union(*(varying_axes(x) for x in arrays))
    return tuple(
        jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if (missing := everywhere - varying_axes(x)) else x
        for x in arrays
    )


def lowering_platforms(ctx: Any) -> tuple[str, ...]:
    """Platforms that a lowering rule of no platform of its own is asked for."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def call_without_mesh(function: Callable[..., tuple[jax.Array, ...]], *args: jax.Array) -> tuple[jax.Array, ...]:
    """Calls a function of local arrays from within a partitioned call, traced and lowered with no mesh current.

    While custom_partitioning lowers a shard's program, the caller's mesh is still current. An explicit one types the
    arrays made there and (jax 0.11, 0.12) the scalars of a psum's reduction, which XLA then refuses.
    """
    return tuple(_without_mesh_p.bind(*args, function=function))


def _no_mesh():
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _shapes_without_mesh(*args: Any, function: Any):
    with _no_mesh():
        results = jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
    return [args[0].update(shape=r.shape, dtype=r.dtype) for r in results]


def _lower_without_mesh(ctx: Any, *args: Any, function: Any):
    with _no_mesh():
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


def needs_devices(primitive: Any) -> None:
    """Says that a primitive's lowering must know the devices, as `custom_partitioning` must, of which it makes use."""
    prim_requires_devices_during_lowering.add(primitive)


def lower_without_mesh(function: Callable[..., Any], ctx: Any, *args: Any):
    """A lowering rule's result: a function of arrays that know of no mesh, neither current nor their own.

    What the function computes splits as XLA finds it (`custom_partitioning` says how for the native calls).
    """
    plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    return _lower_without_mesh(ctx.replace(avals_in=plain), *args, function=function)


_without_mesh_p = Primitive("jax_bsk_call_without_mesh")
_without_mesh_p.multiple_results = True
_without_mesh_p.def_abstract_eval(_shapes_without_mesh)
mlir.register_lowering(_without_mesh_p, _lower_without_mesh)
