"""Timing of several callables against each other in one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# A sample lasts at least so long, by repeating short calls, so that the clock and (on a GPU) the wait for the last call
# do not count.
SAMPLE_SECONDS = 0.02
MOST_CALLS = 200

Call = Callable[[int], Any]  # dispatches call number i and returns its arrays


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a sample."""

    samples: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.median,
            "least_seconds": min(self.samples),
            "samples": list(self.samples),
            "calls_per_sample": self.calls_per_sample,
        }


def interleaved(
    calls: Mapping[str, Call], repeats: int, *, queued: bool, on_round: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Times every call `repeats` times, in turn, so that what changes on the machine meanwhile meets all of them.

    Args:
      calls: What to time; compiled and run once already.
      repeats: Samples of each.
      queued: Whether the calls of a sample are queued and waited for once (a GPU, which runs them one by one) or waited
        for one by one (a CPU, which would run them at the same time).
      on_round: Called before each round.
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

    on_round()
    # The first sample is a warm-up that tells how many calls a sample needs; a long call is its own sample.
    counts, samples = {}, {}
    for name in calls:
        once = sample(name, 1)
        if once < SAMPLE_SECONDS:
            once = sample(name, 2)
        counts[name] = min(MOST_CALLS, max(1, round(SAMPLE_SECONDS / once)))
        samples[name] = []
    for i in range(repeats):
        on_round()
        # Back and forth, so that no call always follows the same neighbour.
        for name in calls if i % 2 == 0 else reversed(calls):
            samples[name].append(sample(name, counts[name]))
    return {name: Timing(tuple(samples[name]), counts[name]) for name in calls}
