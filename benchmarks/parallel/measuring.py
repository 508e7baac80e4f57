"""What is read off compiled programs, and how calls are timed and compared."""

from __future__ import annotations

import collections
import concurrent.futures
import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.support import environment

from .cases import Effort, Sizes

NAMES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s64": 8, "u8": 1, "pred": 1}


def compile_all(programs: Mapping[Any, tuple[Any, Sequence[Any]]], effort: Effort) -> dict[Any, Any]:
    """Compiles jitted functions for their arguments, several at a time."""
    lowered = {key: function.lower(*arguments) for key, (function, arguments) in programs.items()}
    if not lowered:
        return {}
    with concurrent.futures.ThreadPoolExecutor(effort.compile_threads or environment.usable_cores()) as pool:
        return dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))


# ---- Programs


def collectives(compiled: Any) -> dict[str, int]:
    """Number of each kind of collective in a compiled program."""
    return dict(collections.Counter(re.findall(rf"\b({NAMES})(?:-start)?\(", compiled.as_text() or "")))


def collective_bytes(program: str, devices: int) -> int:
    """Bytes that a device receives by the collectives of a program's text, from the shapes of their results.

    An all-reduce counts twice what a device does not have of the sum, as a ring sends it. A loop counts once.

    Args:
      program: Text of a compiled program.
      devices: Number of devices, where a collective does not name its groups.
    """
    total = 0.0
    for line in program.splitlines():
        found = re.search(rf"= (.*?) ({NAMES})(?:-start)?\(", line)
        if not found:
            continue
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        sizes = [
            ITEM_BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
            for kind, dims in shapes
            if kind in ITEM_BYTES
        ]
        group = _group(line, devices)
        foreign = (group - 1) / group
        largest = max(sizes, default=0)
        total += {
            "all-gather": largest * foreign,
            "all-to-all": sum(sizes) * foreign if "all-to-all-start" not in line else largest * foreign,
            "all-reduce": 2 * sum(sizes) * foreign,
            "reduce-scatter": largest * (group - 1),
            "collective-permute": largest,
        }[found[2]]
    return round(total)


def _group(line: str, devices: int) -> int:
    """Number of devices that take part in a collective together."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # axes of a mesh, and those of a group
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        # A part of an axis is written as 'axis':(size before it)size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return devices


def peak_bytes(compiled: Any) -> int:
    """Bytes of a device that a program needs: arguments, results, temporaries, code."""
    found = compiled.memory_analysis()
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return sum(sizes) + found.generated_code_size_in_bytes - found.alias_size_in_bytes


def memory_of(device: Any, sizes: Sizes) -> float:
    """Bytes that programs may take of a device; infinity where it does not say."""
    if sizes.memory is not None:
        return sizes.memory
    return 0.95 * (device.memory_stats() or {}).get("bytes_limit", math.inf)


# ---- Times


def in_turn(calls: Mapping[Any, Callable[[], Any]], effort: Effort) -> dict[Any, float]:
    """Milliseconds of each call: the median of samples that are taken in turn, of calls queued one behind the other."""
    times: dict[Hashable, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(effort.rounds):
        for key, call in calls.items():
            once = milliseconds(call, 1)
            count = max(1, math.ceil(effort.milliseconds / once))
            times[key].append(once if count == 1 else milliseconds(call, count))
    return {key: statistics.median(found) for key, found in times.items()}


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start) / repeats


# ---- Values


@jax.jit
def _same(a: Any, b: Any) -> jax.Array:
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([(bits(x) == bits(y)).all() for x, y in pairs])


def same_bits(a: Any, b: Any) -> list[bool]:
    """Whether each array of one tree has the bits of the other's, which lies on the same devices."""
    return np.asarray(_same(a, b)).tolist()


@jax.jit
def _apart(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = (x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32) for x in (a, b))
    difference = jnp.abs(a - b)
    return jnp.stack([difference.max(), jnp.abs(b).max(), difference.mean(), jnp.abs(b).mean()])


def judge(a: jax.Array, b: jax.Array, rounding: float) -> dict[str, Any]:
    """How far an array is from one device's, and whether that is what roundings do.

    Parts of a sum are rounded to the type before they travel, and the sum once more; one device rounds once. So an
    element may be off by two roundings of the largest number, and on average by one of the mean.

    Args:
      a: Array in question.
      b: The same of one device, on that device.
      rounding: Relative error of a result's rounding.
    """
    most, largest, mean, size = (float(x) for x in _apart(a, b))
    return {
        "largest_difference": most,
        "allowed": 2 * rounding * largest,
        "mean_difference": mean,
        "mean_allowed": rounding * size,
        "ok": most <= 2 * rounding * largest and mean <= rounding * size,  # not so of NaN
    }


def repeats(call: Callable[[], Any], effort: Effort, names: Sequence[str]) -> dict[str, Any]:
    """Whether repeated calls have the bits of the first, how many there were, and which results differed in any.

    Args:
      call: What is repeated.
      effort: Number of repeats.
      names: Names of the results.
    """
    start, first, count, different = time.perf_counter(), call(), 0, set()
    while count < effort.repeats and (count == 0 or time.perf_counter() - start < effort.repeat_seconds):
        different |= differing(names, call(), first)
        count += 1
    return {"count": count, "equal": not different, "of": ", ".join(names), "different": sorted(different)}


def differing(names: Sequence[str], a: Any, b: Any) -> set[str]:
    """Names of the arrays of two trees whose bits are not the same."""
    return {name for name, same in zip(names, same_bits(a, b), strict=True) if not same}
