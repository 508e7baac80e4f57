"""Dimensions of a native call, a letter each, and how they split over a device mesh.

Below `native_call`, which makes of these letters the call's `vmap` rule and its sharding rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None  # mesh axes that a dimension is split over
Bind = Callable[[Any, Sequence[jax.Array]], tuple[jax.Array, ...]]  # (call, operands) -> results
Run = Callable[[Bind, Sequence[jax.Array]], tuple[jax.Array, ...]]  # what one shard computes


@dataclasses.dataclass(frozen=True)
class Dims:
    """Letters of the dimensions of a call's operands and results.

    A capital letter is a dimension that may split over a mesh. The same letter in lower case is a dimension of that
    length, or of 1 for an array that is shared along it. A "." is a dimension that never splits. Before these, operands
    and results have a leading dimension for each `vmap` around the call.

    Attributes:
      operands: Letters of each operand, by name, in the order of the call.
      results: Letters of each result, likewise.
      shared: Groups of operands that a kernel reads with one count of examples. If all of a group have leading
        dimensions (and a batch, the letter B) of 1, they stay so; else all of them get the whole ones, as does every
        operand in no group.
      unmapped: Operands that never have leading dimensions.
      follow: Names of operands and results, whose shardings the call follows in this order.
      like: Operand of a result that has as many examples as this one, 1 where all share it. The operand is in no group:
        a `vmap` gives each mapped example its own, and the results are summed over a batch that shared it.
    """

    operands: Mapping[str, str]
    results: Mapping[str, str]
    shared: tuple[tuple[str, ...], ...] = ()
    unmapped: tuple[str, ...] = ()
    follow: tuple[str, ...] = ()
    like: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lead(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Sizes of the leading dimensions, from the shapes of the operands."""
        leads = [
            tuple(shape[: len(shape) - len(letters)])
            for shape, (name, letters) in zip(shapes, self.operands.items(), strict=True)
            if name not in self.unmapped
        ]
        return np.broadcast_shapes(*leads)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Length of each capital letter's dimension, from the shapes of the operands.

        Of the operands in `like` also those of the lower-case ones: 1 where they are shared.
        """
        found: dict[str, int] = {}
        for shape, (name, letters) in zip(shapes, self.operands.items(), strict=True):
            for size, letter in zip(shape[len(shape) - len(letters) :], letters, strict=True):
                if letter.isupper() or (name in self.like.values() and letter.islower()):
                    found.setdefault(letter, size)
        return found

    def mapped(self, operands: Sequence[Any], batched: Sequence[bool], size: int) -> list[jax.Array]:
        """The operands of a call under one more `vmap`.

        Args:
          operands: Arrays, those that are mapped over with the new axis in front.
          batched: Which are mapped over.
          size: Length of the new axis.

        Returns:
          The operands with one more leading dimension: `size`, or 1 where a group is shared along all of them.
        """
        names = list(self.operands)
        if any(is_batched and name in self.unmapped for name, is_batched in zip(names, batched, strict=True)):
            raise NotImplementedError(f"{' and '.join(self.unmapped)} cannot be mapped over: all examples share them")
        arrays = {
            name: x if is_batched or name in self.unmapped else x[None]
            for name, x, is_batched in zip(names, operands, batched, strict=True)
        }
        shapes = [x.shape for x in arrays.values()]
        lead, sizes = (size, *self.lead(shapes)[1:]), self.sizes(shapes)

        def examples(name: str) -> tuple[int, ...]:
            """The leading dimensions and the batch, which a kernel reads as one."""
            x, letters = arrays[name], self.operands[name]
            return x.shape[: x.ndim - len(letters) + (letters[:1] in ("b", "B"))]

        stay = {name for group in self.shared if all(math.prod(examples(n)) == 1 for n in group) for name in group}

        def whole(name: str) -> jax.Array:
            if name in stay or name in self.unmapped:
                return arrays[name]
            x, letters = arrays[name], self.operands[name]
            batch = (sizes["B"],) if letters[:1] in ("b", "B") else ()
            return jax.numpy.broadcast_to(x, (*lead, *batch, *x.shape[len(lead) + len(batch) :]))

        return [whole(name) for name in names]

    def unmapped_results(self, operands: Sequence[Any], results: Sequence[jax.Array]) -> list[jax.Array]:
        """The results of a call of `mapped` operands, as a call of each example would give them.

        Args:
          operands: The operands before `mapped`.
          results: Results of the call.
        """
        given = dict(zip(self.operands, operands, strict=True))

        def total(name: str, x: jax.Array) -> jax.Array:
            if name not in self.like or self.results[name][:1] != "b":
                return x
            operand = self.like[name]
            shared = given[operand].shape[given[operand].ndim - len(self.operands[operand])] == 1
            return x.sum(x.ndim - len(self.results[name]), keepdims=True) if shared else x

        return [total(name, x) for name, x in zip(self.results, results, strict=True)]


@dataclasses.dataclass(frozen=True)
class Factors:
    """How Shardy is told of a call's letters.

    Attributes:
      names: Factor of a letter, where it is not the letter itself: a name, or a compound such as "(k g)".
      sizes: Lengths of factors that appear only inside a compound.
      whole: Letters that do not split on this mesh.
      replicated: Factors that a shard wants whole. Propagation still carries a sharding along them from an operand to a
        result, which `Splitting.shard` may make use of.
      summed: Factors whose shards' results are summed.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    summed: tuple[str, ...] = ()


class Splitting:
    """Which letters of a call split over a mesh, and what a shard then computes: here, all of them, and the call.

    Attributes:
      own_programs: Letters along which a shard computes something else than the call of its part of the operands.
    """

    own_programs: frozenset[str] = frozenset()

    def factors(self, call: Any, sizes: Mapping[str, int], mesh: Mesh) -> Factors:
        """What Shardy's propagation is told."""
        del call, sizes, mesh
        return Factors()

    def splits(self, call: Any, letter: str, sizes: Mapping[str, int], shards: int) -> bool:
        """Whether a letter's dimension splits into so many shards."""
        del call, letter, sizes, shards
        return True

    def shard(
        self, call: Any, dims: Dims, sizes: Mapping[str, int], axes: dict[str, Axes], mesh: Mesh
    ) -> tuple[dict[str, Axes], Run]:
        """The mesh axes of each letter, from those that the followed arrays have, and what one shard computes."""
        del dims, sizes, mesh
        return axes, lambda bind, operands: bind(call, operands)


def sharding_rule(
    dims: Dims, splitting: Splitting, call: Any, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]
) -> tuple[str, dict[str, Any]]:
    """The Einsum-like rule of a call for Shardy, from the MLIR types of its operands and results."""
    inputs, outputs = [tuple(t.shape) for t in operands], [tuple(t.shape) for t in results]
    lead, sizes = dims.lead(inputs), dims.sizes(inputs)
    factors = splitting.factors(call, sizes, mesh)
    replicated = set(factors.replicated)
    names = (f"x{_letters(i)}" for i in itertools.count())

    def own() -> str:
        name = next(names)
        replicated.add(name)
        return name

    def words(shape: tuple[int, ...], letters: str) -> Iterator[str]:
        rank = len(shape) - len(letters)
        for i in range(rank):
            yield f"v{_letters(i)}" if shape[i] == lead[i] else own()
        for size, letter in zip(shape[rank:], letters, strict=True):
            name = letter.upper()
            splits = letter != "." and name not in factors.whole and (letter.isupper() or size == sizes[name])
            yield factors.names.get(name, name.lower()) if splits else own()

    def side(shapes: Sequence[tuple[int, ...]], letters: Mapping[str, str]) -> str:
        return ", ".join(" ".join(words(shape, of)) for shape, of in zip(shapes, letters.values(), strict=True))

    rule = f"{side(inputs, dims.operands)} -> {side(outputs, dims.results)}"
    seen = dict.fromkeys(re.findall("[a-z]+", rule))  # Shardy wants special factors in order of first appearance
    extra: dict[str, Any] = {"need_replication_factors": tuple(f for f in seen if f in replicated), **factors.sizes}
    if factors.summed:
        extra["reduction_factors"] = factors.summed
    return rule, extra


@dataclasses.dataclass(frozen=True)
class LocalCall:
    """A partitioned call.

    Attributes:
      operands: Shardings of the operands.
      results: Shardings of the results.
      run: What one shard computes.
    """

    operands: tuple[NamedSharding, ...]
    results: tuple[NamedSharding, ...]
    run: Run


def local_call(
    dims: Dims, splitting: Splitting, call: Any, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]
) -> LocalCall:
    """Where each shard of a call finds its operands, and what it computes.

    Args:
      dims: Letters of the call.
      splitting: Which of them split.
      call: Static part of the call.
      mesh: Device mesh.
      operands: Operands with `.shape` and a `NamedSharding` in `.sharding`, as custom_partitioning hands them out.
      results: Results, likewise.
    """
    arrays = dict(zip((*dims.operands, *dims.results), (*operands, *results), strict=True))
    letters = {**dims.operands, **dims.results}
    shapes = [tuple(x.shape) for x in operands]
    lead, sizes = dims.lead(shapes), dims.sizes(shapes)

    def spec(name: str) -> list[Any]:
        x = arrays[name]
        return [*x.sharding.spec, *[None] * (len(x.shape) - len(x.sharding.spec))]

    lead_axes = spec(dims.follow[0])[: len(lead)]
    axes: dict[str, Axes] = {}
    taken = {name for axis in lead_axes for name in axis_names(axis)}
    for name in dims.follow:
        of_letters = spec(name)[len(lead) :]
        for letter, axis in zip(letters[name], of_letters, strict=True):
            free = letter.isupper() and axes.get(letter) is None and not taken & set(axis_names(axis))
            if axis is not None and free and splitting.splits(call, letter, sizes, axis_size(mesh, axis)):
                axes[letter] = axis
                taken |= set(axis_names(axis))
    axes, run = splitting.shard(call, dims, sizes, axes, mesh)

    def sharding(name: str) -> NamedSharding:
        shape, rank = arrays[name].shape, len(arrays[name].shape) - len(letters[name])
        leading = [axis if shape[i] == lead[i] else None for i, axis in enumerate(lead_axes[:rank])]
        others = [
            axes.get(letter.upper()) if letter.isupper() or size == sizes.get(letter.upper()) else None
            for size, letter in zip(shape[rank:], letters[name], strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*leading, *others))

    return LocalCall(tuple(map(sharding, dims.operands)), tuple(map(sharding, dims.results)), run)


def axis_names(axis: Axes) -> tuple[str, ...]:
    """Mesh axes that a dimension is split over."""
    return (axis,) if isinstance(axis, str) else (axis or ())


def axis_size(mesh: Mesh, axis: Axes) -> int:
    """Number of shards of a dimension that is split over mesh axes."""
    return math.prod(mesh.shape[name] for name in axis_names(axis))


def _letters(i: int) -> str:
    """Factor names are letters only."""
    return chr(97 + i // 26) + chr(97 + i % 26)
