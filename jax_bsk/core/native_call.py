"""One native call: custom_vmap -> custom_partitioning -> primitive -> XLA FFI custom call, from one table.

Between the operations, which say what a call computes and differentiate it, and `library`, which loads the handlers. A
new native operation costs a `NativeCall` here and a handler in `csrc/`. Each layer has one duty:

- custom_vmap: a mapped axis becomes a leading dimension of the operands. It is never merged into the batch here, which
  would make a sharded batch all-gather;
- custom_partitioning: dimensions split over a mesh as their letters say (`dims`);
- the primitive: shape rule and one lowering per platform. It keeps the leading dimensions; the handlers in C++ read
  them and the batch as one (a reshape here would be refused on explicit meshes).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_bsk.core import compat, library
from jax_bsk.core.dims import Dims, Splitting, local_call, sharding_rule
from jax_bsk.core.errors import UnsupportedError
from jax_bsk.core.version import __version__

PLATFORMS = ("cpu", "cuda")

Avals = Sequence[Any]  # abstract values, with shape and dtype


def like(source: Any, shape: Sequence[int], dtype: Any, dims: Sequence[int]) -> Any:
    """Abstract value with `source`'s varying axes, and in dimension i its sharding of `dims[i]` (-1: none)."""
    spec = tuple(source.sharding.spec) + (None,) * (source.ndim - len(source.sharding.spec))
    sharding = source.sharding.update(spec=PartitionSpec(*(None if d < 0 else spec[d] for d in dims)))
    return source.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


class NativeCall:
    """A custom call as a function of its static part and its operands, under every transformation but `grad`.

    The static part `call` is hashable. A call without a fallback has a `call.platform`: the only platform it may be
    lowered for, or None for whichever has a native kernel.

    Args:
      target: Name of the custom call, on every platform.
      dims: Letters of the operands and results, `dims(call)`.
      shapes: Shape rule, `shapes(*operands, call=call)` to the abstract values of the results.
      attributes: Attributes of the custom call, `attributes(call)`.
      workspace: Bytes of a last result on CUDA, `workspace(avals, call)`. XLA allocates it with the program's other
        buffers, and nobody reads it.
      workspace_dtype: Type of that result.
      refusals: Sentences on why a platform's kernels cannot take the call, `refusals(platform, avals, call)`. What was
        traced for one platform may be compiled for another, as `jax.export` does.
      fallback: The same of operands without leading dimensions in plain JAX, `fallback(call, *operands)`, for what has
        no native kernel; without one such a call is an error.
      adapt: Same results by operands of other sizes, `adapt(platform, avals, call)` to a function of the operands, or
        None where the operands are good as they are.
      splitting: Which dimensions split over a mesh.
    """

    def __init__(
        self,
        target: str,
        *,
        dims: Callable[[Any], Dims],
        shapes: Callable[..., Sequence[Any]],
        attributes: Callable[[Any], Mapping[str, Any]],
        workspace: Callable[[Avals, Any], int] | None = None,
        workspace_dtype: Any = np.int32,
        refusals: Callable[[str, Avals, Any], Sequence[str]],
        fallback: Callable[..., Sequence[jax.Array]] | None = None,
        adapt: Callable[[str, Avals, Any], Callable[..., Sequence[jax.Array]] | None] = lambda *_: None,
        splitting: Splitting | None = None,
    ):
        self.target = target
        self._dims = dims
        self._attributes = attributes
        self._workspace = workspace
        self._workspace_dtype = np.dtype(workspace_dtype)
        self._refusals = refusals
        self._fallback = fallback
        self._adapt = adapt
        self._splitting = splitting or Splitting()
        library.declare(target)

        self._primitive = compat.Primitive(target)
        self._primitive.multiple_results = True
        self._primitive.def_abstract_eval(shapes)
        # JAX's own rule for eager calls. With a `jax.jit` of one's own around `bind`, `jax.disable_jit` and the second
        # run that follows a NaN under `jax_debug_nans` (or an infinity under `jax_debug_infs`) come back here, without
        # end.
        self._primitive.def_impl(functools.partial(compat.apply_primitive, self._primitive))
        for platform in PLATFORMS:
            rule = functools.partial(self._lower, platform=platform)
            compat.mlir.register_lowering(self._primitive, rule, platform=platform)
        compat.mlir.register_lowering(self._primitive, self._lower_elsewhere)
        self._partitioned = self._with_partitioning()
        # Bounded, because a call may hold the lists of a mask, and eager loops may see many of them.
        self._mapped = functools.lru_cache(256)(self._with_vmap)

    def __call__(self, call: Any, *operands: Any) -> tuple[jax.Array, ...]:
        """Results of the call, in the order of `dims(call).results`."""
        return self._mapped(call)(tuple(jax.numpy.asarray(compat.staged(x)) for x in operands))

    def attributes(self, call: Any) -> dict[str, Any]:
        """Attributes of the custom call. The version makes a cached executable of an older library miss."""
        return {**self._attributes(call), "version": __version__}

    # ---- primitive ------------------------------------------------------------------------------------------------

    def bind(self, call: Any, *operands: Any) -> tuple[jax.Array, ...]:
        """The call within a lowering of its own, where nothing is mapped or split any more."""
        return tuple(self._primitive.bind(*operands, call=call))

    def _bind(self, call: Any, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
        return self.bind(call, *operands)

    def _lower(self, ctx: Any, *operands: Any, call: Any, platform: str) -> Sequence[Any]:
        if self._fallback is None and call.platform not in (None, platform):
            raise _compiled_for(platform, call.platform)
        if reasons := self._refusals(platform, ctx.avals_in, call):
            if self._fallback is None:
                raise _compiled_for(platform, platform, reasons)
            return self._lower_fallback(ctx, *operands, call=call)
        adapted = self._adapt(platform, ctx.avals_in, call)
        if adapted is not None:
            return compat.lower_without_mesh(adapted, ctx, *operands)
        results = list(ctx.avals_out)
        if platform == "cuda" and self._workspace is not None:
            words = self._workspace(ctx.avals_in, call) // self._workspace_dtype.itemsize
            results.append(jax.core.ShapedArray((words,), self._workspace_dtype))
        lower = jax.ffi.ffi_lowering(self.target)
        return lower(ctx.replace(avals_out=results), *operands, **self.attributes(call))[: len(ctx.avals_out)]

    def _lower_elsewhere(self, ctx: Any, *operands: Any, call: Any) -> Sequence[Any]:
        if self._fallback is not None:
            return self._lower_fallback(ctx, *operands, call=call)
        platforms = " and ".join(compat.lowering_platforms(ctx)) or "another platform"
        raise _compiled_for(platforms, call.platform, [f"jax_bsk has no native kernel for {platforms}."])

    def _lower_fallback(self, ctx: Any, *operands: Any, call: Any) -> Sequence[Any]:
        assert self._fallback is not None
        dims = self._dims(call)
        function: Callable[..., Any] = functools.partial(self._fallback, call)
        axes = [None if name in dims.unmapped else 0 for name in dims.operands]
        for _ in dims.lead([x.shape for x in ctx.avals_in]):
            function = jax.vmap(function, axes)
        return compat.lower_without_mesh(function, ctx, *operands)

    # ---- custom_partitioning --------------------------------------------------------------------------------------

    def _with_partitioning(self) -> Any:
        def partition(call: Any, mesh: Any, arg_shapes: Any, result_shapes: Any):
            (operands,) = arg_shapes
            shardings = [x.sharding for x in (*operands, *result_shapes)]
            if not all(isinstance(s, NamedSharding) for s in shardings):  # of a partial-manual shard_map
                count = len(operands)
                self._check_partly_manual(call, [*operands, *result_shapes])
                return mesh, functools.partial(self._bind, call), tuple(shardings[count:]), (tuple(shardings[:count]),)
            local = local_call(self._dims(call), self._splitting, call, mesh, operands, result_shapes)
            return mesh, lambda args: local.run(self._bind, args), local.results, (local.operands,)

        def rule(call: Any, mesh: Any, operands: Any, results: Any):
            return sharding_rule(self._dims(call), self._splitting, call, mesh, operands, results)

        partitioned = custom_partitioning(self._bind, static_argnums=(0,))
        partitioned.def_partition(partition=partition, sharding_rule=rule)
        return partitioned

    def _check_partly_manual(self, call: Any, arrays: Sequence[Any]) -> None:
        """Raises UnsupportedError where a shard of a partly manual shard_map would have to compute something else.

        There the compiler's shardings have no names of mesh axes, which a collective would need.
        """
        dims = self._dims(call)
        for x, letters in zip(arrays, (*dims.operands.values(), *dims.results.values()), strict=True):
            split = [a != b for a, b in zip(x.shape, x.sharding.shard_shape(tuple(x.shape)), strict=True)]
            own = {
                letter for letter, is_split in zip(letters[::-1], split[::-1], strict=False) if is_split
            } & self._splitting.own_programs
            if own:
                raise UnsupportedError(
                    None,
                    [
                        f"{self.target}: inside a shard_map with axis_names, an array of shape {tuple(x.shape)} is "
                        f"sharded along dimension {min(own)} over an axis that is left to the compiler.",
                        "Use jit without a shard_map, or make that axis manual, too.",
                    ],
                )

    # ---- custom_vmap ----------------------------------------------------------------------------------------------

    def _with_vmap(self, call: Any) -> Any:
        @custom_vmap
        def mapped(operands: Any):
            return self._partitioned(call, operands)

        @mapped.def_vmap
        def rule(axis_size: int, in_batched: Any, operands: Any):
            (batched,) = in_batched
            dims = self._dims(call)
            results = mapped(tuple(dims.mapped(operands, batched, axis_size)))
            return tuple(dims.unmapped_results(operands, results)), tuple(True for _ in results)

        return mapped


def _compiled_for(platform: str, implementation: str | None, reasons: Sequence[str] = ()) -> UnsupportedError:
    remedy = "Pass implementation='xla', which every platform compiles."
    return UnsupportedError(implementation, [f"The computation is being compiled for {platform}.", *reasons, remedy])
