"""What one shard computes of attention whose sequence is sharded: its own rows of the lists.

Beside `sharding`, which decides that the queries T split over a mesh. A row of a list says the same wherever it lies,
so a shard computes its queries with its part of `row_offsets`; the keys and values that those rows visit come to it,
and the gradients of these go back (`context.exchange`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.context.exchange import Exchange, exchange_of, gather, sum_of_shards
from jax_bsk.core import compat
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dims import Axes, Bind, Dims, Run
from jax_bsk.core.dtypes import statistics_dtype


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
    """

    call: Any
    dims: Dims
    axis: Axes
    shards: int
    keys_split: bool
    inner: Run

    def run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Computes a shard's results from its operands."""
        return compat.call_without_mesh(lambda *local: self._run(bind, local), *operands)

    def _run(self, bind: Bind, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        def local(call: Any, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            return self._of_rows(bind, call, dict(zip(self.dims.operands, operands, strict=True)))

        return self.inner(local, operands)

    def _of_rows(self, bind: Bind, call: Any, given: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        """The call for a shard's own rows, of whichever heads it has."""
        shard = jax.lax.axis_index(self.axis)
        exchange = exchange_of(call.visits, self.shards) if self.keys_split and call.visits is not None else None
        x = {**given, **self._rows(given, shard)}
        # ---- keys and values
        if self.keys_split:
            for name in ("key", "value"):
                x[name] = exchange.bring(x[name], self.axis, shard) if exchange else gather(x[name], self.axis)
        if exchange:
            x["kv_blocks"] = exchange.ids(x["kv_blocks"], shard)
        queries, keys = x["query"].shape[-3], x["key"].shape[-3]
        of_queries = jnp.clip(x["lengths"][..., :1] - shard * queries, 0, queries)
        of_keys = jnp.full_like(of_queries, keys) if exchange else x["lengths"][..., 1:]
        x["lengths"] = jnp.concatenate([of_queries, of_keys], axis=-1)
        if "col_offsets" not in x:
            return bind(call, list(x.values()))
        # ---- the backward: lists of the shard's own rows by key block
        columns = self._columns(given, exchange, shard)
        x |= columns.lists
        gated = given["col_gates"].shape[-1] > 0
        if gated:
            x["col_gates"] = _take(given["col_gates"], columns.source)
        dquery, dkey, dvalue, dgates = bind(call, list(x.values()))
        dkey, dvalue = (self._give_back(y, exchange, shard) for y in (dkey, dvalue))
        if gated:
            dgates = self._gates_of_all(dgates, columns, given)
        return dquery, dkey, dvalue, dgates

    # ---- lists and gates --------------------------------------------------------------------------------------------

    def _rows(self, given: dict[str, jax.Array], shard: jax.Array) -> dict[str, jax.Array]:
        """The lists of a shard's rows, and their gates; where their number is known, without the other shards'."""
        rows = (given["row_offsets"].shape[-1] - 1) // self.shards
        offsets = jax.lax.dynamic_slice_in_dim(given["row_offsets"], shard * rows, rows + 1, axis=-1)
        if self.call.visits is None:
            return {"row_offsets": offsets}
        entry = offsets[..., :1] + of_rank(_count(self._capacity(given)), offsets.ndim)
        entry = jnp.minimum(entry, given["kv_blocks"].shape[-1] - 1)
        gates = [name for name in ("gates", "row_gates") if name in given and given[name].shape[-1]]
        found = {name: _take(given[name], entry) for name in ("kv_blocks", "tiles", *gates)}
        return {"row_offsets": offsets - offsets[..., :1], **found}

    def _columns(self, given: dict[str, jax.Array], exchange: Exchange | None, shard: jax.Array) -> _Columns:
        """The part of the key-major lists that is of the shard's rows, in the order of its keys."""
        rows = (given["row_offsets"].shape[-1] - 1) // self.shards
        columns = given["col_offsets"].shape[-1] - 1
        order = _count(columns) if exchange is None else exchange.columns(shard)
        pick = functools.partial(_pick, first=shard * rows, rows=rows, order=order, capacity=self._capacity(given))
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
        return jax.lax.psum(spread(dgates, places), self.axis)  # every entry is one shard's: nothing is rounded

    # ---- keys -------------------------------------------------------------------------------------------------------

    def _give_back(self, dx: jax.Array, exchange: Exchange | None, shard: jax.Array) -> jax.Array:
        if exchange:
            return exchange.give_back(dx, self.axis, shard)
        if self.keys_split:
            return sum_of_shards(dx, self.axis, self.shards)
        return jax.lax.psum(dx.astype(statistics_dtype(dx.dtype)), self.axis).astype(dx.dtype)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A shard's key-major lists.

    Attributes:
      lists: col_offsets, q_blocks (counted from the shard's first row) and col_tiles.
      source: int32 [.., capacity], the place of each entry in the whole lists.
    """

    lists: dict[str, jax.Array]
    source: jax.Array


def _pick(
    offsets: jax.Array, ids: jax.Array, tiles: jax.Array, *, first: Any, rows: int, order: jax.Array, capacity: int
) -> tuple[jax.Array, ...]:
    """The entries of some rows of one key-major list, for the columns `order` (-1 is an empty one).

    Their order within a column stays. There are at most `capacity` of them.
    """
    entry = _count(ids.shape[0])
    own = (ids >= first) & (ids < first + rows) & (entry < offsets[-1])
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(own, dtype=jnp.int32)])
    # Of each column, how many own entries are before it, and in it.
    begin = before[jnp.clip(offsets, 0, ids.shape[0])]
    count = jnp.where(order < 0, 0, jnp.diff(begin)[order])
    new_offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    # Of each new entry its column, and its number among the own ones in their old order.
    place = _count(capacity)
    column = jnp.clip(jnp.searchsorted(new_offsets, place, side="right").astype(jnp.int32) - 1, 0, order.shape[0] - 1)
    number = begin[order[column]] + place - new_offsets[column]
    outside = capacity + entry
    old = jnp.zeros(capacity, jnp.int32)
    old = old.at[jnp.where(own, before[:-1], outside)].set(entry, mode="drop", unique_indices=True)
    source = old[jnp.clip(number, 0, capacity - 1)]
    listed = place < new_offsets[-1]
    return new_offsets, jnp.where(listed, ids[source] - first, -1), jnp.where(listed, tiles[source], -1), source


def _count(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _take(numbers: jax.Array, entries: jax.Array) -> jax.Array:
    """numbers[.., entries[..]], of which either may be shared along leading dimensions."""
    shape = np.broadcast_shapes(numbers.shape[:-1], entries.shape[:-1])
    numbers = jnp.broadcast_to(numbers, (*shape, numbers.shape[-1]))
    return jnp.take_along_axis(numbers, jnp.broadcast_to(entries, (*shape, entries.shape[-1])), axis=-1)
