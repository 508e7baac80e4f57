"""How the key blocks of a sharded sequence travel: to the shards whose queries visit them, and their gradients back.

Shard i of n has the key blocks [i m, (i + 1) m). An `Exchange` is fixed when a program is compiled:

- Blocks that most shards visit (those of global tokens) are gathered by all.
- The others travel in at most n - 1 steps. In step s each shard i sends to shard i + s what that one needs of it, so
  that all links are busy at once and one step's blocks have one shape. A pair of shards that shares nothing takes no
  part, and a step without pairs does not exist.
- Where nearly everything is wanted, or where the lists have no values yet, all keys are gathered instead.

A shard's keys are then its own, followed by what came; `slots` says where a block lies among them, and the ids in the
shard's lists are replaced by it. A row visits the same blocks in the same order as on one device, so outputs and the
gradients of queries have the same bits.

Where few rows visit others' keys, they are a `Part` of their own, with the own blocks that they visit and what came.
The other rows need nothing that travels, and their keys are not copied.

What depends on positions (biases, dropout) wants keys at the `Positions` that they have in the sequence. As much
travels; the blocks are then copied to their places among blocks that nobody visits.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.context.visits import Visits
from jax_bsk.core.dims import Axes
from jax_bsk.core.dtypes import statistics_dtype

# Share of all foreign blocks from which on all keys are gathered: that sends a little more, in one call.
GATHER_FROM = 0.9
# What a step costs beside its blocks, as a number of blocks: some 20 us of latency, in which 300 GB/s bring as many of
# 128 tokens, 8 heads and 128 numbers in bfloat16, keys and values.
STEP_BLOCKS = 10
# Rows that visit other shards' keys are computed apart from the rest where they, and the own keys that they visit, are
# together at most this share of the shard's: it costs a copy of these, and spares one of all keys.
TWO_PARTS_TO = 1.0


class Positions(enum.Enum):
    """What a shard's keys keep of their positions in the sequence."""

    NONE = "none"  # the shard's own keys come first, then the others', each packed
    RELATIVE = "relative"  # their distances: all positions are less by the same number, that of the first key
    ABSOLUTE = "absolute"  # the positions: there is room for the keys of all shards


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What travels at once.

    Attributes:
      pairs: (from, to) of each transfer; none where all shards gather the blocks.
      blocks: int32 [shards, count], the sender's own blocks that it sends, ascending; past their end `m`, which is no
        block.
    """

    pairs: tuple[tuple[int, int], ...]
    blocks: np.ndarray

    @property
    def gathers(self) -> bool:
        """Whether every shard receives the blocks of all."""
        return not self.pairs

    @property
    def count(self) -> int:
        """Number of key blocks by which a shard's keys grow."""
        shards, count = self.blocks.shape
        return shards * count if self.gathers else count

    # ---- within a shard's program -----------------------------------------------------------------------------------

    def send(self, blocks: Sequence[jax.Array], axis: Axes, shard: jax.Array) -> jax.Array:
        """What comes to a shard, [.., count, block, K, H + ..], from its own blocks, arrays [.., m, block, K, H]."""
        sent = jnp.asarray(self.blocks)[shard]
        joint = jnp.concatenate([jnp.take(x, sent, axis=-4, mode="clip") for x in blocks], axis=-1)
        if self.gathers:
            return jax.lax.all_gather(joint, axis, axis=joint.ndim - 4, tiled=True)
        return jax.lax.ppermute(joint, axis, self.pairs)

    def send_back(self, parts: jax.Array, axis: Axes, shards: int) -> list[jax.Array]:
        """The parts of the gradients of a shard's own blocks that others made, from those of what came to it."""
        if not self.gathers:
            return [jax.lax.ppermute(parts, axis, [(to, source) for source, to in self.pairs])]
        at = parts.ndim - 4
        came = jax.lax.all_to_all(parts, axis, split_axis=at, concat_axis=at, tiled=True)
        return jnp.split(came, shards, axis=at)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Rows of each shard that are computed together, and the keys that they are given.

    Attributes:
      rows: int32 [shards, count], the shard's query block at each place, ascending; -1 where the list is empty.
      places: int32 [shards, query blocks of a shard], place of each; -1 where it is not among `rows`.
      keys: int32 [shards, count], the key block at each place among the part's keys; -1 where there is only padding.
      slots: int32 [shards, n m], place of each key block among `keys`; -1 where it is not.
      capacity: Number of entries of the longest list, at least 1.
    """

    rows: np.ndarray
    places: np.ndarray
    keys: np.ndarray
    slots: np.ndarray
    capacity: int

    @classmethod
    def of(cls, visits: Visits, chosen: np.ndarray, keys: np.ndarray, *, packed: bool = False) -> Part:
        """A part of the rows `chosen`, bool [rows], with the keys `keys`.

        The rows stay where they are, and the others have empty lists; or they are packed together.
        """
        shards = keys.shape[0]
        of_shards = chosen.reshape(shards, -1)
        if packed:
            rows = _table(of_shards, -1)
            places = np.where(of_shards, np.cumsum(of_shards, axis=1) - 1, -1).astype(np.int32)
        else:
            rows = places = np.where(of_shards, np.arange(of_shards.shape[1]), -1).astype(np.int32)
        slots = np.full((shards, visits.columns), -1, np.int32)
        shard, place = np.nonzero(keys >= 0)
        slots[shard, keys[shard, place]] = place
        return cls(rows, places, keys, slots, visits.capacity(shards, chosen))

    def ids(self, ids: jax.Array, shard: jax.Array) -> jax.Array:
        """The ids of a shard's lists as places among the part's keys; ids that are out of range stay so."""
        slots = jnp.asarray(self.slots)[shard]
        known = (ids >= 0) & (ids < slots.shape[0])
        found = slots[jnp.clip(ids, 0, slots.shape[0] - 1)]
        return jnp.where(known & (found >= 0), found, jnp.int32(2**31 - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The steps of an exchange.

    Attributes:
      shards: Number of shards, n.
      own: Key blocks of a shard, m.
      steps: Steps of the exchange.
      slots: int32 [shards, n m], place of each key block among a shard's keys; -1 where it does not come.
      returned: int32 [shards, count], the shard's own blocks that travel; past their end `m`.
      parts: All rows of a shard; or the rows that visit the shard's own keys alone, and the others.
      kept: int32 [shards, count], own blocks that the second of two parts visits; past their end `m`. None of one part.
      spread: Where keys keep their positions, int32 [shards, count], for each place among the keys of the one part the
        slot of its block; of a block that does not come, any. None where the slots are the places.
    """

    shards: int
    own: int
    steps: tuple[Step, ...]
    slots: np.ndarray
    returned: np.ndarray
    parts: tuple[Part, ...] = ()
    kept: np.ndarray | None = None
    spread: np.ndarray | None = None

    def received(self) -> np.ndarray:
        """int64 [shards]: key blocks that each shard receives from others, padding included."""
        counts = np.zeros(self.shards, np.int64)
        for step in self.steps:
            size = step.blocks.shape[1]
            counts += (self.shards - 1) * size if step.gathers else 0
            for _, to in step.pairs:
                counts[to] += size
        return counts

    @property
    def keys(self) -> np.ndarray:
        """int32 [shards, blocks]: the key block at each place among a shard's keys; -1 where there is only padding."""
        table = np.full((self.shards, self.own + sum(step.count for step in self.steps)), -1, np.int32)
        shards, blocks = np.nonzero(self.slots >= 0)
        table[shards, self.slots[shards, blocks]] = blocks
        return table

    # ---- within a shard's program -----------------------------------------------------------------------------------

    def bring(self, arrays: Sequence[jax.Array], axis: Axes, shard: jax.Array) -> list[jax.Array]:
        """The keys and values that a shard needs, [.., S', K, H], from its own, [.., S / n, K, H].

        They travel together. Of two parts, these are those of the second one. Where positions are kept, blocks that
        the shard does not need hold any keys.
        """
        found = self._packed(arrays, axis, shard)
        if self.spread is None:
            return found
        places = jnp.asarray(self.spread)[shard]
        size = arrays[0].shape[-3] // self.own
        return [_tokens(jnp.take(_blocks(x, size), places, axis=-4, mode="clip")) for x in found]

    def _packed(self, arrays: Sequence[jax.Array], axis: Axes, shard: jax.Array) -> list[jax.Array]:
        if not self.steps:
            return list(arrays)
        blocks = [self._blocks(x) for x in arrays]
        ends = np.cumsum([x.shape[-1] for x in arrays])[:-1]
        joint = [jnp.split(step.send(blocks, axis, shard), ends, axis=-1) for step in self.steps]
        came = [[_tokens(x) for x in xs] for xs in zip(*joint, strict=True)]
        if self.kept is not None:
            kept = jnp.asarray(self.kept)[shard]
            own = [_tokens(jnp.take(x, kept, axis=-4, mode="clip")) for x in blocks]
            return [jnp.concatenate([x, *more], axis=-3) for x, more in zip(own, came, strict=True)]
        found = []
        for x, more in zip(arrays, came, strict=True):
            # Room first: the shard's own keys are copied while the others' are on their way.
            room = sum(y.shape[-3] for y in more)
            x = jax.lax.optimization_barrier(
                jnp.pad(x, [(0, room if axis == x.ndim - 3 else 0) for axis in range(x.ndim)])
            )
            end = x.shape[-3] - room
            for y in more:
                x = jax.lax.dynamic_update_slice_in_dim(x, y, end, axis=-3)
                end += y.shape[-3]
            found.append(x)
        return found

    def give_back(
        self,
        gradients: Sequence[jax.Array],
        axis: Axes,
        shard: jax.Array,
        near: Sequence[jax.Array] | None = None,
    ) -> list[jax.Array]:
        """The gradients of a shard's own keys and values, [.., S / n, K, H], from those of all it had, [.., S', K, H].

        Each block's parts are summed in float32: first the shard's own, then the others', in the order of the steps.

        Args:
          gradients: What `bring` returned has these gradients.
          axis: Mesh axes of the shards.
          shard: Number of the shard.
          near: Of two parts, the gradients that the first one has of the shard's own keys and values.
        """
        if self.spread is not None:
            (part,) = self.parts
            size = gradients[0].shape[-3] // part.keys.shape[1]
            places = jnp.asarray(np.take_along_axis(part.slots, np.maximum(self.keys, 0), axis=1))[shard]
            gradients = [_tokens(jnp.take(_blocks(x, size), places, axis=-4, mode="clip")) for x in gradients]
        if not self.steps:
            return list(gradients)
        counts = [self.own if self.kept is None else self.kept.shape[1], *(step.count for step in self.steps)]
        size = gradients[0].shape[-3] // sum(counts)
        ends = np.cumsum(counts)[:-1] * size
        own, *others = zip(*(jnp.split(x, ends, axis=-3) for x in gradients), strict=True)
        base = [self._blocks(x) for x in (own if near is None else near)]
        mine = jnp.asarray(self.returned)[shard]
        wide = statistics_dtype(base[0].dtype)

        def blocks_of(arrays: Sequence[jax.Array]) -> jax.Array:
            return jnp.concatenate([x.reshape(*x.shape[:-3], -1, size, *x.shape[-2:]) for x in arrays], axis=-1)

        def added(total: jax.Array, sent: np.ndarray, came: jax.Array) -> jax.Array:
            # Their places among `mine`, which holds them all, ascending.
            found = [np.searchsorted(*tables) for tables in zip(self.returned, sent, strict=True)]
            known = jnp.asarray(sent < self.own)[shard]
            places = _or_outside(known, jnp.asarray(np.array(found, np.int32))[shard], mine.shape[0])
            return total.at[..., places, :, :, :].add(came.astype(wide), mode="drop", unique_indices=True)

        total = jnp.concatenate([jnp.take(x, mine, axis=-4, mode="clip") for x in base], axis=-1).astype(wide)
        if self.kept is not None:
            total = added(total, self.kept, blocks_of(own))
        for step, parts in zip(self.steps, others, strict=True):
            for came in step.send_back(blocks_of(parts), axis, self.shards):
                total = added(total, step.blocks, came)
        mine = _or_outside(mine < self.own, mine, self.own)
        totals = jnp.split(total.astype(base[0].dtype), np.cumsum([x.shape[-1] for x in base])[:-1], axis=-1)
        return [
            _tokens(x.at[..., mine, :, :, :].set(y, mode="drop", unique_indices=True))
            for x, y in zip(base, totals, strict=True)
        ]

    def _blocks(self, x: jax.Array) -> jax.Array:
        """A shard's own blocks, [.., m blocks, K, H] to [.., m, block, K, H]."""
        return _blocks(x, x.shape[-3] // self.own)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[.., n size, K, H] to [.., n, size, K, H]."""
    return x.reshape(*x.shape[:-3], x.shape[-3] // size, size, *x.shape[-2:])


def _tokens(x: jax.Array) -> jax.Array:
    """[.., m, block, K, H] to [.., m blocks, K, H]."""
    return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])


def _or_outside(inside: jax.Array, places: jax.Array, size: int) -> jax.Array:
    """The places of what is no padding; padding is sent past the end, where it is dropped, each to another place."""
    return jnp.where(inside, places, size + jnp.arange(places.shape[0], dtype=jnp.int32))


@functools.lru_cache(64)
def exchange_of(
    visits: Visits, shards: int, *, two_parts: bool = True, positions: Positions = Positions.NONE
) -> Exchange | None:
    """The exchange of a host mask's keys, or None where all are better gathered.

    Args:
      visits: Visits of the mask.
      shards: Number of shards.
      two_parts: Whether the rows may be computed in two parts, where positions are not kept.
      positions: What the keys keep of their positions.
    """
    found = min((exchange(visits.needs(shards), popular) for popular in (False, True)), key=cost)
    if cost(found) > GATHER_FROM * (shards - 1) * found.own + STEP_BLOCKS:
        return None
    if positions is not Positions.NONE:
        return _in_place(found, visits, positions)
    whole = Part.of(visits, np.ones(visits.rows, bool), found.keys)
    if not found.steps or not two_parts:
        return dataclasses.replace(found, parts=(whole,))
    far = visits.far(shards)
    kept = visits.needs_of(far, shards).reshape(shards, shards, -1)[np.arange(shards), np.arange(shards)]
    count = int(kept.sum(1).max(initial=0))
    if int(far.reshape(shards, -1).sum(1).max()) / (visits.rows // shards) + count / found.own > TWO_PARTS_TO:
        return dataclasses.replace(found, parts=(whole,))
    own = np.arange(shards * found.own, dtype=np.int32).reshape(shards, -1)
    kept = _table(kept, found.own)
    given = np.concatenate([np.where(kept < found.own, kept + own[:, :1], -1), found.keys[:, found.own :]], axis=1)
    return dataclasses.replace(
        found,
        parts=(Part.of(visits, ~far, own), Part.of(visits, far, given, packed=True)),
        kept=kept,
        returned=_union(found.returned, kept, found.own),
    )


def _in_place(found: Exchange, visits: Visits, positions: Positions) -> Exchange:
    """The exchange with a shard's keys at their positions: all of them, or those from the first to the last it has."""
    columns = visits.columns
    first, width = np.zeros(found.shards, np.int64), columns
    if positions is Positions.RELATIVE:
        there = found.slots >= 0
        first, end = there.argmax(1), columns - there[:, ::-1].argmax(1)
        width = int((end - first).max())
        first = np.minimum(first, columns - width)
    keys = (first[:, None] + np.arange(width)).astype(np.int32)
    spread = np.take_along_axis(found.slots, keys, axis=1)
    same = spread.shape == found.keys.shape and (spread == np.arange(width)).all()
    part = Part.of(visits, np.ones(visits.rows, bool), keys)
    return dataclasses.replace(found, parts=(part,), spread=None if same else np.maximum(spread, 0))


def _union(a: np.ndarray, b: np.ndarray, fill: int) -> np.ndarray:
    """The numbers that one or both of two tables have for a shard."""
    chosen = np.zeros((a.shape[0], fill + 1), bool)
    for table in (a, b):
        np.put_along_axis(chosen, table, True, axis=1)
    return _table(chosen[:, :fill], fill)


def cost(found: Exchange) -> float:
    """How long an exchange takes, in blocks that one shard receives."""
    return int(found.received().max(initial=0)) + STEP_BLOCKS * len(found.steps)


def exchange(needs: np.ndarray, popular: bool = False) -> Exchange:
    """The exchange that brings each shard what it needs.

    Args:
      needs: bool [shards, key blocks], with the shards' own ones or without.
      popular: Whether blocks that more than half of the shards visit are gathered by all.
    """
    shards, columns = needs.shape
    own = columns // shards
    everyone = np.arange(shards)
    wanted = needs.reshape(shards, shards, own).copy()  # [to, from, block]
    wanted[everyone, everyone] = False
    travels = wanted.any(0)
    slots = np.full((shards, shards, own), -1, np.int32)  # [to, from, block]
    slots[everyone, everyone] = np.arange(own)
    steps, end = [], own
    if popular and (gathered := wanted.sum(0) > shards // 2).any():
        blocks = _table(gathered, own)
        place = np.cumsum(gathered, axis=1) - 1 + end + everyone[:, None] * blocks.shape[1]
        foreign = gathered & ~np.eye(shards, dtype=bool)[:, :, None]
        slots = np.where(foreign, place, slots)
        wanted &= ~gathered
        steps.append(Step((), blocks))
        end += shards * blocks.shape[1]
    for shift in range(1, shards):
        to = (everyone + shift) % shards
        sent = wanted[to, everyone]  # [from, block]
        if not sent.any():
            continue
        blocks = _table(sent, own)
        slots[to, everyone] = np.where(sent, np.cumsum(sent, axis=1) - 1 + end, slots[to, everyone])
        steps.append(Step(tuple((int(i), int(to[i])) for i in np.flatnonzero(sent.any(1))), blocks))
        end += blocks.shape[1]
    slots = slots.reshape(shards, columns).astype(np.int32)
    return Exchange(shards, own, tuple(steps), slots, _table(np.asarray(travels), own))


def _table(chosen: np.ndarray, fill: int) -> np.ndarray:
    """int32 [shards, most]: the numbers of the chosen blocks of each shard, ascending, then `fill`."""
    counts = chosen.sum(1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : counts.max()]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, fill).astype(np.int32)


# ---- all keys -----------------------------------------------------------------------------------------------------


def gather(x: jax.Array, axis: Axes) -> jax.Array:
    """All keys or values, [.., S, K, H], from a shard's own."""
    return jax.lax.all_gather(x, axis, axis=x.ndim - 3, tiled=True)


def sum_of_shards(dx: jax.Array, axis: Axes, shards: int) -> jax.Array:
    """The gradient of a shard's own keys or values from each shard's part of all of them.

    The parts travel in their own type and are summed in float32, in the order of the shards.
    """
    *lead, length, heads, size = dx.shape
    parts: Any = dx.reshape(*lead, shards, length // shards, heads, size)
    parts = jax.lax.all_to_all(parts, axis, split_axis=len(lead), concat_axis=len(lead), tiled=True)
    wide = statistics_dtype(dx.dtype)
    return parts.astype(wide).sum(len(lead)).astype(dx.dtype)
