"""What one shard computes of attention whose sequence is sharded: its own rows of the lists.

Beside `sharding`, which decides that the queries T split over a mesh. A row of a list says the same wherever it lies,
so a shard computes its queries with its part of `row_offsets`; the keys and values that those rows visit come to it,
and the gradients of these go back (`context.exchange`). Rows that visit the shard's own keys alone are a call of their
own, which XLA runs beside the exchange.

Kernels count queries and keys from 0. Where positions matter, the keys keep their order, and the shard is given what
makes the first query and the first key of its call 0: a part of the numbers by distance, of the dense bias, and other
words of dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.attention import dropout, ffi
from jax_bsk.context.exchange import Exchange, Part, Positions, exchange_of, gather, sum_of_shards
from jax_bsk.core import compat
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dims import Axes, Bind, Dims, Run
from jax_bsk.core.dtypes import statistics_dtype

# Operands with a number for each entry of the lists, of both orders.
_OF_ROWS = ("gates", "row_gates", "row_bias_tiles")
_OF_COLUMNS = ("col_gates", "col_bias_tiles")
_BY_ENTRY = (*_OF_ROWS, *_OF_COLUMNS)

UNROLLED = 1 << 20  # entries up to which a search in their offsets is unrolled


@dataclasses.dataclass(frozen=True)
class SequenceShards:
    """A shard's part of a call, around what it computes of the heads.

    Attributes:
      call: Static part of the call.
      dims: Letters of the call.
      axis: Mesh axes that the queries split over.
      shards: Number of shards.
      keys_split: Whether the keys split over the same axes; else each shard is given all of them.
      inner: What the shard computes of its operands, once these are all there.
      sums_shared: Whether gradients of what all shards have (gates, terms of a bias) are summed over them.
    """

    call: Any
    dims: Dims
    axis: Axes
    shards: int
    keys_split: bool
    inner: Run
    sums_shared: bool = True

    def run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes a shard's results from its operands."""
        return compat.call_without_mesh(lambda *local: self.within(bind, local), *operands)

    def within(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The same in a program of the shard."""

        def local(call: Any, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            return self._of_rows(bind, call, dict(zip(self.dims.operands, operands, strict=True)))

        return self.inner(local, operands)

    def _of_rows(self, bind: Bind, call: Any, given: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        """The call for a shard's own rows, of whichever heads it has."""
        shard = jax.lax.axis_index(self.axis)
        positions = _positions(given)
        by_entry = [name for name in _BY_ENTRY if name in given and given[name].shape[-1]]
        exchange = None
        if self.keys_split and call.visits is not None:
            plain = positions is Positions.NONE and not by_entry and not _is_given(given, "dense_bias")
            exchange = exchange_of(call.visits, self.shards, two_parts=plain, positions=positions)
        if exchange and len(exchange.parts) == 2:
            return self._in_two(bind, call, given, exchange, shard)
        part = exchange.parts[0] if exchange else None
        x = {**given, **self._rows(given, shard)}
        # ---- keys and values
        if exchange:
            x["key"], x["value"] = exchange.bring([x["key"], x["value"]], self.axis, shard)
            x["kv_blocks"] = exchange.parts[0].ids(x["kv_blocks"], shard)
        elif self.keys_split:
            x["key"], x["value"] = (gather(x[name], self.axis) for name in ("key", "value"))
        queries, keys = x["query"].shape[-3], x["key"].shape[-3]
        of_queries = jnp.clip(x["lengths"][..., :1] - shard * queries, 0, queries)
        of_keys = jnp.full_like(of_queries, keys) if exchange else x["lengths"][..., 1:]
        x["lengths"] = jnp.concatenate([of_queries, of_keys], axis=-1)
        first_key = jnp.asarray(part.keys)[shard, 0] * call.attributes.block_kv if part else 0
        window = _Window(self.shards, queries, keys, shard * queries, first_key)
        x |= window.operands(given)
        if "dbias" in self.dims.results:
            (dbias,) = bind(call, list(x.values()))
            return (self._bias_of_all(dbias, window, given),)
        if "col_offsets" not in x:
            return bind(call, list(x.values()))
        # ---- the backward: lists of the shard's own rows by key block
        columns = self._columns(given, part, shard)
        x |= columns.lists
        for name in by_entry:
            if name in _OF_COLUMNS:
                x[name] = take_entries(given[name], columns.source)
        dquery, dkey, dvalue, dgates = bind(call, list(x.values()))
        if exchange:
            dkey, dvalue = exchange.give_back([dkey, dvalue], self.axis, shard)
        else:
            dkey, dvalue = (self._give_back(y) for y in (dkey, dvalue))
        if "col_gates" in by_entry:
            dgates = self._gates_of_all(dgates, columns, given)
        return dquery, dkey, dvalue, dgates

    def _in_two(
        self, bind: Bind, call: Any, given: dict[str, jax.Array], exchange: Exchange, shard: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The same in two calls: one of rows that need the shard's own keys alone, beside the exchange, and the rest.

        The first call has all rows, with empty lists for those of the second one, whose results take their places.
        """
        far = exchange.parts[1]
        x, y = ({**given, **self._rows(given, shard, part)} for part in exchange.parts)
        y["key"], y["value"] = exchange.bring([given["key"], given["value"]], self.axis, shard)
        rows = jnp.asarray(far.rows)[shard]
        block = given["query"].shape[-3] // far.places.shape[1]
        for name in ("query", "dout"):
            if name in given:
                y[name] = _take_rows(given[name], rows, block, -3)
        for name in ("lse", "lse_rest", "delta"):
            if name in given:
                y[name] = _take_rows(given[name], rows, block, -1)
        length = given["lengths"][..., :1] - shard * given["query"].shape[-3]
        begin = jnp.where(rows < 0, given["query"].shape[-3], rows * block)
        of_far = jnp.clip(length - of_rank(begin, length.ndim), 0, block).sum(-1, keepdims=True)
        of_near = jnp.clip(length, 0, given["query"].shape[-3])
        for z, of_queries in ((x, of_near), (y, of_far)):
            of_keys = jnp.full_like(of_queries, z["key"].shape[-3])
            z["lengths"] = jnp.concatenate([of_queries, of_keys], axis=-1).astype(given["lengths"].dtype)
        if "col_offsets" not in given:
            first, second = (bind(call, list(z.values())) for z in (x, y))
            pairs = zip(first, second, (-3, -1, -1), strict=True)
            return tuple(_set_rows(a, b, rows, block, axis) for a, b, axis in pairs)
        for z, part in zip((x, y), exchange.parts, strict=True):
            z |= self._columns(given, part, shard).lists
        dquery, dkey, dvalue, dgates = bind(call, list(x.values()))
        of_far, *others = bind(call, list(y.values()))[:3]
        dkey, dvalue = exchange.give_back(others, self.axis, shard, (dkey, dvalue))
        return _set_rows(dquery, of_far, rows, block, -3), dkey, dvalue, dgates

    # ---- lists and numbers of entries --------------------------------------------------------------------------------

    def _rows(self, given: dict[str, jax.Array], shard: jax.Array, part: Part | None = None) -> dict[str, jax.Array]:
        """The lists of a shard's rows, and what belongs to their entries.

        Where their number is known, these are without the other shards'. Of one of two parts, its rows alone: the first
        one has empty ones beside them.
        """
        rows = (given["row_offsets"].shape[-1] - 1) // self.shards
        offsets = jax.lax.dynamic_slice_in_dim(given["row_offsets"], shard * rows, rows + 1, axis=-1)
        if self.call.visits is None:
            return {"row_offsets": offsets}
        if part is not None:
            pick = functools.partial(_pick_rows, order=jnp.asarray(part.rows)[shard], capacity=part.capacity)
            for _ in range(offsets.ndim - 1):
                pick = jax.vmap(pick)
            offsets, entry = pick(offsets)
            ids, tiles = (take_entries(given[name], entry) for name in ("kv_blocks", "tiles"))
            return {"row_offsets": offsets, "kv_blocks": part.ids(ids, shard), "tiles": tiles}
        entry = offsets[..., :1] + of_rank(_count(self._capacity(given)), offsets.ndim)
        entry = jnp.minimum(entry, given["kv_blocks"].shape[-1] - 1)
        others = [name for name in _OF_ROWS if name in given and given[name].shape[-1]]
        found = {name: take_entries(given[name], entry) for name in ("kv_blocks", "tiles", *others)}
        return {"row_offsets": offsets - offsets[..., :1], **found}

    def _columns(self, given: dict[str, jax.Array], part: Part | None, shard: jax.Array) -> _Columns:
        """The part of the key-major lists that is of the shard's rows, in the order of its keys."""
        rows = (given["row_offsets"].shape[-1] - 1) // self.shards
        columns = given["col_offsets"].shape[-1] - 1
        order = _count(columns) if part is None else jnp.asarray(part.keys)[shard]
        places = _count(rows) if part is None else jnp.asarray(part.places)[shard]
        capacity = self._capacity(given) if part is None else part.capacity
        pick = functools.partial(pick_columns, first=shard * rows, places=places, order=order, capacity=capacity)
        names = ("col_offsets", "q_blocks", "col_tiles")
        for _ in range(given["q_blocks"].ndim - 1):
            pick = jax.vmap(pick)
        *lists, source = pick(*(given[name] for name in names))
        return _Columns(dict(zip(names, lists, strict=True)), source)

    def _capacity(self, given: dict[str, jax.Array]) -> int:
        """Number of entries that a shard's lists have room for."""
        return given["kv_blocks"].shape[-1] if self.call.visits is None else self.call.visits.capacity(self.shards)

    def _gates_of_all(self, dgates: jax.Array, columns: _Columns, given: dict[str, jax.Array]) -> jax.Array:
        """The gradient of all gates in the order of the whole key-major lists."""
        lead, capacity = dgates.shape[:-1], given["col_gates"].shape[-1]
        number = of_rank(_count(dgates.shape[-1]), columns.source.ndim)
        own = number < columns.lists["col_offsets"][..., -1:]
        # What is past the end of a shard's lists goes nowhere: to places outside, of which no two are equal.
        places = jnp.where(own, columns.source, capacity + number)
        places = jnp.broadcast_to(places, dgates.shape)

        def spread(numbers: jax.Array, places: jax.Array) -> jax.Array:
            zeros = jnp.zeros(capacity, numbers.dtype)
            return zeros.at[places].set(numbers, mode="drop", unique_indices=True)

        for _ in lead:
            spread = jax.vmap(spread)
        spread_out = spread(dgates, places)  # every entry is one shard's: nothing is rounded in a sum
        return jax.lax.psum(spread_out, self.axis) if self.sums_shared else spread_out

    def _bias_of_all(self, dbias: jax.Array, window: _Window, given: dict[str, jax.Array]) -> jax.Array:
        """The gradient of a term of the bias from that of what the shard was given of it."""
        if self.call.term is ffi.BiasTerm.DISTANCES:
            dbias = window.distances_of_all(dbias, given["distance_bias"])
        elif self.call.term is ffi.BiasTerm.DENSE:
            dbias = window.dense_of_all(dbias, given["dense_bias"])
            if given["dense_bias"].shape[-2] > 1:  # each shard has its own rows
                return dbias
        if not self.sums_shared:
            return dbias
        return jax.lax.psum(dbias.astype(given["lse"].dtype), self.axis).astype(dbias.dtype)

    # ---- keys -------------------------------------------------------------------------------------------------------

    def _give_back(self, dx: jax.Array) -> jax.Array:
        if self.keys_split:
            return sum_of_shards(dx, self.axis, self.shards)
        return jax.lax.psum(dx.astype(statistics_dtype(dx.dtype)), self.axis).astype(dx.dtype)


def in_shard_map(native: Any, dims: Dims, call: Any, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
    """A native call inside a `shard_map`, of a shard's own queries, keys and values and the whole lists.

    Args:
      native: The call that a shard computes, `native(call, *operands)`.
      dims: Letters of the call.
      call: Static part of the call; its `axis` names the mesh axes.
      operands: Operands of the call.

    Returns:
      The shard's results. Those of gates, which are not sharded, are the shard's part of the sum over all shards.
    """
    local = dataclasses.replace(call, visits=None, axis=None)
    shards = jax.lax.axis_size(call.axis)
    parts = SequenceShards(call, dims, call.axis, shards, True, lambda bind, x: bind(call, x), sums_shared=False)
    return parts.within(lambda _, x: native(local, *x), [jnp.asarray(compat.staged(x)) for x in operands])


@dataclasses.dataclass(frozen=True)
class _Window:
    """The queries and keys of a shard's call, as a part of the whole sequence's.

    Attributes:
      shards: Number of shards.
      queries: Number of queries, the same of each shard.
      keys: Number of keys.
      first_query: Position of the first query, a multiple of 32.
      first_key: Position of the first key, where positions are kept.
    """

    shards: int
    queries: int
    keys: int
    first_query: Any
    first_key: Any

    def operands(self, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What depends on positions, for queries and keys that are counted from the window's first ones."""
        found = {}
        if _is_given(given, "distance_bias"):
            length = self.queries + self.keys - 1
            found["distance_bias"] = jax.lax.dynamic_slice_in_dim(
                given["distance_bias"], self._first_distance, length, axis=-1
            )
        if _is_given(given, "dense_bias") and given["dense_bias"].shape[-1] not in (1, self.keys):
            found["dense_bias"] = jax.lax.dynamic_slice_in_dim(given["dense_bias"], self.first_key, self.keys, axis=-1)
        if _is_given(given, "dropout_keys"):
            found["dropout_keys"] = dropout.keys_from(given["dropout_keys"], self.first_query)
        return found

    def distances_of_all(self, dbias: jax.Array, distances: jax.Array) -> jax.Array:
        """The gradient of all numbers by distance, [.., 2, T + S - 1]."""
        zeros = jnp.zeros((*dbias.shape[:-1], distances.shape[-1]), dbias.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, dbias, self._first_distance, axis=-1)

    def dense_of_all(self, dbias: jax.Array, dense: jax.Array) -> jax.Array:
        """The gradient of the dense bias of all keys."""
        if dbias.shape[-1] == dense.shape[-1]:
            return dbias
        zeros = jnp.zeros((*dbias.shape[:-1], dense.shape[-1]), dbias.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, dbias, self.first_key, axis=-1)

    @property
    def _first_distance(self) -> Any:
        """Where the numbers of its distances begin: of key s and query t of all, number s - t + T - 1 is the bias."""
        return self.first_key - self.first_query + (self.shards - 1) * self.queries


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A shard's key-major lists.

    Attributes:
      lists: col_offsets, q_blocks (counted from the shard's first row) and col_tiles.
      source: int32 [.., capacity], the place of each entry in the whole lists.
    """

    lists: dict[str, jax.Array]
    source: jax.Array


def _is_given(given: dict[str, jax.Array], name: str) -> bool:
    return name in given and given[name].shape[-1] > 0


def _positions(given: dict[str, jax.Array]) -> Positions:
    """What of the keys' positions a call depends on."""
    if _is_given(given, "dropout_keys"):
        return Positions.ABSOLUTE
    dense = _is_given(given, "dense_bias") and given["dense_bias"].shape[-1] > 1
    return Positions.RELATIVE if dense or _is_given(given, "distance_bias") else Positions.NONE


def _pick_rows(offsets: jax.Array, *, order: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The offsets of the rows `order` (-1 is an empty one) of one list, and where each of their entries was in it."""
    count = jnp.where(order < 0, 0, jnp.diff(offsets)[order])
    new_offsets, place, row = _places(count, capacity)
    return new_offsets, jnp.where(place < new_offsets[-1], offsets[order[row]] + place - new_offsets[row], 0)


def pick_columns(
    offsets: jax.Array,
    ids: jax.Array,
    tiles: jax.Array,
    *,
    first: Any,
    places: jax.Array,
    order: jax.Array,
    capacity: int,
) -> tuple[jax.Array, ...]:
    """The entries of some rows of one key-major list, for the columns `order` (-1 is an empty one).

    Their order within a column stays. There are at most `capacity` of them. Row `first + i` becomes row `places[i]`;
    where that is -1, and before and after these rows, there are none.
    """
    entry, rows = _count(ids.shape[0]), places.shape[0]
    place_of = places[jnp.clip(ids - first, 0, rows - 1)]
    own = (ids >= first) & (ids < first + rows) & (place_of >= 0) & (entry < offsets[-1])
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(own, dtype=jnp.int32)])
    # Of each column, how many own entries are before it, and in it.
    begin = before[jnp.clip(offsets, 0, ids.shape[0])]
    count = jnp.where(order < 0, 0, jnp.diff(begin)[order])
    new_offsets, place, column = _places(count, capacity)
    # Of each new entry its number among the own ones in their old order.
    number = begin[order[column]] + place - new_offsets[column]
    outside = capacity + entry
    old = jnp.zeros(capacity, jnp.int32)
    old = old.at[jnp.where(own, before[:-1], outside)].set(entry, mode="drop", unique_indices=True)
    source = old[jnp.clip(number, 0, capacity - 1)]
    listed = place < new_offsets[-1]
    return new_offsets, jnp.where(listed, place_of[source], -1), jnp.where(listed, tiles[source], -1), source


def _places(count: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The offsets of lists of these lengths, and for each of `capacity` entries its number and its list."""
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    place = _count(capacity)
    lists = count.shape[0]

    def halve(level: Any, found: jax.Array) -> jax.Array:
        """The last list that begins at or before the entry, one more bit of its number."""
        further = found + (1 << (bits - 1 - level))
        begins = offsets[jnp.minimum(further, lists - 1)] <= place
        return jnp.where((further < lists) & begins, further, found)

    # Unrolled, the search is one kernel; as a loop it is some sixty small ones, 0.4 ms on an H200. But results of all
    # its levels may stay in memory together, so that it is a loop for long lists. (Not jnp.searchsorted, which jax
    # 0.10.2 does not trace inside a shard_map that is manual over some axes only.)
    found, bits = jnp.zeros_like(place), (lists - 1).bit_length()
    if capacity > UNROLLED:
        return offsets, place, jax.lax.fori_loop(0, bits, halve, found)
    for level in range(bits):
        found = halve(level, found)
    return offsets, place, found


def _take_rows(x: jax.Array, rows: jax.Array, block: int, axis: int) -> jax.Array:
    """The rows of blocks `rows` along an axis of tokens, counted from the end; -1 is any."""
    split = x.reshape(*x.shape[: x.ndim + axis], -1, block, *x.shape[x.ndim + axis + 1 :])
    found = jnp.take(split, jnp.maximum(rows, 0), axis=axis - 1)
    return found.reshape(*x.shape[: x.ndim + axis], -1, *x.shape[x.ndim + axis + 1 :])


def _set_rows(x: jax.Array, values: jax.Array, rows: jax.Array, block: int, axis: int) -> jax.Array:
    """`x` with the rows of blocks `rows` (-1 is none) replaced by those of `values`; see `_take_rows`."""
    after = x.shape[x.ndim + axis + 1 :]
    split, new = (y.reshape(*y.shape[: x.ndim + axis], -1, block, *after) for y in (x, values))
    count = split.shape[axis - 1]
    rows = jnp.where(rows < 0, count + _count(rows.shape[0]), rows)
    at = (..., rows, *[slice(None)] * -axis)
    return split.at[at].set(new, mode="drop", unique_indices=True).reshape(x.shape)


def _count(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def take_entries(numbers: jax.Array, entries: jax.Array) -> jax.Array:
    """numbers[.., entries[..]], of which either may be shared along leading dimensions."""
    shape = np.broadcast_shapes(numbers.shape[:-1], entries.shape[:-1])
    numbers = jnp.broadcast_to(numbers, (*shape, numbers.shape[-1]))
    return jnp.take_along_axis(numbers, jnp.broadcast_to(entries, (*shape, entries.shape[-1])), axis=-1)
