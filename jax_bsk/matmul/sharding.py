"""How the block-sparse products split over a device mesh.

Sits between `_matmul_native` (which defines the calls) and the mesh. Leading (vmap) dims and the dense factor's free
one split without a collective; so do the rows of the result, in whole blocks, each device walking its own lists; the
contracted length splits with one sum over its devices. The blocks themselves are on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_bsk.core import compat
from jax_bsk.core.sharding import axis_size, factor_name


@dataclasses.dataclass(frozen=True)
class CallDims:
    """Operands of one call.

    Attributes:
      ranks: Of the operands, without leading dimensions.
      groups: Operands that have all leading dimensions or none of them together.
    """

    ranks: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


PRODUCT = CallDims((3, 1, 1, 1, 2), ((0, 1, 2, 3), (4,)))  # data, offsets, ids, places, dense
SAMPLED = CallDims((2, 2, 1, 1), ((0,), (1,), (2, 3)))  # left, right, row_ids, column_ids


def _names(dims: CallDims, call: Any) -> tuple[tuple[str, ...], str]:
    """A letter for each dimension of operands and result: n free, m of the result's blocks, k contracted, "." whole."""
    attributes = call.attributes
    if dims is PRODUCT:
        return ("...", ".", ".", ".", "nk" if attributes.dense_left else "kn"), "nm" if attributes.dense_left else "mn"
    left = "k." if attributes.left_transposed else ".k"
    right = ".k" if attributes.right_transposed else "k."
    return (left, right, ".", "."), "..."


def _blocks(dims: CallDims, call: Any, block_size: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Length and block of "m" and "k", which split in whole blocks (of two dense factors, anywhere)."""
    if dims is SAMPLED:
        return {"k": (0, 1)}
    sides = list(zip(call.shape, block_size, strict=True))
    out, into = sides[::-1] if call.attributes.transposed else sides
    return {"m": out, "k": into}


def _splits(length: int, block: int, shards: int) -> bool:
    return length % (block * shards) == 0


def sharding_rule(dims: CallDims, call: Any, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]):
    """The Einsum-like rule of a call for Shardy, from the MLIR types of its operands and results."""
    shapes = [tuple(t.shape) for t in (*operands, *results)]
    lead = len(shapes[0]) - dims.ranks[0]
    full = shapes[-1][:lead]  # of the result, which has all of them
    names, result = _names(dims, call)
    sizes = _blocks(dims, call, shapes[0][-2:])
    whole = {
        letter
        for letter, (length, block) in sizes.items()
        if not all(size == 1 or _splits(length, block, size) for size in mesh.shape.values())
    }
    replicated: list[str] = []

    def own() -> str:
        replicated.append(f"x{factor_name(len(replicated))}")
        return replicated[-1]

    def factors(shape: tuple[int, ...], word: str) -> str:
        words = [f"v{factor_name(i)}" if shape[i] == full[i] else own() for i in range(lead)]
        return " ".join([*words, *(own() if letter == "." or letter in whole else letter for letter in word)])

    texts = [factors(shape, word) for shape, word in zip(shapes, (*names, result), strict=True)]
    rule = ", ".join(texts[:-1]) + " -> " + texts[-1]
    extra: dict[str, Any] = {"need_replication_factors": tuple(replicated)}
    if "k" in rule.split(" -> ")[0].replace(",", "").split():
        extra["reduction_factors"] = ("k",)
    return rule, extra


@dataclasses.dataclass(frozen=True)
class LocalCall:
    """A partitioned call: shardings of operands and results, and what one shard computes.

    Attributes:
      dims: The call's.
      call: Static part of a shard's call.
      operands: Shardings of the operands.
      results: Shardings of the results.
      rows: Mesh axes that the rows of the result are split over, or None, and their size.
      contracted: The same of the contracted length.
      block_size: (bm, bk), for a product.
    """

    dims: CallDims
    call: Any
    operands: tuple[NamedSharding, ...]
    results: tuple[NamedSharding, ...]
    rows: tuple[Any, int]
    contracted: tuple[Any, int]
    block_size: tuple[int, int]

    def run(self, bind: Callable[..., tuple[jax.Array, ...]], args: Sequence[jax.Array]):
        """Runs the call on one shard's operands."""
        if self.rows[0] is None and self.contracted[0] is None:
            return bind(self.call, tuple(args))
        return compat.call_without_mesh(lambda *local: self._run(bind, local), *args)

    def _run(self, bind: Any, args: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        bad = None
        if self.dims is PRODUCT:
            args, bad = self._local_lists(args)
        axis = self.contracted[0]
        if axis is None:
            return bind(self.call, tuple(args))
        # Summed in float32 and rounded once.
        attributes = self.call.attributes
        wide = "float64" if attributes.out_dtype == "float64" else "float32"
        call = dataclasses.replace(self.call, attributes=dataclasses.replace(attributes, out_dtype=wide))
        (out,) = bind(call, tuple(args))
        out = jax.lax.psum(out, axis)
        if bad is not None:
            dim = out.ndim - (1 if attributes.dense_left else 2)
            block = self.block_size[1] if attributes.transposed else self.block_size[0]
            bad = jnp.repeat(bad, block, axis=-1)[..., : out.shape[dim]]
            out = jnp.where(jnp.expand_dims(bad, bad.ndim - 1 if attributes.dense_left else bad.ndim), jnp.nan, out)
        return (out.astype(attributes.out_dtype),)

    def _local_lists(self, args: Sequence[jax.Array]):
        """This shard's part of the lists, and (where the contracted length is split) which rows make no sense."""
        data, offsets, ids, places, dense = args
        axis, shards = self.rows
        if axis is not None:
            mine = (offsets.shape[-1] - 1) // shards
            start = jax.lax.axis_index(axis) * mine
            offsets = jax.lax.dynamic_slice_in_dim(offsets, start, mine + 1, axis=-1)
        axis, shards = self.contracted
        bad = None
        if axis is not None:
            begin, end, capacity = offsets[..., :-1], offsets[..., 1:], ids.shape[-1]
            bad = (begin < 0) | (end < begin) | (end > capacity)
            block = self.block_size[0] if self.call.attributes.transposed else self.block_size[1]
            mine = dense.shape[-1 if self.call.attributes.dense_left else -2] // block
            shard = jax.lax.axis_index(axis)
            local = ids - shard * mine
            here = (local >= 0) & (local < mine)
            # What names no block at all stays with the first shard, whose rows it makes NaN.
            nowhere = (ids < 0) | (ids >= mine * shards)
            keep = here | (nowhere & (shard == 0))
            order = jnp.argsort(~keep, axis=-1, stable=True)
            ids, places = (jnp.take_along_axis(x, order, axis=-1) for x in (jnp.where(here, local, -1), places))
            before = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
            before = jnp.concatenate([jnp.zeros_like(before[..., :1]), before], axis=-1)
            offsets = jnp.take_along_axis(before, jnp.clip(offsets, 0, capacity), axis=-1)
        return (data, offsets, ids, places, dense), bad


def local_call(dims: CallDims, call: Any, mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> LocalCall:
    """Where each shard of a call finds its operands, following the result's sharding and the contracted length's.

    Args:
      dims: The call's.
      call: Static part of it.
      mesh: The device mesh.
      args: Operands with `.shape` and a `NamedSharding` in `.sharding`, as custom_partitioning hands them out.
      results: Its one result, likewise.
    """
    names, word = _names(dims, call)
    lead = len(args[0].shape) - dims.ranks[0]
    block_size = tuple(args[0].shape[-2:])
    blocks = _blocks(dims, call, block_size)

    def spec(x: Any) -> tuple[Any, ...]:
        found = tuple(x.sharding.spec)
        return found + (None,) * (len(x.shape) - len(found))

    def used(axes: Sequence[Any]) -> set[str]:
        return {name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis or ())}

    result = results[0]
    axes: dict[str, Any] = {"n": None, "m": None, "k": None}
    taken = list(spec(result)[:lead])
    candidates = [("n", result, word), ("m", result, word)]
    candidates += [("k", x, names[i]) for i, x in enumerate(args) if "k" in names[i]]
    for letter, x, dims_of_x in candidates:
        if letter not in dims_of_x or axes[letter] is not None:
            continue
        axis = spec(x)[lead + dims_of_x.index(letter)]
        length, block = blocks.get(letter, (0, 1))
        if axis is None or used([axis]) & used(taken) or not _splits(length, block, axis_size(mesh, axis)):
            continue
        axes[letter] = axis
        taken.append(axis)

    def sharding(shape: Sequence[int], letters_of_x: str) -> NamedSharding:
        leading = [axis if shape[i] == result.shape[i] else None for i, axis in enumerate(spec(result)[:lead])]
        return NamedSharding(mesh, PartitionSpec(*leading, *(axes.get(letter) for letter in letters_of_x)))

    attributes = call.attributes
    if dims is PRODUCT:
        local = {letter: blocks[letter][0] // axis_size(mesh, axes[letter]) for letter in "mk"}
        rows, columns = (local["k"], local["m"]) if attributes.transposed else (local["m"], local["k"])
        call = dataclasses.replace(call, attributes=dataclasses.replace(attributes, rows=rows, columns=columns))
    return LocalCall(
        dims,
        call,
        tuple(sharding(x.shape, letters_of_x) for x, letters_of_x in zip(args, names, strict=True)),
        (sharding(result.shape, word),),
        (axes["m"], axis_size(mesh, axes["m"])),
        (axes["k"], axis_size(mesh, axes["k"])),
        (block_size[0], block_size[1]),
    )
