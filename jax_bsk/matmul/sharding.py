"""How the block-sparse products split over a device mesh.

Leading (`vmap`) dimensions and the dense factor's free one split without a collective. So do the rows of the result, in
whole blocks, each device walking its own lists. The contracted length splits with one sum over its devices. The blocks
themselves are on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_bsk.core import compat
from jax_bsk.core.dims import Axes, Bind, Dims, Factors, Run, Splitting, axis_size


class ProductSplitting(Splitting):
    """M and K split in whole blocks, K with a sum."""

    def factors(self, call: Any, sizes: Mapping[str, int], mesh: Mesh) -> Factors:
        """M and K, where every axis of the mesh divides their blocks."""
        shards = [size for size in mesh.shape.values() if size > 1]
        whole = {letter for letter in "MK" if not all(self.splits(call, letter, sizes, n) for n in shards)}
        return Factors(whole=frozenset(whole), summed=() if "K" in whole else ("k",))

    def splits(self, call: Any, letter: str, sizes: Mapping[str, int], shards: int) -> bool:
        """Whether the shards are whole blocks."""
        if letter not in ("M", "K"):
            return True
        (length, block) = _sides(call)[letter]
        return length % (block * shards) == 0

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """The call with the lengths of a shard, after each shard has made lists of its own."""
        rows, contracted = ((axes.get(letter), axis_size(mesh, axes.get(letter))) for letter in "MK")
        m, k = _sides(call)["M"][0] // rows[1], _sides(call)["K"][0] // contracted[1]
        lengths = (k, m) if call.attributes.transposed else (m, k)
        attributes = dataclasses.replace(call.attributes, rows=lengths[0], columns=lengths[1])
        local = dataclasses.replace(call, attributes=attributes)
        if rows[0] is None and contracted[0] is None:
            return axes, lambda bind, operands: bind(local, operands)
        return axes, ProductShard(local, rows, contracted).run


class SampledSplitting(Splitting):
    """K splits anywhere, with a sum."""

    def factors(self, call: Any, sizes: Mapping[str, int], mesh: Mesh) -> Factors:
        """K, where every axis of the mesh divides it."""
        del call
        divides = all(sizes["K"] % size == 0 for size in mesh.shape.values())
        return Factors(summed=("k",)) if divides else Factors(whole=frozenset("K"))

    def splits(self, call: Any, letter: str, sizes: Mapping[str, int], shards: int) -> bool:
        """Whether the shards are of one length."""
        del call
        return sizes[letter] % shards == 0

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """The call, and the sum over the shards."""
        axis = axes.get("K")
        if axis is None:
            return axes, lambda bind, operands: bind(call, operands)

        def run(bind: Bind, *operands: jax.Array) -> tuple[jax.Array, ...]:
            total = _sum(bind, call, operands, axis)
            return (total.astype(call.attributes.out_dtype),)

        return axes, lambda bind, operands: compat.call_without_mesh(lambda *local: run(bind, *local), *operands)


def _sides(call: Any) -> dict[str, tuple[int, int]]:
    """Length and block size of M and K."""
    sides = list(zip(call.shape, call.block_size, strict=True))
    out, into = sides[::-1] if call.attributes.transposed else sides
    return {"M": out, "K": into}


def _sum(bind: Bind, call: Any, operands: Sequence[jax.Array], axis: Axes) -> jax.Array:
    """The shards' sum, in float32 (float64 for float64), which is rounded once by whoever asked."""
    wide = "float64" if call.attributes.out_dtype == "float64" else "float32"
    call = dataclasses.replace(call, attributes=dataclasses.replace(call.attributes, out_dtype=wide))
    (out,) = bind(call, operands)
    return jax.lax.psum(out, axis)


@dataclasses.dataclass(frozen=True)
class ProductShard:
    """What one shard computes of a product whose result or contracted length splits.

    Attributes:
      call: Static part of the shard's call.
      rows: Mesh axes that the rows of the result split over, or None, and the number of shards.
      contracted: The same of the contracted length.
    """

    call: Any
    rows: tuple[Axes, int]
    contracted: tuple[Axes, int]

    def run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes a shard's results from its operands."""
        return compat.call_without_mesh(lambda *local: self._run(bind, *local), *operands)

    def _run(self, bind: Bind, data: Any, offsets: Any, ids: Any, places: Any, dense: Any) -> tuple[jax.Array, ...]:
        if self.rows[0] is not None:
            offsets = self._own_rows(offsets)
        if self.contracted[0] is None:
            return bind(self.call, (data, offsets, ids, places, dense))
        begin, end = offsets[..., :-1], offsets[..., 1:]
        bad = (begin < 0) | (end < begin) | (end > ids.shape[-1])
        lists = self._own_entries(offsets, ids, places, dense)
        total = _sum(bind, self.call, (data, *lists, dense), self.contracted[0])
        return (self._with_nan(total, bad).astype(self.call.attributes.out_dtype),)

    def _own_rows(self, offsets: jax.Array) -> jax.Array:
        axis, shards = self.rows
        mine = (offsets.shape[-1] - 1) // shards
        start = jax.lax.axis_index(axis) * mine
        return jax.lax.dynamic_slice_in_dim(offsets, start, mine + 1, axis=-1)

    def _own_entries(self, offsets: Any, ids: Any, places: Any, dense: Any) -> tuple[Any, Any, Any]:
        """Lists of the entries whose blocks meet this shard's part of the contracted length."""
        axis, shards = self.contracted
        attributes, capacity = self.call.attributes, ids.shape[-1]
        block = self.call.block_size[0] if attributes.transposed else self.call.block_size[1]
        mine = dense.shape[-1 if attributes.dense_left else -2] // block
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
        return jnp.take_along_axis(before, jnp.clip(offsets, 0, capacity), axis=-1), ids, places

    def _with_nan(self, out: jax.Array, bad: jax.Array) -> jax.Array:
        """The result with NaN in the rows of blocks whose offsets make no sense."""
        attributes = self.call.attributes
        dim = out.ndim - (1 if attributes.dense_left else 2)
        block = self.call.block_size[1] if attributes.transposed else self.call.block_size[0]
        bad = jnp.repeat(bad, block, axis=-1)[..., : out.shape[dim]]
        return jnp.where(jnp.expand_dims(bad, bad.ndim - 1 if attributes.dense_left else bad.ndim), jnp.nan, out)
