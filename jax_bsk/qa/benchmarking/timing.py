"""Timing of several callables against each other in one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# A sample lasts at least so long, by repeating short calls, so that the clock and (on a GPU) the wait for the last call
# do not count.
SAMPLE_SECONDS = 0.02
MOST_CALLS = 200
# Rounds where the user names no number.
MOST_REPEATS, LEAST_REPEATS, BUDGET_SECONDS = 5, 3, 10.0

Call = Callable[[int], Any]  # dispatches call number i and returns its arrays


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a sample."""

    samples: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def of_one(self, calls: int) -> Timing:
        """The same of each call where one that was timed holds so many."""
        return Timing(tuple(sample / calls for sample in self.samples), self.calls_per_sample * calls)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.median,
            "least_seconds": min(self.samples),
            "samples": list(self.samples),
            "calls_per_sample": self.calls_per_sample,
        }


def interleaved(
    calls: Mapping[str, Call],
    repeats: int | None,
    *,
    queued: bool,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Timing]:
    """Times every call `repeats` times, in turn, so that what changes on the machine meanwhile meets all of them.

    Args:
      calls: What to time; compiled and run once already.
      repeats: Samples of each; None for `MOST_REPEATS`, or fewer (`LEAST_REPEATS` at least) of calls so long that
        `BUDGET_SECONDS` are over.
      queued: Whether the calls of a sample are queued and waited for once (a GPU, which runs them one by one) or waited
        for one by one (a CPU, which would run them at the same time).
      on_round: Called with its number before each round.
    """
    counters = dict.fromkeys(calls, 0)

    def sample(name: str, count: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(count):
            result = calls[name](counters[name])
            counters[name] += 1
            if not queued:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for i in range(repeats or MOST_REPEATS):
        if repeats is None and i >= LEAST_REPEATS and time.perf_counter() - start > BUDGET_SECONDS:
            break
        on_round(i)
        # Back and forth, so that no call always follows the same neighbour.
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            if name not in counts:
                once = sample(name, 1)
                if once >= SAMPLE_SECONDS:
                    counts[name] = 1
                    samples[name].append(once)  # long enough to be a sample already
                    continue
                once = min(once, sample(name, 2))
                counts[name] = min(MOST_CALLS, max(1, round(SAMPLE_SECONDS / once)))
            samples[name].append(sample(name, counts[name]))
    return {name: Timing(tuple(samples[name]), counts[name]) for name in calls}


def copy_rate(copied: int, rounds: int) -> float:
    """Bytes per second that the device reads and writes to copy an array of so many bytes, by the better way of two."""
    x = jnp.ones(copied // 2, jnp.bfloat16)
    ways = {"copy": jax.jit(jnp.copy), "double": jax.jit(lambda x: x + x)}  # the runtime's copy, and a kernel
    for way in ways.values():
        jax.block_until_ready(way(x))
    calls: dict[str, Call] = {name: lambda _, way=way: way(x) for name, way in ways.items()}
    found = interleaved(calls, rounds, queued=True)
    return 2 * copied / min(one.median for one in found.values())
