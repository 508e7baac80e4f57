"""How the attention calls split over a device mesh: batch and heads without a collective, and the sequence.

`sequence` says what a shard of the sequence computes, and what travels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_bsk.attention.sequence import SequenceShards
from jax_bsk.core import compat
from jax_bsk.core.dims import Axes, Bind, Dims, Factors, Run, Splitting, axis_names, axis_size


class AttentionSplitting(Splitting):
    """Heads N and K split together, as far as the groups of grouped-query attention allow; so do queries T and keys S.

    Queries split where each shard has whole query blocks. Keys split with them where they are as many and each shard
    has whole key blocks, too; otherwise all shards are given all keys.
    """

    own_programs = frozenset("TS")

    def factors(self, call: Any, sizes: Mapping[str, int], mesh: Mesh) -> Factors:
        """Shardy factors of the heads and of the sequence.

        Queries and keys of one length are one factor: of two, Shardy would let only one split over a mesh axis. Heads:

        - MHA: one factor for both.
        - GQA: the query heads are the compound (key/value head, member of the group), split by key/value head.
        - MQA, or a mesh axis that does not divide the key/value heads: two factors, of which only the query heads
          split (a compound would make Shardy answer with sub-axes, which a NamedSharding cannot spell).
        """
        heads, kv_heads = sizes["N"], sizes["K"]
        if sizes["T"] == sizes["S"]:
            keys, whole = {"S": "t"}, frozenset[str]()
        else:
            keys, whole = {}, frozenset("S")
        if heads == kv_heads:
            return Factors(names={"K": "n", **keys}, whole=whole)
        if kv_heads > 1 and all(size == 1 or kv_heads % size == 0 for size in mesh.shape.values()):
            return Factors(names={"N": "(k g)", **keys}, sizes={"g": heads // kv_heads}, whole=whole)
        return Factors(names=keys, replicated=frozenset("k"), whole=whole)

    def splits(self, call: Any, letter: str, sizes: Mapping[str, int], shards: int) -> bool:
        """Queries split into whole blocks; batch and heads always."""
        return letter != "T" or sizes["T"] % (shards * call.attributes.block_q) == 0

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """Keys follow the queries, and key/value heads the query heads."""
        axes, run = self._of_heads(call, dims, sizes, axes, mesh)
        shards = axis_size(mesh, axes.get("T"))
        if shards == 1:
            return axes, run
        keys_split = sizes["S"] == sizes["T"] and sizes["S"] % (shards * call.attributes.block_kv) == 0
        axes = {**axes, "S": axes["T"] if keys_split else None}
        return axes, SequenceShards(call, dims, axes["T"], shards, keys_split, run).run

    def _of_heads(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """The key/value heads follow the query heads; if these split further, each shard sees all key/value heads."""
        shards, kv_heads = axis_size(mesh, axes.get("N")), sizes["K"]
        if kv_heads % shards == 0:
            return super().shard(call, dims, sizes, {**axes, "K": axes.get("N")}, mesh)
        if shards % kv_heads:  # a shard's query heads would straddle key/value heads: gather the heads
            return super().shard(call, dims, sizes, {**axes, "N": None}, mesh)
        return axes, SharedHeads(call, dims, axes["N"], shards).run


class DeltaSplitting(Splitting):
    """Row sums split in every dimension, and need nothing from elsewhere."""

    def splits(self, call: Any, letter: str, sizes: Mapping[str, int], shards: int) -> bool:
        """Queries split into equal parts: of a length that was cut, such as `x[:, :-1]`, the compiler's are not."""
        return letter != "T" or sizes["T"] % shards == 0


class BiasGradientSplitting(AttentionSplitting):
    """The same of the gradient of a bias: shards that share a term sum its gradients."""

    # Where the compiler splits the batch or the heads of a partly manual `shard_map`, nobody could sum.
    own_programs = frozenset("BNTS")

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """As its parent, with a sum over the shards of the examples and the heads that share the term."""
        axes, run = super().shard(call, dims, sizes, axes, mesh)
        shared = [axis_names(axes.get(letter.upper())) for letter in "bn" if sizes[letter] == 1]
        names = tuple(name for names in shared for name in names)
        return axes, SharedTerm(names, run).run if names else run


@dataclasses.dataclass(frozen=True)
class SharedTerm:
    """The gradient of a term of the bias that several shards have, on one of them.

    Attributes:
      axes: Mesh axes whose shards have the same term.
      inner: What the shard computes of its own examples and heads.
    """

    axes: tuple[str, ...]
    inner: Run

    def run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes a shard's results from its operands."""
        return compat.call_without_mesh(self._summed, *self.inner(bind, operands))

    def _summed(self, *results: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.psum(x, self.axes) for x in results)


@dataclasses.dataclass(frozen=True)
class SharedHeads:
    """What one shard computes where several shards' query heads belong to one key/value head.

    Each shard cuts out its key/value head, and puts the head's gradient back among zeros, which the shards sum (MQA is
    the case of a single head).

    Attributes:
      call: Static part of the call.
      dims: Letters of the call.
      axis: Mesh axes that the query heads split over.
      shards: Number of shards.
    """

    call: Any
    dims: Dims
    axis: Axes
    shards: int

    def run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes a shard's results from its operands."""
        return compat.call_without_mesh(lambda *local: self._run(bind, local), *operands)

    def _run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        letters_of = self.dims.operands.values()
        kv_heads = self.dims.sizes([x.shape for x in operands])["K"]
        mine = jax.lax.axis_index(self.axis) * kv_heads // self.shards

        def cut(x: jax.Array, letters: str) -> jax.Array:
            if "K" not in letters:
                return x
            return jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=x.ndim - len(letters) + letters.index("K"))

        def whole(x: jax.Array, letters: str) -> jax.Array:
            if "K" not in letters:
                return x
            axis = x.ndim - len(letters) + letters.index("K")
            zeros = jnp.zeros((*x.shape[:axis], kv_heads, *x.shape[axis + 1 :]), x.dtype)
            return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, x, mine, axis=axis), self.axis)

        results = bind(self.call, [cut(x, letters) for x, letters in zip(operands, letters_of, strict=True)])
        return tuple(whole(x, letters) for x, letters in zip(results, self.dims.results.values(), strict=True))
