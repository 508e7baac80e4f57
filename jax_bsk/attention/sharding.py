"""How the attention calls split over a device mesh: batch and heads without a collective, everything else replicated.

Sits between `_attention_op` (which defines the calls) and the mesh: one table names the dimensions of every operand,
and from it follow both the rule for Shardy's propagation and the local shardings of the partitioned call.

Every operand may carry extra leading dimensions, one for each `vmap` around the call (`lead` of them).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_bsk.core import compat
from jax_bsk.core.sharding import axis_size, factor_name

# Dimension letters: B batch, N query heads, K key/value heads; b, n the same or 1 (an array shared along it);
# "." a dimension that is never split.
LISTS = "bn."  # an array of the lists, of which all have the same batch and heads
FORWARD_OPERANDS = (
    "B.N.",  # query
    "B.K.",  # key
    "B.K.",  # value
    LISTS,  # row_offsets
    LISTS,  # kv_blocks
    LISTS,  # tiles
    "bn...",  # bit_tiles
    "b.",  # lengths
    "bn",  # sinks
)
FORWARD_RESULTS = (
    "B.N.",  # out
    "BN.",  # lse
    "BN.",  # lse_rest
)
BACKWARD_OPERANDS = (
    "B.N.",  # dout
    "B.N.",  # query
    "B.K.",  # key
    "B.K.",  # value
    "BN.",  # lse
    "BN.",  # lse_rest
    "BN.",  # delta
    LISTS,  # row_offsets
    LISTS,  # kv_blocks
    LISTS,  # tiles
    LISTS,  # col_offsets
    LISTS,  # q_blocks
    LISTS,  # col_tiles
    "bn...",  # bit_tiles
    "b.",  # lengths
)
BACKWARD_RESULTS = (
    "B.N.",  # dquery
    "B.K.",  # dkey
    "B.K.",  # dvalue
)


@dataclasses.dataclass(frozen=True)
class CallDims:
    """Dimensions of one call's operands and results.

    Attributes:
      operands: Letters of each operand's dimensions.
      results: Letters of each result's.
      query: Where the query stands among the operands.
      key: Where the key does.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    query: int
    key: int

    def group(self, operand: int) -> tuple[int, ...]:
        """The operands that have leading dimensions and the batch, or ones, together with this one.

        Kernels read all arrays of the lists, query-major and key-major, with one count of examples. Every other operand
        is for itself.
        """
        if self.operands[operand] != LISTS:
            return (operand,)
        return tuple(i for i, letters in enumerate(self.operands) if letters == LISTS)

    def lead(self, query_rank: int) -> int:
        """Number of leading `vmap` dimensions, from the query's rank."""
        return query_rank - len(self.operands[self.query])


GATES = "BN."  # [B, N, capacity], in every order

FORWARD = CallDims(FORWARD_OPERANDS, FORWARD_RESULTS, query=0, key=1)
BACKWARD = CallDims(BACKWARD_OPERANDS, BACKWARD_RESULTS, query=1, key=2)
# The same calls with gates: their last operands, and of the backward the last result.
GATED_FORWARD = dataclasses.replace(FORWARD, operands=(*FORWARD_OPERANDS, GATES))
GATED_BACKWARD = dataclasses.replace(
    BACKWARD, operands=(*BACKWARD_OPERANDS, GATES, GATES), results=(*BACKWARD_RESULTS, GATES)
)


def _heads(heads: int, kv_heads: int, mesh: Mesh) -> tuple[str, str]:
    """Shardy factors of the query heads and of the key/value heads.

    - MHA: one factor for both.
    - GQA: the query heads are the compound (key/value head, member of the group), split by key/value head.
    - MQA, or a mesh axis that does not divide the key/value heads: two factors, of which only the query heads split
      (a compound would make Shardy answer with sub-axes, which a NamedSharding cannot spell).
    """
    if heads == kv_heads:
        return "n", "n"
    even = kv_heads > 1 and all(size == 1 or kv_heads % size == 0 for size in mesh.shape.values())
    return ("(k g)", "k") if even else ("n", "k")


def sharding_rule(dims: CallDims, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]):
    """The Einsum-like rule of a call for Shardy, from the MLIR types of its operands and results."""
    shapes = [tuple(t.shape) for t in (*operands, *results)]
    lead = dims.lead(len(shapes[dims.query]))
    query, key = shapes[dims.query], shapes[dims.key]
    heads, kv_heads = query[lead + 2], key[lead + 2]
    head_factor, kv_factor = _heads(heads, kv_heads, mesh)
    replicated = {"k"} if (head_factor, kv_factor) == ("n", "k") else set[str]()

    names = iter(f"x{factor_name(i)}" for i in range(10_000))

    def own() -> str:
        name = next(names)
        replicated.add(name)
        return name

    def factors(shape: tuple[int, ...], letters: str) -> str:
        words = [f"v{factor_name(i)}" if shape[i] == query[i] else own() for i in range(lead)]
        for size, letter in zip(shape[lead:], letters, strict=True):
            if letter == "B" or (letter == "b" and size == query[lead]):
                words.append("b")
            elif letter == "N" or (letter == "n" and size == heads):
                words.append(head_factor)
            elif letter == "K":
                words.append(kv_factor)
            else:
                words.append(own())
        return " ".join(words)

    all_letters = (*dims.operands, *dims.results)
    texts = [factors(shape, letters) for shape, letters in zip(shapes, all_letters, strict=True)]
    count = len(dims.operands)
    rule = ", ".join(texts[:count]) + " -> " + ", ".join(texts[count:])
    seen = dict.fromkeys(re.findall(r"[a-z]+", rule))  # special factors go in order of first appearance
    extra: dict[str, Any] = {"need_replication_factors": tuple(f for f in seen if f in replicated)}
    if head_factor == "(k g)":
        extra["g"] = heads // kv_heads  # a factor that appears only inside a compound has no other size
    return rule, extra


@dataclasses.dataclass(frozen=True)
class LocalCall:
    """A partitioned call: shardings of its operands and results, and what one shard computes.

    Attributes:
      dims: The call.
      operands: Shardings of the operands.
      results: Shardings of the results.
      shared_heads: When the query heads are split further than the key/value heads: the mesh axes they are split over
        (each shard then sees all key/value heads), else None.
      head_shards: Number of shards of the query heads.
    """

    dims: CallDims
    operands: tuple[NamedSharding, ...]
    results: tuple[NamedSharding, ...]
    shared_heads: Any
    head_shards: int

    def run(self, call: Callable[[Sequence[jax.Array]], tuple[jax.Array, ...]], args: Sequence[jax.Array]):
        """Runs the call on one shard's operands.

        With shared key/value heads a shard's query heads all belong to one of them: it is cut out, and its gradient
        put back among zeros and summed over the shards (MQA is the case of a single one).
        """
        if self.shared_heads is None:
            return call(args)
        return compat.call_without_mesh(lambda *local: self._run_with_shared_heads(call, local), *args)

    def _run_with_shared_heads(self, call: Any, args: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        kv_heads = args[self.dims.key].shape[-2]
        mine = jax.lax.axis_index(self.shared_heads) * kv_heads // self.head_shards
        cut = [
            jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=x.ndim - 2) if letters == "B.K." else x
            for x, letters in zip(args, self.dims.operands, strict=True)
        ]

        def whole(x: jax.Array, letters: str) -> jax.Array:
            if letters != "B.K.":
                return x
            zeros = jnp.zeros((*x.shape[:-2], kv_heads, x.shape[-1]), x.dtype)
            x = jax.lax.dynamic_update_slice_in_dim(zeros, x, mine, axis=x.ndim - 2)
            return jax.lax.psum(x, self.shared_heads)

        return tuple(whole(x, letters) for x, letters in zip(call(cut), self.dims.results, strict=True))


def local_call(dims: CallDims, mesh: Mesh, args: Sequence[Any]) -> LocalCall:
    """Where each shard of a call finds its operands, following the query's sharding.

    Args:
      dims: The call.
      mesh: The device mesh.
      args: Operands with `.shape` and a `NamedSharding` in `.sharding`, as custom_partitioning hands them out.
    """
    query, key = args[dims.query], args[dims.key]
    lead = dims.lead(len(query.shape))
    spec = tuple(query.sharding.spec) + (None,) * (len(query.shape) - len(query.sharding.spec))
    lead_axes, batch_axis, head_axis = spec[:lead], spec[lead], spec[lead + 2]
    heads, kv_heads = query.shape[lead + 2], key.shape[lead + 2]
    shards = axis_size(mesh, head_axis)
    kv_axis, shared_heads = head_axis, None
    if kv_heads % shards != 0:
        kv_axis = None
        if shards % kv_heads == 0:
            shared_heads = head_axis
        else:  # a shard's query heads would straddle key/value heads: gather the heads
            head_axis = None

    def sharding(shape: tuple[int, ...], letters: str) -> NamedSharding:
        axes: list[Any] = [axis if shape[i] == query.shape[i] else None for i, axis in enumerate(lead_axes)]
        for size, letter in zip(shape[lead:], letters, strict=True):
            if letter == "B" or (letter == "b" and size == query.shape[lead]):
                axes.append(batch_axis)
            elif letter == "N" or (letter == "n" and size == heads):
                axes.append(head_axis)
            elif letter == "K":
                axes.append(kv_axis)
            else:
                axes.append(None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    def result(letters: str) -> NamedSharding:
        axes: list[Any] = [*lead_axes, *({"B": batch_axis, "N": head_axis, "K": kv_axis}.get(x) for x in letters)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return LocalCall(
        dims,
        tuple(sharding(tuple(a.shape), letters) for a, letters in zip(args, dims.operands, strict=True)),
        tuple(result(letters) for letters in dims.results),
        shared_heads,
        shards,
    )
