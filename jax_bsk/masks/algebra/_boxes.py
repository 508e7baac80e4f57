"""Masks of tokens on a grid in space: a query attends to the keys in a box around it.

A box is one interval of coordinates per axis, perhaps with a step. So a mask needs three integers per token and axis:
the ends of the query's interval and the key's coordinate. Bounds of blocks are the least and greatest of these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from jax_bsk.core.arrays import Array
from jax_bsk.masks.algebra._offsets import static_int
from jax_bsk.masks.algebra._places import PlaceIntervals, place_intervals
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import OWN, Grid, alike, in_blocks

__all__: list[str] = []

# Residues of a step are bits of a word; a longer step goes without that bound.
MAX_RESIDUES = 32


class Axis(NamedTuple):
    """One axis of the boxes of a token sequence.

    Attributes:
      low, high: [tokens], first and last coordinate that a query attends to. A query of no box has low > high.
      place: [tokens], coordinate of a key. A key that is not on the grid is at -1.
      step: a query attends to coordinates low, low + step, ... up to high.
    """

    low: np.ndarray
    high: np.ndarray
    place: np.ndarray
    step: int


class _Bounds(NamedTuple):
    """Bounds of an axis in blocks of queries [nq] and of keys [nk].

    Attributes:
      low_min, high_max: the union of the queries' intervals; low_max, high_min: their intersection.
      place_min, place_max: of the keys on the grid; least: of all keys, -1 where one is not on the grid.
      q_residues, kv_residues: uint32, bit r is set where a token is at r modulo the step.
    """

    low_min: np.ndarray
    low_max: np.ndarray
    high_min: np.ndarray
    high_max: np.ndarray
    place_min: np.ndarray
    place_max: np.ndarray
    least: np.ndarray
    q_residues: np.ndarray
    kv_residues: np.ndarray


class BoxMask(Mask):
    """A mask of boxes. Subclasses give `shape`, `tile`, `start` and `_axis_intervals`; their fields are all static."""

    _coarse_bounds = True

    shape: tuple[int, ...]
    tile: tuple[int, ...] | None
    start: int | None

    def _axis_intervals(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """For each axis: first and last coordinate [length] that a query at each coordinate attends to, and the step.

        Coordinates may be those of tiles; then `_unit` says how many tokens a tile has along each axis.
        """
        raise NotImplementedError

    def _unit(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)

    def _validate(self, q_len: int, kv_len: int) -> None:
        tokens, who = math.prod(self.shape), type(self).__name__
        for name, length in (("q_len", q_len), ("kv_len", kv_len)):
            if self.start is None and length != tokens:
                raise ValueError(
                    f"{who}: shape {self.shape} has {tokens} tokens, got {name}={length}; where other tokens lie "
                    "before or behind the grid, give start, the position of its first token, and join masks of theirs"
                )
            if self.start is not None and self.start + tokens > length:
                raise ValueError(
                    f"{who}: shape {self.shape} has {tokens} tokens from start={self.start} on, got {name}={length}; "
                    "give a smaller shape or start"
                )

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        xp = grid.xp
        empty, full = xp.zeros((1, 1), bool), xp.ones((1, 1), bool)
        host = _on_host(grid)
        for axis, bounds in zip(_axes(self, grid.q_len, grid.kv_len), _bounds(self, host), strict=True):
            b = _Bounds(*map(xp.asarray, bounds))
            empty = empty | (b.place_max[j] < b.low_min[i]) | (b.place_min[j] > b.high_max[i])
            full = full & (b.least[j] >= b.low_max[i]) & (b.place_max[j] <= b.high_min[i])
            if 1 < axis.step <= MAX_RESIDUES:
                common = b.q_residues[i] & b.kv_residues[j]
                empty = empty | (common == 0)
                # One residue in both, the same.
                full = full & (b.q_residues[i] == b.kv_residues[j]) & (common & (common - np.uint32(1)) == 0)
            elif axis.step > 1:
                full = full & False
        return grid.code(empty, full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        q, k, hits = grid.clip_q(q), grid.clip_kv(k), []
        for axis in _axes(self, grid.q_len, grid.kv_len):
            low, high, place = grid.xp.asarray(axis.low)[q], grid.xp.asarray(axis.high)[q], grid.xp.asarray(axis.place)
            place, high = place[k], grid.xp.where(q < 0, -1, high)  # a query before the first selects nothing
            hits += [place >= low, place <= high]
            if axis.step > 1:
                hits.append(place % axis.step == low % axis.step)
        return functools.reduce(lambda a, b: a & b, hits)

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...]:
        # Along each axis elements depend on the distances of the keys from the queries' intervals: on the tokens of
        # either block relative to its first one, and on how far those are apart. Where all is inside, on nothing.
        # One integer of them all: numbers below `count`, axis after axis.
        key, count = np.zeros(np.broadcast_shapes(i.shape, j.shape), np.int64), 1
        axes = _axes(self, grid.q_len, grid.kv_len)
        keys = []
        for axis, b, kinds in zip(axes, _bounds(self, grid), _kinds(self, grid), strict=True):
            q_kinds, q_first, kv_kinds, kv_first = kinds
            inside = (b.least[j] >= b.low_max[i]) & (b.place_max[j] <= b.high_min[i]) & (axis.step == 1)
            apart = q_first.astype(np.int64)[i] - kv_first[j]
            n_kv, least = int(kv_kinds.max(initial=0)) + 1, int(q_first.min(initial=0)) - int(kv_first.max(initial=0))
            n_apart = int(q_first.max(initial=0)) - int(kv_first.min(initial=0)) - least + 1
            number = 1 + (q_kinds[i] * n_kv + kv_kinds[j]) * n_apart + (apart - least)
            size = (int(q_kinds.max(initial=0)) + 1) * n_kv * n_apart + 1
            if count * size >= 2**62:  # rare: very many kinds
                keys.append(key)
                key, count = np.zeros_like(key), 1
            key, count = key * size + np.where(inside, 0, number), count * size
        return (*keys, key)

    def _as_places(self, grid: Grid) -> PlaceIntervals:
        low, high, place = [], [], []
        for axis in _axes(self, grid.q_len, grid.kv_len):
            ends = (axis.low, axis.high, axis.place)
            rest, of_keys = axis.low % axis.step, axis.place % axis.step
            for rows, x in zip((low, high, place), ends, strict=True):
                rows.append(x)
            if axis.step > 1:
                for rows, x in zip((low, high, place), (rest, rest, of_keys), strict=True):
                    rows.append(x)
        return place_intervals(grid, low, high, place)

    def _repr_arguments(self) -> list[str]:
        fields = self._named().items()
        return [repr(self.shape), *(f"{name}={value!r}" for name, value in fields if name != "shape" and value)]


def _on_host(grid: Grid) -> Grid:
    return grid if grid.xp is np else dataclasses.replace(grid, xp=np)


@functools.lru_cache(maxsize=16)
def _axes(mask: BoxMask, q_len: int, kv_len: int) -> list[Axis]:
    tokens, start, axes = math.prod(mask.shape), mask.start or 0, []
    dtype = np.int16 if max(mask.shape) < 2**14 else np.int32  # half the words: measured 1.4x faster
    far = np.iinfo(dtype).max // 2

    def spread(values: np.ndarray, length: int, outside: int) -> np.ndarray:
        out = np.full(length, outside, dtype)
        out[start : start + tokens] = values
        return out

    units = mask._unit()
    for places, unit, (low, high, step) in zip(
        coordinates(mask.shape, mask.tile), units, mask._axis_intervals(), strict=True
    ):
        at = places // unit
        axes.append(Axis(spread(low[at], q_len, far), spread(high[at], q_len, -1), spread(at, kv_len, -1), step))
    return axes


@functools.lru_cache(maxsize=16)
def _bounds(mask: BoxMask, grid: Grid) -> list[_Bounds]:
    return [_axis_bounds(axis, grid) for axis in _axes(mask, grid.q_len, grid.kv_len)]


def _axis_bounds(axis: Axis, grid: Grid) -> _Bounds:
    low, high = (in_blocks(x, grid.nq, grid.block_q) if x.size else x.reshape(0, 1) for x in (axis.low, axis.high))
    place = in_blocks(axis.place, grid.nk, grid.block_kv) if axis.place.size else axis.place.reshape(0, 1)
    far = np.iinfo(place.dtype).max
    on_grid = np.where(place < 0, far, place)
    if 1 < axis.step <= MAX_RESIDUES:
        bits = [np.uint32(1) << (x % axis.step).astype(np.uint32) for x in (low, place)]
        q_residues, kv_residues = (
            np.bitwise_or.reduce(np.where(outside, np.uint32(0), x), 1, dtype=np.uint32)
            for x, outside in zip(bits, (low > high, place < 0), strict=True)
        )
    else:
        q_residues, kv_residues = np.zeros(len(low), np.uint32), np.zeros(len(place), np.uint32)
    return _Bounds(
        low.min(1),
        low.max(1),
        high.min(1),
        high.max(1),
        on_grid.min(1),
        place.max(1),
        place.min(1),
        q_residues,
        kv_residues,
    )


@functools.lru_cache(maxsize=16)
def _kinds(mask: BoxMask, grid: Grid) -> list[tuple[np.ndarray, ...]]:
    return [_axis_kinds(axis, grid) for axis in _axes(mask, grid.q_len, grid.kv_len)]


def _axis_kinds(axis: Axis, grid: Grid) -> tuple[np.ndarray, ...]:
    """Numbers of blocks of queries and keys that are alike but for a translation, and their first coordinates."""
    if not (axis.low.size and axis.place.size):
        return (np.zeros(0, np.int64),) * 4
    low, high = (in_blocks(x, grid.nq, grid.block_q).astype(np.int32) for x in (axis.low, axis.high))
    place = in_blocks(axis.place, grid.nk, grid.block_kv).astype(np.int32)
    q_first, kv_first = low[:, :1], place[:, :1]
    q_kinds = alike(np.concatenate([low - q_first, high - q_first], 1))
    return q_kinds, q_first[:, 0], alike(place - kv_first), kv_first[:, 0]


# ---- the order of the tokens ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def coordinates(shape: tuple[int, ...], tile: tuple[int, ...] | None) -> tuple[np.ndarray, ...]:
    """Coordinates [tokens] along each axis, of tokens in row-major order, or tile after tile and so in each tile."""
    places = np.unravel_index(np.arange(math.prod(shape)), shape)
    if tile is None:
        return tuple(places)
    tiles = [place // size for place, size in zip(places, tile, strict=True)]
    order = np.lexsort([*places[::-1], *tiles[::-1]])
    return tuple(place[order] for place in places)


# ---- arguments --------------------------------------------------------------------------------------------------


def checked_shape(shape: Any, who: str) -> tuple[int, ...]:
    """Sizes of the grid of tokens, as a tuple of ints.

    Raises:
      TypeError, ValueError: they are no ints of at least 1.
    """
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not sizes:
        raise ValueError(f"{who}: shape must have at least one axis, given {shape!r}")
    return tuple(static_int(size, who, f"shape[{n}]", minimum=1) for n, size in enumerate(sizes))


def per_axis(value: Any, who: str, name: str, axes: int, *, minimum: int = 1) -> tuple[int, ...]:
    """An int for each axis, from one for all or a tuple.

    Raises:
      TypeError, ValueError: it is neither, or one is too small.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{who}: {name} must be an int or one per axis of shape, given {value!r} for {axes} axes")
    return tuple(static_int(x, who, f"{name}[{n}]", minimum=minimum) for n, x in enumerate(values))


def checked_tile(tile: Any, who: str, axes: int) -> tuple[int, ...] | None:
    return None if tile is None else per_axis(tile, who, "tile", axes)


def checked_start(start: Any, who: str) -> int | None:
    return None if start is None else static_int(start, who, "start", minimum=0)
