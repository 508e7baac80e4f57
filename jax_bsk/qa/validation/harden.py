"""Stage harden: repetition, faults, memory, teardown; on a GPU also sanitizers and seeded kernel bugs.

What could crash runs in processes of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Note, Progress, unheard
from jax_bsk.qa.testing import faults, steady
from jax_bsk.qa.testing.isolate import Worker, child_environment
from jax_bsk.qa.validation import kernels, provenance
from jax_bsk.qa.validation.measured import Measured
from jax_bsk.qa.validation.outcome import Check, StageResult, Verdict, failed, judged, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

REPEATS = {("cuda", Level.QUICK): 100, ("cuda", Level.FULL): 500, ("cpu", Level.QUICK): 10, ("cpu", Level.FULL): 100}
CALLS = {Level.QUICK: 1000, Level.FULL: 5000}  # while memory is watched
PRODUCT_CALLS = 300  # the same of products
DECODE_CALLS = {Level.QUICK: 1000, Level.FULL: 10_000}  # and of decoding
TASK_SECONDS = 180  # after which repeated calls hang
GROWTH_KIB = 20_000  # that a process may have grown by then: allocators keep some


def run(settings: Settings, clock: Clock) -> StageResult:
    """One part after the other, as long as there is time."""
    implementation = provenance.implementation()
    parts: list[tuple[str, Callable[..., tuple[list[Check], Any]]]] = [
        ("repeats", _repeats),
        ("products", _products),
        ("decoding", _decoding),
        ("faults", _faults),
        ("memory and teardown", _processes),
    ]
    if implementation == "cuda":
        parts += [
            ("check programs", kernels.check_cases),
            ("sanitizers", kernels.sanitizers),
            ("seeded bugs", kernels.mutations),
        ]
    checks: list[Check] = []
    data: dict[str, Any] = {}
    kept = Measured(settings, "harden")
    with Progress(len(parts), settings.quiet) as progress:
        for name, part in parts:
            progress.step(name)
            if clock.left < 0:
                checks.append(skipped(name, "the stage's time was over"))
                continue
            if name in kept:
                result = StageResult.from_json(kept[name])
            else:
                found, more = part(settings, clock, implementation, progress.note)
                result = StageResult(name, tuple(found), {"data": more})
                if all(check.verdict is not Verdict.SKIPPED for check in found):
                    kept.keep(name, result.to_json())
            checks += result.checks
            data[name] = result.data["data"]
    return StageResult("harden", tuple(checks), data)


# ---- Repetition


def _repeats(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Gradients of attention again and again, on a GPU beside work that holds its multiprocessors."""
    chosen = list(steady.ATTENTION)
    if implementation == "cpu" or settings.level is Level.QUICK:
        chosen = ["d128-gqa", "d64-blocks-64", "float32"]
    worker = Worker(implementation, TASK_SECONDS)
    check, records = _steady("bit-equal gradients", worker, chosen, "shapes", implementation, settings.level, note)
    worker.close()
    return [check], {name: record["ok"] for name, record in records.items()}


def _products(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Block-sparse products again and again: the CTAs of a cluster wait for each other, and could wait for ever."""
    chosen = list(steady.PRODUCTS[implementation])
    worker = Worker(implementation, TASK_SECONDS)
    what = "matrices, their products and gradients, rows uneven and empty"
    tasks = [f"matmul:{name}" for name in chosen]
    check, records = _steady("bit-equal products", worker, tasks, what, implementation, settings.level, note)
    note("memory")
    memory, grown = _growth("memory of products", worker, "matmul:small", PRODUCT_CALLS)
    worker.close()
    unequal = [name.removeprefix("matmul:") for name, record in records.items() if not record["ok"]]
    data = {"unequal": unequal, "repeats": REPEATS[implementation, settings.level], "shapes": chosen}
    return [check, memory], data | grown


def _decoding(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """A serving batch again and again: parts of rows are merged in their order, whoever is done first."""
    chosen = list(steady.DECODING[implementation])
    worker = Worker(implementation, TASK_SECONDS)
    what = "serving batches, prompts among sequences of few tokens"
    tasks = [f"decode:{name}" for name in chosen]
    check, records = _steady("bit-equal decoding", worker, tasks, what, implementation, settings.level, note)
    note("memory")
    memory, grown = _growth("memory of decoding", worker, "decode:small", DECODE_CALLS[settings.level])
    worker.close()
    unequal = [name.removeprefix("decode:") for name, record in records.items() if not record["ok"]]
    data = {"unequal": unequal, "repeats": REPEATS[implementation, settings.level], "shapes": chosen}
    return [check, memory], data | grown


def _steady(
    name: str, worker: Worker, cases: Sequence[str], what: str, implementation: str, level: Level, note: Note
) -> tuple[Check, dict[str, dict[str, Any]]]:
    count = REPEATS[implementation, level]
    words = [str(count), *(["load"] if implementation == "cuda" else [])]
    records = {}
    for case in cases:
        note(case)
        for record in worker.ask(f"steady:{case}", *words):
            records[case] = record
    detail = f"{count} repeats of {len(cases)} {what}" + (" beside other work" if implementation == "cuda" else "")
    wrong = [f"{case}: {record['text']}" for case, record in records.items() if not record["ok"]]
    return judged(name, not wrong, "; ".join([detail, *wrong])), records


def _growth(name: str, worker: Worker, case: str, calls: int) -> tuple[Check, dict[str, Any]]:
    """Whether the process and the device's memory grow by calls that were made before."""
    (record,) = worker.ask(f"growth:{case}", str(calls))
    if not record["ok"]:
        return failed(name, record["text"]), {}
    host, device = record["host_growth_kib"], record["device_growth_bytes"]
    detail = f"{calls} calls grew the process by {host} KiB and the device's memory by {device} bytes"
    data = {"calls": calls, "host_growth_kib": host, "device_growth_bytes": device}
    return judged(name, host < GROWTH_KIB and device <= 0, detail), data


# ---- Faults


def _faults(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Every scenario of the fault table in processes apart from this one; what ends its process is blamed alone."""
    names = [name for name, scenario in faults.SCENARIOS.items() if implementation in scenario.platforms]
    jobs = settings.jobs or max(1, environment.usable_cores() // 2)
    groups = [group for i in range(jobs) if (group := names[i::jobs])]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda group: faults.run_all_in_subprocesses(group, implementation, note=note), groups)
        outcomes = [outcome for part in parts for outcome in part]
    table = [
        {
            "name": outcome.name,
            "fault": faults.SCENARIOS[outcome.name].fault,
            "expected": faults.SCENARIOS[outcome.name].expected,
            "passed": outcome.passed,
            "detail": outcome.detail[-300:],
        }
        for outcome in outcomes
    ]
    wrong = [row for row in table if not row["passed"]]
    detail = f"{len(table)} scenarios in subprocesses"
    if wrong:
        detail = f"{len(wrong)} of {detail}: {wrong[0]['name']}: {wrong[0]['detail']}"
    return [judged("fault table", not wrong, detail)], table


# ---- Memory and teardown

_TEARDOWN = """
import sys, jax, jax.numpy as jnp, jax_bsk
x = jnp.ones((1, 256, 2, 64), jnp.float32)
f = jax.jit(jax.grad(lambda x: jax_bsk.sparse_attention(
    x, x, x, is_causal=True, implementation=sys.argv[1]).sum()))
y = f(x)  # not waited for: the process ends while it may be under way
if sys.argv[2] == "raise": raise SystemExit(7)
"""


def _processes(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Whether a process grows, and whether it ends."""
    worker = Worker(implementation, 300)
    check, data = _growth("memory", worker, "small", CALLS[settings.level])
    worker.close()
    checks = [check]
    for how, status in (("end", 0), ("raise", 7)):
        note(f"teardown ({how})")
        command = [sys.executable, "-c", _TEARDOWN, implementation, how]
        more = child_environment(implementation)
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=more, check=False)
        clean = result.returncode == status and "Error" not in result.stderr
        detail = f"exit status {result.returncode}" + ("" if clean else f": {result.stderr[-300:]}")
        checks.append(judged(f"teardown ({how})", clean, detail))
    return checks, data
