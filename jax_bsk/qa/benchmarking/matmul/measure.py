"""Checks and times one case: its contenders in turn, in one process, on the same numbers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking.contender import Refused, first_line
from jax_bsk.qa.benchmarking.matmul.cases import Case, Operation
from jax_bsk.qa.benchmarking.matmul.check import Reference, choose_spots, make_reference
from jax_bsk.qa.benchmarking.matmul.contender import Contender
from jax_bsk.qa.benchmarking.matmul.contenders import DENSE, OURS, Maker
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.benchmarking.timing import Timing, interleaved

# A call that takes longer is measured once; one that would take longer than the second is left out.
SLOW_SECONDS, MOST_SECONDS = 1.0, 6.0
# A peer whose error is within so many tolerances does compute the product, only with less care. It is reported as wrong
# and timed all the same: so is cuSPARSE's product in bfloat16 (1.7 tolerances at 4,096 on an H200).
INEXACT = 8.0


class Rates:
    """Seconds a useful operation that contenders took in the cases before, to foretell those that follow."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Operation, str], tuple[float, str]] = {}

    def learn(self, name: str, case: Case, seconds: float) -> None:
        mine = seconds / max(case.config.useful_flops, 1.0), case.name
        key = self._key(name, case)
        # The best so far: rates rise with the size, and a dense product's falls with the density.
        self._seconds[key] = min(mine, self._seconds.get(key, mine))

    def ask(self, name: str, case: Case) -> None:
        """Raises `Refused` for a call that would take longer than `MOST_SECONDS`."""
        rate, where = self._seconds.get(self._key(name, case), (0.0, ""))
        expected = rate * case.config.useful_flops
        if expected > MOST_SECONDS:
            raise Refused(f"a call would take some {expected:.0f} s, even at the rate of '{where}'")

    @staticmethod
    def _key(name: str, case: Case) -> tuple[str, Operation, str]:
        return name, case.operation, case.config.dtype


def measure(
    case: Case, operands: Operands, makers: Mapping[str, Maker], rates: Rates, *, rounds: int, seed: int
) -> dict[str, Any]:
    """One case's record, ready for JSON. What fails is in it with its reason; nothing is raised for it."""
    start = time.perf_counter()
    spots = choose_spots(case.config.size, seed)
    reference = make_reference(operands, case.operation, spots)
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, make in makers.items():
        try:
            rates.ask(name, case)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")  # a slower implementation than asked for is told of every time
                contender = make(case, operands)
                own = contender.weights
                wanted = reference if own is None else make_reference(operands, case.operation, spots, own)
                check, seconds = _check(contender, wanted)
            records[name] = {"variant": contender.variant, "check": check}
            if told:
                records[name]["notes"] = list(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in told))
            if not check["ok"]:
                if name.startswith(OURS) or not _is_near(check):
                    continue  # the time of a wrong result means nothing
                records[name]["inexact"] = check["share_of_tolerance"]
            rates.learn(name, case, seconds)
            if seconds > SLOW_SECONDS:
                records[name] |= _times(Timing((seconds,), 1), 1, case)
            else:
                jax.block_until_ready(contender.dispatch(0))
                ready[name] = contender
        except Refused as reason:
            records[name] = {"refused": str(reason)}
        except Exception as error:  # no memory, a type that it does not take: a result, and the others go on
            records[name] = {"failed" if name.startswith(OURS) else "refused": first_line(error)}
    for name, result in _time(ready, rounds, records).items():
        records[name] |= _times(result, ready[name].calls, case)
    _add_ratios(records)
    config = case.config
    return case.facts | {
        "stored_blocks": config.stored_blocks,
        "density": config.density,
        "useful_flops": config.useful_flops,
        "chained_calls": case.calls,
        "contenders": records,
        "ok": all(_is_right(record) for record in records.values()),
        "seconds_with_compilation": time.perf_counter() - start,
    }


def _check(contender: Contender, reference: Reference) -> tuple[dict[str, Any], float]:
    """The check, and how long that call took; the result is gone when this returns."""
    start = time.perf_counter()
    result = contender.once()
    seconds = time.perf_counter() - start
    check = reference.check(*contender.pick(result, reference.spots))
    return check, seconds


def _time(ready: dict[str, Contender], rounds: int, records: dict[str, dict[str, Any]]) -> dict[str, Timing]:
    queued = compat.default_platform() != "cpu"
    calls = {name: contender.dispatch for name, contender in ready.items()}
    try:
        return interleaved(calls, rounds, queued=queued)
    except Exception as error:  # each ran once, so memory is short with many calls queued: one by one, then
        together = first_line(error)
    timings = {}
    for name, call in calls.items():
        try:
            timings |= interleaved({name: call}, rounds, queued=False)
            records[name].setdefault("notes", []).append(f"timed by itself, each call waited for: {together}")
        except Exception as error:
            records[name]["failed" if name.startswith(OURS) else "refused"] = f"while timed: {first_line(error)}"
    return timings


def _times(timing: Timing, calls: int, case: Case) -> dict[str, Any]:
    one = timing.of_one(calls)
    rate = case.config.useful_flops / one.median
    return one.to_json() | {"chained_calls": calls, "useful_flops_per_second": rate}


def _add_ratios(records: dict[str, dict[str, Any]]) -> None:
    dense = records.get(DENSE, {}).get("seconds", math.nan)
    for record in records.values():
        if "seconds" in record and math.isfinite(dense):
            record["ratio_to_dense"] = dense / record["seconds"]


def _is_near(check: dict[str, Any]) -> bool:
    return check["finite"] and check["share_of_tolerance"] is not None and check["share_of_tolerance"] <= INEXACT


def _is_right(record: dict[str, Any]) -> bool:
    return "failed" not in record and ("check" not in record or record["check"]["ok"])
