"""Decoding of one sequence whose cache is split over devices by its positions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import decode
from jax_bsk.qa.benchmarking.check import rounding_of
from jax_bsk.qa.benchmarking.timing import copy_rate

from . import measuring
from .cases import Effort, Sizes

SECONDS, MOST_CALLS = 0.01, 16  # that a program of chained calls lasts, about
CHECKED_HEADS = 2


def measure(devices: Sequence[Any], sizes: Sizes, effort: Effort) -> list[dict[str, Any]]:
    """The row of a full cache."""
    started = time.perf_counter()
    count = len(devices)
    if sizes.cache % count:
        raise ValueError(f"{count} devices do not divide the {sizes.cache} positions of the cache")
    mesh = jax.make_mesh((count,), ("sequence",), axis_types=(AxisType.Auto,), devices=devices)
    old, new = NamedSharding(mesh, P(None, "sequence")), NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 1, sizes.query_heads, sizes.head_dim), sizes.dtype)
    cache = [jax.random.normal(k, (1, sizes.cache, sizes.cache_heads, sizes.head_dim), sizes.dtype) for k in keys[1:]]
    lengths = jnp.array([sizes.cache], jnp.int32)
    one = jax.device_put((query, *cache, lengths), devices[0])
    several = (jax.device_put(query, new), *jax.device_put(cache, old), jax.device_put(lengths, new))
    copied = min(1 << 30, cache[0].nbytes)
    cache_bytes = 2 * cache[0].nbytes
    rate = copy_rate(copied, effort.rounds)
    chained = max(2, min(MOST_CALLS, math.ceil(SECONDS * rate / cache_bytes)))

    def attend(calls: int, axis_name: str | None) -> Callable[..., jax.Array]:
        def run(query: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
            for _ in range(calls):
                query = decode.attention(
                    query, keys, values, lengths, axis_name=axis_name, implementation=sizes.implementation
                )
            return query

        if axis_name is None:
            return jax.jit(run)
        specs = P(), P(None, axis_name), P(None, axis_name), P()
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P()))

    compiled = measuring.compile_all(
        {
            (name, calls): (attend(calls, axis), given)
            for name, axis, given in (("one", None, one), ("several", "sequence", several))
            for calls in (1, chained)
        },
        effort,
    )
    compiled_at = time.perf_counter()
    calls = {"one": lambda: compiled["one", chained](*one), "several": lambda: compiled["several", chained](*several)}
    want, got = compiled["one", 1](*one), compiled["several", 1](*several)
    exact = _errors({"one": want, "several": got}, one, sizes)
    close = measuring.judge(jax.device_put(got, devices[0]), want, rounding_of(np.dtype(sizes.dtype)))
    again = measuring.repeats(lambda: compiled["several", 1](*several), effort, ["out"])
    checked_at = time.perf_counter()
    found = {name: 1e-3 * value / chained for name, value in measuring.in_turn(calls, effort).items()}
    spent = compiled_at - started, checked_at - compiled_at, time.perf_counter() - checked_at
    program = compiled["several", 1]

    def times(name: str, part: int) -> dict[str, float]:
        read = cache_bytes / part / found[name]
        return {"seconds": found[name], "bytes_per_second": read, "share_of_copy": read / rate}

    return [
        {
            "part": "decode",
            "split": "cache",
            "shape": [1, sizes.query_heads, sizes.cache_heads, sizes.cache, sizes.head_dim],
            "devices": count,
            "cache_bytes": cache_bytes,
            "chained_calls": chained,
            "copy_bytes_per_second": rate,
            "one": {**times("one", 1), "peak_bytes": measuring.peak_bytes(compiled["one", 1])},
            **times("several", count),
            "efficiency": found["one"] / count / found["several"],
            "error_against_float64": exact,
            "close": {"out": close},
            "repeats": again,
            "collectives": measuring.collectives(program),
            "program_bytes": measuring.collective_bytes(program.as_text(), count),
            "peak_bytes": measuring.peak_bytes(program),
            "spent_seconds": {
                name: round(value, 2) for name, value in zip(("compiling", "checking", "timing"), spent, strict=True)
            },
            "ok": again["equal"] and all(one["ok"] for one in exact.values()),
        }
    ]


def _errors(outs: dict[str, jax.Array], operands: Sequence[jax.Array], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Each output's largest error of some heads against float64, by the largest number that these should hold.

    Allowed are two roundings: partial results of devices are rounded to the type, and the merged one again.
    """
    query, keys, values, _ = operands
    group = sizes.query_heads // sizes.cache_heads
    worst, largest = dict.fromkeys(outs, 0.0), 0.0
    for head in np.random.default_rng(0).choice(sizes.query_heads, CHECKED_HEADS, replace=False).tolist():
        rows = query[0, 0, head], keys[0, :, head // group], values[0, :, head // group]
        q, k, v = (np.asarray(x.astype(jnp.float32)).astype(np.float64) for x in rows)
        logits = k @ q / math.sqrt(sizes.head_dim)
        weights = np.exp(logits - logits.max())
        want = weights @ v / weights.sum()
        largest = max(largest, float(np.abs(want).max()))
        for name, out in outs.items():
            error = np.abs(np.asarray(out[0, 0, head].astype(jnp.float32)) - want).max()
            worst[name] = max(worst[name], float(error))
    allowed = 2 * rounding_of(np.dtype(sizes.dtype)) * largest
    return {name: {"largest_error": x, "allowed": allowed, "ok": x <= allowed} for name, x in worst.items()}
