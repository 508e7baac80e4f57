"""A backward call in parts, one after the other, so that its temporary memory is bounded.

Beside `native`, whose backward takes this way when it is lowered. There the shapes are those that one device has,
whatever is mapped, sharded or rematerialised around the call. The Hopper backward needs dS, the gradient of the logits,
of each visited block of three key/value heads with their query heads (`csrc/attention/sm90/bwd_plan.h`): 17 GB per
query head for causal attention over 131,072 tokens. Where this is more than a bound, a loop calls the same kernels for
some query heads of each group and for some rows of the lists at a time. So the program has one call, and memory for one
part.

A part has all queries and keys at their positions, and lists that are empty but for its rows. Each row is in one part,
which visits the row's blocks in their order: the gradient of a query is that of one call. The gradients of keys and
values are summed over the parts in float32, in the order of the parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_bsk.attention import ffi
from jax_bsk.attention.sequence import pick_columns, take_entries
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dims import Dims
from jax_bsk.core.dtypes import statistics_dtype

# Most bytes of dS of a call, per platform; kernels for the CPU store none. It is more than the 2 GiB that kernels take
# for speed alone (`kPlentyBytes`). Each part reads and writes the whole sums of the gradients of keys and values,
# so that few large parts are better than many small ones: 8 GiB are a tenth of the memory of an H100.
BOUNDS = {"cuda": 8 << 30}

_OF_ROWS = ("kv_blocks", "tiles", "row_gates", "row_bias_tiles")  # a number per entry of the query-major lists
_OF_COLUMNS = ("col_gates", "col_bias_tiles")  # beside those lists themselves

Bind = Callable[..., Sequence[jax.Array]]  # the operands of a call to its results


@dataclasses.dataclass(frozen=True)
class Division:
    """How a call is divided.

    Attributes:
      members: Query heads of each group in a part.
      parts: Number of parts of the lists.
      step: Number of entries within which the rows of a part begin.
      capacity: Number of entries that the lists of a part have room for; the last row of a part may end past `step`.
    """

    members: int
    parts: int
    step: int
    capacity: int


def division(
    bound: int, group: int, blocks: tuple[int, int], capacity: int, block_size: tuple[int, int]
) -> Division | None:
    """The fewest parts with no more dS than the bound, or None where one call has no more, or cannot be divided.

    Nothing here depends on batch or key/value heads, which may be split over devices: on any number of them gradients
    are sums of the same parts.

    Args:
      bound: Bytes.
      group: Query heads per key/value head.
      blocks: Numbers of query blocks and of key blocks.
      capacity: Number of entries that each list has room for.
      block_size: (block_q, block_kv).
    """
    if not capacity or not group or not blocks[0]:
        return None

    def fits(members: int, entries: int) -> bool:
        return ffi.backward_dlogits(members, entries, block_size) <= bound

    for members in range(group, 0, -1):
        if group % members == 0 and fits(members, capacity):
            return None if members == group else Division(members, 1, capacity, capacity)
    fitting, too_many = 0, capacity  # numbers of entries, with one query head of each group
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(1, middle) else (fitting, middle)
    # A row has at most as many entries as there are key blocks. `BlockMask.from_indices` may list blocks twice; its
    # rows have room for equal shares of the capacity.
    longest = min(max(blocks[1], -(-capacity // blocks[0])), capacity)
    step = max(fitting - longest + 1, longest)
    room = step + longest - 1
    if room < capacity:
        return Division(1, -(-capacity // step), step, room)
    return None if group == 1 else Division(1, 1, capacity, capacity)


def run(bind: Bind, dims: Dims, cut: Division, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """The results of a backward call, from calls of its parts.

    Args:
      bind: The call as a function of its operands.
      dims: Letters of the call.
      cut: The parts.
      operands: Operands of the whole call.
    """
    given = dict(zip(dims.operands, operands, strict=True))
    heads = _Heads(given["query"].shape[-2], given["key"].shape[-2], cut.members)

    def of_members(i: Any, found: _Gradients) -> _Gradients:
        x = {name: heads.cut(y, dims.operands[name], i) for name, y in given.items()}
        part = _of_lists(bind, cut, x, found)
        whole = (heads.put(y, z, letters, i) for y, z, letters in zip(found, part, dims.results.values(), strict=True))
        return _Gradients(*whole)

    first = [jnp.zeros_like(given[name]) for name in ("query", "key", "value", "col_gates")]
    first[1:3] = [x.astype(statistics_dtype(x.dtype)) for x in first[1:3]]
    found = _repeat(heads.count, of_members, _Gradients(*first))
    dtype = given["key"].dtype
    return [found.dquery, found.dkey.astype(dtype), found.dvalue.astype(dtype), found.dgates]


class _Gradients(NamedTuple):
    """The results of the parts so far: in the order of the call's, dkey and dvalue in the statistics type."""

    dquery: jax.Array
    dkey: jax.Array
    dvalue: jax.Array
    dgates: jax.Array


def _repeat(count: int, body: Callable[[Any, _Gradients], _Gradients], first: _Gradients) -> _Gradients:
    """`body` of each number below `count`, one after the other."""
    return body(0, first) if count == 1 else jax.lax.fori_loop(0, count, body, first)


# ---- query heads ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The query heads of the parts: some of each group.

    Attributes:
      heads: Query heads of the whole call.
      kv_heads: Key/value heads.
      members: Query heads of each group in a part.
    """

    heads: int
    kv_heads: int
    members: int

    @property
    def count(self) -> int:
        """Number of parts."""
        return self.heads // (self.kv_heads * self.members)

    def cut(self, x: jax.Array, letters: str, i: Any) -> jax.Array:
        """What an array with these letters has of part i."""
        if (axis := self._axis(x, letters)) is None:
            return x
        part = jax.lax.dynamic_slice_in_dim(self._grouped(x, axis), i * self.members, self.members, axis + 1)
        return part.reshape(*x.shape[:axis], self.kv_heads * self.members, *x.shape[axis + 1 :])

    def put(self, x: jax.Array, part: jax.Array, letters: str, i: Any) -> jax.Array:
        """The array with what part i has of it in its place; the part where it has all."""
        if (axis := self._axis(x, letters)) is None:
            return part
        grouped = self._grouped(x, axis)
        part = self._grouped(part, axis)
        return jax.lax.dynamic_update_slice_in_dim(grouped, part, i * self.members, axis + 1).reshape(x.shape)

    def _axis(self, x: jax.Array, letters: str) -> int | None:
        """The axis of the query heads, None where each part has all of the array."""
        place = letters.upper().find("N")
        axis = x.ndim - len(letters) + place
        return axis if self.count > 1 and place >= 0 and x.shape[axis] == self.heads else None

    def _grouped(self, x: jax.Array, axis: int) -> jax.Array:
        """[.., N, ..] to [.., K, N / K, ..]."""
        return x.reshape(*x.shape[:axis], self.kv_heads, -1, *x.shape[axis + 1 :])


# ---- rows of the lists ------------------------------------------------------------------------------------------


def _of_lists(bind: Bind, cut: Division, given: Mapping[str, jax.Array], found: _Gradients) -> _Gradients:
    """The gradients of some heads; those of keys and values are added to what was found."""

    def call(x: Mapping[str, jax.Array], sums: _Gradients) -> _Gradients:
        dquery, dkey, dvalue, dgates = bind(*x.values())
        dkey, dvalue = (a + b.astype(a.dtype) for a, b in ((sums.dkey, dkey), (sums.dvalue, dvalue)))
        return _Gradients(dquery, dkey, dvalue, dgates)

    if cut.parts == 1:
        return call(given, found)
    lists = _Lists.of(cut, given)

    def of_rows(i: Any, sums: _Gradients) -> _Gradients:
        x, source = lists.part(i)
        part = call({**given, **x}, sums)
        return part._replace(
            dquery=sums.dquery + part.dquery,  # of which one has a row
            dgates=_put_entries(sums.dgates, part.dgates, x["col_offsets"][..., -1:], source),
        )

    query, block = given["query"], given["bit_tiles"].shape[-2]
    refused = jnp.repeat(lists.refused, block, axis=-1)[..., : query.shape[-3]]
    dquery = jnp.where(jnp.swapaxes(refused, -1, -2)[..., None], jnp.nan, jnp.zeros_like(query))
    return _repeat(cut.parts, of_rows, found._replace(dquery=dquery, dgates=jnp.zeros_like(given["col_gates"])))


@dataclasses.dataclass(frozen=True, eq=False)
class _Lists:
    """The lists of a call, of which parts have some rows.

    Attributes:
      cut: The parts.
      given: Operands of the call.
      offsets: int32 [.., rows + 1], `row_offsets` that do not decrease.
      part_of: int32 [.., rows], the part of each row: that in whose entries it begins.
      refused: bool [.., rows], rows that kernels refuse for their offsets; a part might not see why.
    """

    cut: Division
    given: Mapping[str, jax.Array]
    offsets: jax.Array
    part_of: jax.Array
    refused: jax.Array

    @classmethod
    def of(cls, cut: Division, given: Mapping[str, jax.Array]) -> _Lists:
        """The lists of a call's operands."""
        read = given["row_offsets"]
        offsets = jax.lax.cummax(jnp.maximum(read, 0), axis=read.ndim - 1)
        part_of = jnp.clip((offsets[..., :-1] - offsets[..., :1]) // cut.step, 0, cut.parts - 1)
        wrong = (read != offsets) | (read > given["kv_blocks"].shape[-1])
        return cls(cut, given, offsets, part_of, wrong[..., :-1] | wrong[..., 1:])

    def part(self, i: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        """The lists of part i with what belongs to their entries, and of the key-major entries their old places."""
        given, capacity = self.given, self.cut.capacity
        first, end = (
            compare(self.part_of, i).sum(-1, keepdims=True, dtype=jnp.int32) for compare in (jnp.less, jnp.less_equal)
        )
        low, high = (jnp.take_along_axis(self.offsets, row, axis=-1) for row in (first, end))
        entry = low + of_rank(jnp.arange(capacity, dtype=jnp.int32), low.ndim)
        entry = jnp.minimum(entry, given["kv_blocks"].shape[-1] - 1)
        x = {name: take_entries(given[name], entry) for name in _OF_ROWS if given[name].shape[-1]}
        x["row_offsets"] = jnp.clip(self.offsets, low, high) - low
        row = of_rank(jnp.arange(self.part_of.shape[-1], dtype=jnp.int32), low.ndim)
        places = jnp.where((row >= first) & (row < end), row, -1)
        names = ("col_offsets", "q_blocks", "col_tiles")
        columns = jnp.arange(given["col_offsets"].shape[-1] - 1, dtype=jnp.int32)
        pick: Any = functools.partial(_pick, columns, capacity)
        for _ in range(places.ndim - 1):
            pick = jax.vmap(pick)
        *lists, source = pick(places, *(given[name] for name in names))
        x |= dict(zip(names, lists, strict=True))
        return x | {name: take_entries(given[name], source) for name in _OF_COLUMNS if given[name].shape[-1]}, source


def _pick(columns: jax.Array, capacity: int, places: jax.Array, *lists: jax.Array) -> tuple[jax.Array, ...]:
    return pick_columns(*lists, first=0, places=places, order=columns, capacity=capacity)


def _put_entries(x: jax.Array, part: jax.Array, count: jax.Array, source: jax.Array) -> jax.Array:
    """The numbers [.., N, capacity] of all entries, with the first `count` of a part's at their places `source`."""
    if not x.shape[-1]:  # there are no gates
        return x
    number = of_rank(jnp.arange(part.shape[-1], dtype=jnp.int32), source.ndim)
    # What is past the end of a part's lists goes nowhere: to places outside, of which no two are equal.
    places = jnp.where(number < count, source, x.shape[-1] + number)
    put: Any = lambda x, part, places: x.at[places].set(part, mode="drop", unique_indices=True)  # noqa: E731
    for _ in range(x.ndim - 1):
        put = jax.vmap(put)
    return put(x, part, jnp.broadcast_to(places, part.shape))
