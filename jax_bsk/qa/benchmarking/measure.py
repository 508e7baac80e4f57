"""Checks and times one case: jax_bsk and its peers in turn, in one process."""

from __future__ import annotations

import time
from typing import Any

import jax

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking import ours, peers
from jax_bsk.qa.benchmarking.cases import Case, Goal, Pattern
from jax_bsk.qa.benchmarking.check import Reference, References, Spots, choose_spots, together
from jax_bsk.qa.benchmarking.contender import Contender, Refused, first_line
from jax_bsk.qa.benchmarking.gradient_check import GradientReferences
from jax_bsk.qa.benchmarking.inputs import Inputs
from jax_bsk.qa.benchmarking.passes import Pass
from jax_bsk.qa.benchmarking.tables import GOALS
from jax_bsk.qa.benchmarking.timing import Timing, interleaved

OURS = "jax_bsk"


def measure(case: Case, inputs: Inputs, *, implementation: str, with_peers: bool, rounds: int, seed: int) -> dict:
    """One case's record, ready for JSON. What fails is in it with its reason; nothing is raised for it."""
    start = time.perf_counter()
    makers: dict[str, Any] = {OURS: lambda case, inputs: ours.make(case, inputs, implementation)}
    if with_peers:
        makers |= dict(peers.offers(case))
    spots = choose_spots(case, seed)
    references = _References(case, inputs, spots)
    contenders: dict[str, Contender] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            contender = make(case, inputs)
            check = _check(case, contender, references.of(contender.pattern))
            records[name] = {"variant": contender.variant, "check": check}
            if check["ok"]:  # the time of a wrong result means nothing
                jax.block_until_ready(contender.dispatch(0))  # compiles the chain
                contenders[name] = contender
        except Refused as reason:
            records[name] = {"refused": str(reason)}
        except Exception as error:  # no memory, an unsupported shape: a result, and the other contenders go on
            records[name] = {"failed" if name == OURS else "refused": first_line(error)}

    calls = {name: contender.dispatch for name, contender in contenders.items()}
    queued = compat.default_platform() != "cpu"
    try:
        timings = interleaved(calls, rounds, queued=queued)
    except Exception as error:  # all ran once, so memory is short with many calls queued: at least jax_bsk's time
        for name in calls.keys() - {OURS}:
            records[name]["refused"] = f"while timing this case's contenders: {first_line(error)}"
        timings = interleaved({name: call for name, call in calls.items() if name == OURS}, rounds, queued=queued)
    for name, timing in timings.items():
        records[name] |= _times(timing, contenders[name].calls, case.useful_flops)
    mine = records.pop(OURS)
    for record in records.values():
        if "seconds" in record and "seconds" in mine:
            record["ratio"] = record["seconds"] / mine["seconds"]
    ok = "failed" not in mine and all(r["check"]["ok"] for r in (mine, *records.values()) if "check" in r)
    return {
        "name": case.name,
        "pass": case.measured.value,
        "batch": case.batch,
        "heads": case.heads,
        "kv_heads": case.kv_heads or case.heads,
        "length": case.length,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "block_size": case.block_size,
        "pattern": case.pattern.kind,
        "density": case.density,
        "block_density": case.mask.density,
        "chained_calls": case.calls,
        "panel": case.panel,
        "series": case.series,
        "useful_flops": case.useful_flops,
        OURS: mine,
        "peers": records,
        "ok": ok,
        "seconds_with_compilation": time.perf_counter() - start,
    }


class _References:
    """References of everything that a case's pass yields, by name."""

    def __init__(self, case: Case, inputs: Inputs, spots: Spots):
        self._out = References(case, inputs, spots) if "out" in case.measured.results else None
        self._gradients = None if case.measured is Pass.FORWARD else GradientReferences(case, inputs, spots)

    def of(self, pattern: Pattern) -> dict[str, Reference]:
        out = {} if self._out is None else {"out": self._out.of(pattern)}
        return out if self._gradients is None else out | self._gradients.of(pattern)


def _check(case: Case, contender: Contender, references: dict[str, Reference]) -> dict[str, Any]:
    """Runs it once; the results are gone when this returns."""
    checks = {}
    for name, result in zip(case.measured.results, contender.once(), strict=True):
        reference = references[name]
        checks[name] = reference.check(*contender.rows(result, reference.spots))
    return together(checks)


def _times(timing: Timing, calls: int, flops: float) -> dict[str, Any]:
    one = timing.of_one(calls)
    return one.to_json() | {"useful_flops_per_second": flops / one.median}


def judge(record: dict[str, Any], device: str, measured: Pass = Pass.FORWARD) -> None:
    """Adds the case's goal in that pass and whether it is "met", "missed", or "open" where a peer was not timed.

    Goals are for an H200; other devices get none.
    """
    goal = GOALS[measured].get(record["name"])
    if goal is None or "H200" not in device:
        record |= {"goal": None, "verdict": None}
        return
    mine = record["jax_bsk"]
    parts: list[bool | None] = []
    if "seconds" not in mine:
        parts.append(False)
    else:
        if goal.flops_per_second is not None:
            parts.append(mine["useful_flops_per_second"] >= goal.flops_per_second)
        if goal.seconds is not None:
            parts.append(mine["seconds"] <= goal.seconds)
        for peer, least in goal.ratios.items():
            ratio = record["peers"].get(peer, {}).get("ratio")
            parts.append(None if ratio is None else ratio >= least)
    verdict = "missed" if False in parts else "open" if None in parts else "met"
    record |= {"goal": describe(goal), "verdict": verdict}


def describe(goal: Goal) -> str:
    """A goal in a few words."""
    parts = []
    if goal.flops_per_second is not None:
        parts.append(f">= {goal.flops_per_second / 1e12:g} TFLOP/s")
    if goal.seconds is not None:
        parts.append(f"<= {goal.seconds * 1e3:g} ms")
    parts += [f">= {least:g}x {peer}" for peer, least in goal.ratios.items()]
    return ", ".join(parts)
