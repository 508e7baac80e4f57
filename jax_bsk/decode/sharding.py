"""How the decoding call splits over a device mesh: leading dimensions and heads, without a collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jax_bsk.core.dims import Axes, Dims, Factors, Run, Splitting, axis_size


class DecodeSplitting(Splitting):
    """Query heads N, key/value heads K and the cache's heads C (K, or 2 K) split together, by key/value head.

    Query heads of a single key/value head (MQA) split alone. Otherwise more shards than key/value heads are given whole
    arrays.
    """

    def factors(self, call: Any, sizes: Mapping[str, int], mesh: Mesh) -> Factors:
        """Compound factors of (key/value head, member of the group) and of (key/value head, key or value).

        On a mesh with an axis that does not divide the key/value heads (of a data axis, say) Shardy would answer a
        compound with sub-axes, which a NamedSharding cannot spell. There the query heads are a factor of their own, and
        `shard` splits the others with them where that is possible.
        """
        del call
        heads, kv_heads, cache_heads = sizes["N"], sizes["K"], sizes["C"]
        if kv_heads == 1:
            return Factors(whole=frozenset("KC"))
        if kv_heads == 0 or any(size > 1 and kv_heads % size for size in mesh.shape.values()):
            return Factors(replicated=frozenset("kc"))
        compounds = {"N": ("g", heads // kv_heads), "C": ("c", cache_heads // kv_heads)}
        return Factors(
            names={letter: "k" if n == 1 else f"(k {own})" for letter, (own, n) in compounds.items()},
            sizes={own: n for own, n in compounds.values() if n > 1},
        )

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """The cache's heads follow the query's."""
        axis = axes.get("N")
        shards = axis_size(mesh, axis)
        if shards > 1 and sizes["K"] % shards == 0:
            axes = {**axes, "K": axis, "C": axis}
        elif sizes["K"] != 1:
            axes = {**axes, "N": None}
        return super().shard(call, dims, sizes, axes, mesh)
