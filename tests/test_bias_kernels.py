"""Biases and dropout in the native kernels, past every Python check, against float64 sums over all pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk.attention import ffi
from jax_bsk.core import library
from jax_bsk.core.version import __version__
from jax_bsk.qa.testing.faults.direct import DirectCall

BATCH, HEADS = 2, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem. Of a term, flags say which of its dimensions are whole; others are 1.

    Attributes:
      dense: Flags of batch, heads, queries and keys.
      distances: Flags of batch and heads.
      tiles: Flags of batch, heads, queries and keys of a block.
      wide: Whether the dense term has the statistics' type.
      infinite: Whether one pair in four, one whole query and one whole key have a bias of -inf.
      lists: Whether each example and each head has lists and bit tiles of its own.
    """

    name: str
    dense: tuple[bool, bool, bool, bool] | None = None
    distances: tuple[bool, bool] | None = None
    tiles: tuple[bool, bool, bool, bool] | None = None
    dropout: int = 0
    wide: bool = True
    infinite: bool = False
    dtype: str = "float32"
    lists: tuple[bool, bool] = (True, False)
    block: tuple[int, int] = (32, 32)
    sizes: tuple[int, int] = (75, 110)
    dims: tuple[int, int] = (16, 24)
    kv_heads: int = 2
    soft_cap: float = 0.0
    gated: bool = False
    sinks: bool = False
    lengths: bool = True


Y, N = True, False
CASES = (
    Case("nothing"),
    Case("dense", dense=(Y, Y, Y, Y)),
    Case("dense, shared by all", dense=(N, N, Y, Y), lists=(N, N)),
    Case("dense, shared by heads, bfloat16", dense=(Y, N, Y, Y), wide=False, dtype="bfloat16"),
    Case("dense, shared by examples, float16", dense=(N, Y, Y, Y), wide=False, dtype="float16", kv_heads=4),
    Case("dense, float32 beside bfloat16", dense=(N, Y, Y, Y), dtype="bfloat16", block=(32, 64)),
    Case("dense of keys", dense=(Y, N, N, Y), lists=(Y, Y)),
    Case("dense of keys, float64", dense=(N, Y, N, Y), dtype="float64", block=(64, 32)),
    Case("dense of queries", dense=(N, Y, Y, N), gated=True),
    Case("dense of queries, bfloat16", dense=(Y, N, Y, N), wide=False, dtype="bfloat16"),
    Case("dense of heads", dense=(N, Y, N, N), sinks=True),
    Case("dense with -inf", dense=(Y, N, Y, Y), infinite=True),
    Case("dense with -inf, all but it", dense=(N, Y, Y, Y), infinite=True, soft_cap=3.0, gated=True, dropout=100),
    Case("keys with -inf", dense=(Y, N, N, Y), infinite=True, dtype="float64", sinks=True),
    Case("distances", distances=(N, Y)),
    Case("distances, shared by all", distances=(N, N), lists=(N, N), kv_heads=1),
    Case("distances of each", distances=(Y, Y), soft_cap=2.0, lists=(Y, Y)),
    Case("distances of examples, float64", distances=(Y, N), dtype="float64", sizes=(130, 45), lengths=False),
    Case("distances, unequal blocks", distances=(N, Y), block=(64, 32), dtype="float16"),
    Case("tiles", tiles=(Y, Y, Y, Y)),
    Case("tiles, shared by all", tiles=(N, N, Y, Y), lists=(Y, Y), block=(32, 64)),
    Case("tiles of queries", tiles=(N, Y, Y, N), dtype="float64"),
    Case("tiles of keys", tiles=(Y, N, N, Y), gated=True, block=(64, 32)),
    Case("numbers of blocks", tiles=(N, Y, N, N), dtype="bfloat16", soft_cap=3.0),
    Case("tiles with -inf", tiles=(N, N, Y, Y), infinite=True),
    Case("dropout", dropout=26, lists=(N, N)),
    Case("dropout, float64", dropout=128, dtype="float64", gated=True, soft_cap=2.0, lists=(Y, Y)),
    Case("little dropout", dropout=1, dtype="bfloat16", block=(64, 32)),
    Case("much dropout", dropout=255, kv_heads=4, block=(32, 64)),
    Case("all terms", dense=(N, Y, Y, Y), distances=(N, Y), tiles=(N, N, Y, Y), dropout=51, sinks=True),
    Case(
        name="all terms, float64",
        dense=(Y, N, N, Y),
        distances=(Y, N),
        tiles=(Y, Y, Y, N),
        dropout=77,
        soft_cap=4.0,
        gated=True,
        dtype="float64",
        lists=(Y, Y),
        sizes=(100, 140),
    ),
    Case(
        name="all terms, float16",
        dense=(Y, Y, Y, Y),
        distances=(N, N),
        tiles=(N, N, N, N),
        wide=False,
        gated=True,
        dtype="float16",
        sizes=(33, 200),
        dims=(40, 16),
    ),
    Case("one query", dense=(N, Y, Y, Y), distances=(N, Y), tiles=(N, N, Y, Y), sizes=(1, 90), lengths=False),
    Case("few queries of a group", distances=(N, Y), sizes=(4, 90), kv_heads=1, lists=(N, N), dropout=30),
)
TERMS = {
    "dense_bias": ffi.BiasTerm.DENSE,
    "distance_bias": ffi.BiasTerm.DISTANCES,
    "bias_tiles": ffi.BiasTerm.TILES,
}


def whole(flags: tuple[bool, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if flag else 1 for flag, size in zip(flags, sizes, strict=True))


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of both orders, [B|1, N|1, ..], and what each entry of the columns is in the rows."""

    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    to_rows: np.ndarray


def random_lists(rng: np.random.Generator, tables: tuple[int, ...], blocks: tuple[int, int], count: int) -> Lists:
    """Two thirds of the blocks, half of which have a bit tile; ids of a row in any order."""
    q_blocks, kv_blocks = blocks
    capacity = q_blocks * kv_blocks + 1
    shape = {"row_offsets": q_blocks + 1, "kv_blocks": capacity, "tiles": capacity}
    rows = {name: np.zeros((*tables, size), np.int32) for name, size in shape.items()}
    shape = {"col_offsets": kv_blocks + 1, "q_blocks": capacity, "col_tiles": capacity}
    columns = {name: np.zeros((*tables, size), np.int32) for name, size in shape.items()}
    to_rows = np.full((*tables, capacity), capacity - 1, np.int32)  # the last position has no entry
    for table in np.ndindex(tables):
        entries = []
        for i in range(q_blocks):
            ids = rng.permutation(kv_blocks)[: rng.binomial(kv_blocks, 2 / 3)]
            entries += [(i, int(j), int(rng.integers(count)) if rng.random() < 0.5 else -1) for j in ids]
        by_column = sorted(range(len(entries)), key=lambda e: (entries[e][1], entries[e][0]))
        for lists, order, side, names in (
            (rows, range(len(entries)), 0, ("row_offsets", "kv_blocks", "tiles")),
            (columns, by_column, 1, ("col_offsets", "q_blocks", "col_tiles")),
        ):
            offsets, ids, tiles = (lists[name][table] for name in names)
            for position, e in enumerate(order):
                ids[position], tiles[position] = entries[e][1 - side], entries[e][2]
            offsets[:] = np.searchsorted([entries[e][side] for e in order], np.arange(len(offsets)))
        to_rows[table][: len(entries)] = by_column
    return Lists(rows, columns, to_rows)


def kept(keys: np.ndarray, q_len: int, kv_len: int, threshold: int) -> np.ndarray:
    """Dropout's factors [B, N, T, S], as csrc/attention/dropout.h says."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x & 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    q, k = np.arange(q_len)[:, None], np.arange(kv_len)
    place_q, place_k = (x // 16 * 8 + x % 8 for x in (q, k))
    by_head = keys.astype(np.int64)[..., None, None]
    first = mix(by_head + 0x9E3779B9 * (place_q + 1)).astype(np.uint64) * mix(place_k + 0x85EBCA6B).astype(np.uint64)
    second = (first & np.uint64(0xFFFFFFFF)) * (first >> np.uint64(32))
    word = (second & np.uint64(0xFFFFFFFF) ^ second >> np.uint64(32)).astype(np.int64)
    byte = word >> 8 * ((q // 8 % 2) + 2 * (k // 8 % 2)) & 255
    return np.where(byte < threshold, 0, 256 / (256 - threshold))


class Problem:
    """Arrays of a case, and what the kernels should make of them."""

    def __init__(self, case: Case):
        self.case = case
        rng = self.rng = np.random.default_rng(sum(map(ord, case.name)))
        self.stats = np.float64 if case.dtype == "float64" else np.float32
        (q_len, kv_len), (block_q, block_kv) = case.sizes, case.block
        self.blocks = -(-q_len // block_q), -(-kv_len // block_kv)
        q_dim, v_dim = case.dims
        self.scale = 1.3 / math.sqrt(q_dim)
        self.query = self.normal(BATCH, q_len, HEADS, q_dim)
        self.key = self.normal(BATCH, kv_len, case.kv_heads, q_dim)
        self.value = self.normal(BATCH, kv_len, case.kv_heads, v_dim)
        self.dout = self.normal(BATCH, q_len, HEADS, v_dim)
        self.dlse = rng.normal(size=(BATCH, HEADS, q_len)).astype(self.stats)
        tables = whole(case.lists, (BATCH, HEADS))
        count = 3
        self.lists = random_lists(rng, tables, self.blocks, count)
        capacity = self.lists.to_rows.shape[-1]
        self.bit_tiles = rng.integers(0, 2**32, (*tables, count, block_q, block_kv // 32)).astype(np.uint32)
        self.bit_tiles[..., 0, 5, :] = 0
        self.lengths = np.array([[q_len, kv_len]], np.int32)
        if case.lengths:
            self.lengths = np.array([[q_len - 7, kv_len], [q_len, kv_len - 41]], np.int32)
        self.sinks = rng.normal(size=(1, HEADS)).astype(self.stats) if case.sinks else None
        self.gates = rng.uniform(0.3, 2, (BATCH, HEADS, capacity)).astype(self.stats) if case.gated else None
        self.keys = rng.integers(0, 2**32, (BATCH, HEADS)).astype(np.uint32)
        self.bias_tile_numbers = rng.integers(-1, 9, (*tables, capacity)).astype(np.int32)  # the last are past the end
        self.terms = self.bias_terms()

    def normal(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape), self.case.dtype)

    def bias_terms(self) -> dict[str, jax.Array]:
        case, (q_len, kv_len) = self.case, self.case.sizes
        shapes = {}
        if case.dense is not None:
            shapes["dense_bias"] = whole(case.dense, (BATCH, HEADS, q_len, kv_len))
        if case.distances is not None:
            shapes["distance_bias"] = (*whole(case.distances, (BATCH, HEADS)), q_len + kv_len - 1)
        if case.tiles is not None:
            batch, heads, *tile = whole(case.tiles, (BATCH, HEADS, *case.block))
            shapes["bias_tiles"] = (batch, heads, 7, *tile)
        terms = {}
        for name, shape in shapes.items():
            values = self.rng.normal(size=shape)
            if case.infinite:
                values[self.rng.random(shape) < 0.25] = -np.inf
                values[..., 1 % shape[-2], :] = values[..., :, 2] = -np.inf
            narrow = name == "dense_bias" and not case.wide
            terms[name] = jnp.asarray(values, case.dtype if narrow else self.stats)
        return terms

    def of_block(self, b: int, h: int, i: int, j: int) -> tuple[slice, slice]:
        block_q, block_kv = self.case.block
        q_length, kv_length = self.lengths[b % len(self.lengths)]
        return (
            slice(min(i * block_q, q_length), min((i + 1) * block_q, q_length)),
            slice(min(j * block_kv, kv_length), min((j + 1) * block_kv, kv_length)),
        )

    def entries(self):
        """(b, h, table, position in the list, pairs of the entry)."""
        batch, heads = self.lists.to_rows.shape[:2]
        for b, h in np.ndindex(BATCH, HEADS):
            table = b % batch, h % heads
            offsets = self.lists.rows["row_offsets"][table]
            for i in range(self.blocks[0]):
                for e in range(offsets[i], offsets[i + 1]):
                    yield b, h, table, e, self.of_block(b, h, i, self.lists.rows["kv_blocks"][table][e])

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        case, (q_len, kv_len) = self.case, self.case.sizes
        shape = BATCH, HEADS, q_len, kv_len
        attend, gate, number = np.zeros(shape, bool), np.ones(shape), np.full(shape, -1)
        place_q, place_k = (np.arange(size) % block for size, block in zip(case.sizes, case.block, strict=True))
        for b, h, table, e, (q, k) in self.entries():
            tile = self.lists.rows["tiles"][table][e]
            bits = np.unpackbits(self.bit_tiles[table].view(np.uint8), axis=-1, bitorder="little")[tile]
            attend[b, h, q, k] = True if tile < 0 else bits[place_q[q]][:, place_k[k]]
            gate[b, h, q, k] = 1 if self.gates is None else self.gates[b, h, e]
            number[b, h, q, k] = self.bias_tile_numbers[table][e]
        numbers = {name: np.asarray(x, np.float64) for name, x in self.terms.items()}
        bias = np.zeros(shape)
        bias += numbers.get("dense_bias", 0)
        distance = np.arange(kv_len) - np.arange(q_len)[:, None] + q_len - 1
        if "distance_bias" in numbers:
            bias += numbers["distance_bias"][..., distance]
        if "bias_tiles" in numbers:
            tiles = np.broadcast_to(numbers["bias_tiles"], (BATCH, HEADS, 7, *case.block))
            index = np.minimum(number, 6)
            b, h = np.arange(BATCH)[:, None, None, None], np.arange(HEADS)[:, None, None]
            bias += np.where(number < 0, 0, tiles[b, h, index, place_q[:, None], place_k])
        attend &= bias != -np.inf
        bias = np.where(attend, bias, 0)

        group = HEADS // case.kv_heads
        query, dout = (np.asarray(x, np.float64) for x in (self.query, self.dout))
        key, value = (np.repeat(np.asarray(x, np.float64), group, 2) for x in (self.key, self.value))
        raw = self.scale * np.einsum("btnh,bsnh->bnts", query, key)
        slope = 1.0
        if case.soft_cap:
            slope = 1 - np.tanh(raw / case.soft_cap) ** 2
            raw = case.soft_cap * np.tanh(raw / case.soft_cap)
        logit = np.where(attend, raw + bias, -np.inf)
        sink = -np.inf if self.sinks is None else self.sinks[..., None, None]
        q_in = np.arange(q_len) < np.broadcast_to(self.lengths[:, :1], (BATCH, 1))
        sinks = np.where(q_in[:, None, :, None], np.broadcast_to(sink, (BATCH, HEADS, q_len, 1)), -np.inf)
        with np.errstate(divide="ignore"):
            lse = np.log(np.exp(logit).sum(-1) + np.exp(sinks[..., 0]))
        nothing = lse == -np.inf
        p = np.exp(logit - np.where(nothing, 0, lse)[..., None])
        weight = gate * (kept(self.keys, q_len, kv_len, case.dropout) if case.dropout else 1)
        out = np.einsum("bnts,bsnh->btnh", weight * p, value)
        dp = np.einsum("btnh,bsnh->bnts", dout, value)
        delta = np.einsum("btnh,btnh->bnt", out, dout) - self.dlse
        ds = p * (weight * dp - delta[..., None])

        def of_group(x: np.ndarray) -> np.ndarray:
            return x.reshape(*x.shape[:2], case.kv_heads, group, x.shape[-1]).sum(3)

        result = {
            "out": out,
            "lse": np.where(nothing, np.finfo(self.stats).min, lse),
            "dquery": self.scale * np.einsum("bnts,bsnh->btnh", ds * slope, key),
            "dkey": of_group(self.scale * np.einsum("bnts,btnh->bsnh", ds * slope, query)),
            "dvalue": of_group(np.einsum("bnts,btnh->bsnh", weight * p, dout)),
        }
        if self.gates is not None:
            dgates = np.zeros(self.gates.shape)
            for b, h, _, e, (q, k) in self.entries():
                dgates[b, h, e] = (p * weight / gate * dp)[b, h, q, k].sum()
            result["dgates"] = np.take_along_axis(dgates, np.broadcast_to(self.lists.to_rows, dgates.shape), -1)
        for name, values in numbers.items():
            total = result["d" + name] = np.zeros(values.shape)
            if name == "dense_bias":
                axes = tuple(a for a, size in enumerate(values.shape) if size == 1)
                total[:] = ds.sum(axes, keepdims=True)
            for b, h in np.ndindex(BATCH, HEADS):
                at = b % values.shape[0], h % values.shape[1]
                if name == "distance_bias":
                    np.add.at(total[at], distance, ds[b, h])
                if name == "bias_tiles":
                    t, u = (x % size for x, size in zip((place_q, place_k), values.shape[3:], strict=True))
                    found = number[b, h] >= 0
                    index = np.minimum(number[b, h], 6), np.broadcast_to(t[:, None], found.shape), u + 0 * number[b, h]
                    np.add.at(total[at], tuple(x[found] for x in index), ds[b, h][found])
        return result

    def lists_of(self, *parts: dict[str, np.ndarray]) -> dict[str, Any]:
        both = {name: jnp.asarray(x) for part in parts for name, x in part.items()}
        return {**both, "bit_tiles": jnp.asarray(self.bit_tiles), "lengths": jnp.asarray(self.lengths)}

    def extras(self, columns: bool = False) -> dict[str, Any]:
        """The operands of bias and dropout."""
        absent = dict(zip(TERMS, ffi.no_bias(np.dtype(self.stats)), strict=True))
        numbers = {"row_bias_tiles": self.bias_tile_numbers}
        if columns:
            numbers["col_bias_tiles"] = np.take_along_axis(self.bias_tile_numbers, self.lists.to_rows, -1)
        if "bias_tiles" not in self.terms:
            numbers = dict.fromkeys(numbers, ffi.no_bias_tile_numbers())
        keys = self.keys if self.case.dropout else ffi.no_dropout()
        operands = {**absent, **self.terms, **numbers, "dropout_keys": keys}
        return {name: jnp.asarray(x) for name, x in operands.items()}

    def attributes(self) -> dict[str, Any]:
        numbers = ffi.AttentionAttributes(*self.case.block, self.scale, self.case.soft_cap, self.case.dropout)
        return {**numbers.encode(), "version": __version__}

    def zeros(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape, self.stats)

    def calls(self) -> dict[str, DirectCall]:
        """The calls by their names; those after the forward want its results."""
        inputs = {"query": self.query, "key": self.key, "value": self.value}
        struct = jax.ShapeDtypeStruct
        statistics = (BATCH, HEADS, self.case.sizes[0])
        no_gates = self.zeros(ffi.NO_GATES)
        gates = no_gates if self.gates is None else jnp.asarray(self.gates)
        sinks = self.zeros(ffi.NO_SINKS) if self.sinks is None else jnp.asarray(self.sinks)
        forward = DirectCall(
            ffi.ATTENTION_FORWARD,
            {**inputs, **self.lists_of(self.lists.rows), "sinks": sinks, "gates": gates, **self.extras()},
            {
                "out": struct(self.dout.shape, self.dout.dtype),
                "lse": struct(statistics, self.stats),
                "lse_rest": struct(statistics, self.stats),
            },
            self.attributes(),
        )
        saved = {"dout": self.dout, **inputs, **{name: self.zeros(statistics) for name in ("lse", "lse_rest", "delta")}}
        col_gates = gates
        if self.gates is not None:
            col_gates = jnp.take_along_axis(gates, np.broadcast_to(self.lists.to_rows, gates.shape), -1)
        backward = DirectCall(
            ffi.ATTENTION_BACKWARD,
            {
                **saved,
                **self.lists_of(self.lists.rows, self.lists.columns),
                "row_gates": gates,
                "col_gates": col_gates,
                **self.extras(columns=True),
            },
            {
                **{"d" + name: struct(x.shape, x.dtype) for name, x in inputs.items()},
                "dgates": struct(gates.shape, gates.dtype),
            },
            self.attributes(),
        )
        calls = {"forward": forward, "backward": backward}
        operands = {**saved, **self.lists_of(self.lists.rows), "gates": gates, **self.extras()}
        for name, x in self.terms.items():
            shape = (*x.shape[:-1], 2, x.shape[-1]) if name == "distance_bias" else x.shape
            attributes = {**self.attributes(), "term": np.int64(TERMS[name])}
            calls[name] = DirectCall(
                ffi.ATTENTION_BIAS_GRADIENT, operands, {"dbias": struct(shape, x.dtype)}, attributes
            )
        return calls


def run_all(problem: Problem) -> dict[str, np.ndarray]:
    """Results of every call."""
    calls = problem.calls()
    forward = calls.pop("forward")()
    results = dict(forward)
    out = np.asarray(forward["out"], np.float64)
    delta = np.einsum("btnh,btnh->bnt", out, np.asarray(problem.dout, np.float64)) - problem.dlse
    saved = {"lse": forward["lse"], "lse_rest": forward["lse_rest"], "delta": jnp.asarray(delta, problem.stats)}
    for name, call in calls.items():
        gradients = call(**saved)
        if name == "backward":
            results |= gradients
        else:
            results["d" + name] = gradients["dbias"]
            if name == "distance_bias":
                results["d" + name] = gradients["dbias"].sum(-2)
    return {name: np.asarray(x) for name, x in results.items()}


TOLERANCES = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(autouse=True)
def x64():
    assert library.load("cpu").usable
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case):
    problem = Problem(case)
    results = run_all(problem)
    for name, expected in problem.expected.items():
        actual = results[name].astype(np.float64)
        assert np.isfinite(actual).all(), name
        if name == "lse":
            empty = expected == np.finfo(problem.stats).min
            np.testing.assert_array_equal(actual[empty], expected[empty])
            actual, expected = actual[~empty], expected[~empty]
        error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3)
        assert error < TOLERANCES[case.dtype], f"{name}: {error}"
        assert (actual[expected == 0] == 0).all() or name.startswith("d"), name


@pytest.mark.parametrize("name", ["all terms", "all terms, float64", "dense with -inf, all but it"])
def test_repeats_are_bit_equal(name):
    problem = Problem(next(case for case in CASES if case.name == name))
    first, second = run_all(problem), run_all(problem)
    for part, x in first.items():
        np.testing.assert_array_equal(x, second[part], err_msg=part)
