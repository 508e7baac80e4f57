"""Stage harden: repetition, faults, memory, teardown; on a GPU also sanitizers and seeded kernel bugs.

What could crash runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.testing import faults, steady
from jax_bsk.qa.testing.gpu_load import concurrent_load
from jax_bsk.qa.validation import kernels, provenance
from jax_bsk.qa.validation.outcome import Check, StageResult, failed, judged, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

REPEATS = {("cuda", Level.QUICK): 100, ("cuda", Level.FULL): 500, ("cpu", Level.QUICK): 10, ("cpu", Level.FULL): 100}
PRODUCT_REPEATS = {
    ("cuda", Level.QUICK): 100,
    ("cuda", Level.FULL): 500,
    ("cpu", Level.QUICK): 10,
    ("cpu", Level.FULL): 100,
}
PRODUCT_SECONDS = 180  # after which they hang
CALLS = {Level.QUICK: 1000, Level.FULL: 5000}  # while memory is watched
GROWTH_KIB = 20_000  # that a process may have grown by then: allocators keep some


def run(settings: Settings, clock: Clock) -> StageResult:
    """One part after the other, as long as there is time."""
    implementation = provenance.implementation()
    parts: list[tuple[str, Callable[..., tuple[list[Check], Any]]]] = [
        ("repeats", _repeats),
        ("products", _products),
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
    with Progress(len(parts), settings.quiet) as progress:
        for name, part in parts:
            progress.step(name)
            if clock.left < 0:
                checks.append(skipped(name, "the stage's time was over"))
                continue
            found, data[name] = part(settings, clock, implementation)
            checks += found
    return StageResult("harden", tuple(checks), data)


# ---- Repetition


def _repeats(settings: Settings, clock: Clock, implementation: str) -> tuple[list[Check], Any]:
    """Gradients again and again, on a GPU beside work that holds its multiprocessors."""
    count = REPEATS[implementation, settings.level]
    chosen = list(steady.STEADY)
    if implementation == "cpu" or settings.level is Level.QUICK:
        chosen = ["d128-gqa", "d64-blocks-64", "float32"]
    load = concurrent_load if implementation == "cuda" else contextlib.nullcontext
    unequal, data = [], {}
    for name in chosen:
        with load():
            data[name] = steady.repeats_are_equal(steady.STEADY[name], implementation, count)
        if not data[name]:
            unequal.append(name)
    detail = f"{count} repeats of {len(chosen)} shapes" + (" beside other work" if implementation == "cuda" else "")
    detail += f"; other bits in {', '.join(unequal)}" if unequal else ""
    return [judged("bit-equal gradients", not unequal, detail)], data


def _products(settings: Settings, clock: Clock, implementation: str) -> tuple[list[Check], Any]:
    """Block-sparse products again and again, in a process that can be ended: CTAs of a cluster wait for each other."""
    count = PRODUCT_REPEATS[implementation, settings.level]
    command = [sys.executable, "-m", "jax_bsk.qa.testing.matmul.steady", implementation, "--repeats", str(count)]
    command += ["--load"] if implementation == "cuda" else []
    names = "bit-equal products", "memory of products"
    try:
        result = _run(command, PRODUCT_SECONDS)
    except subprocess.TimeoutExpired:
        return [failed(name, f"not done after {PRODUCT_SECONDS} s: it hangs") for name in names], {}
    if result.returncode:
        return [failed(name, result.stderr[-500:]) for name in names], {}
    data = json.loads(result.stdout.splitlines()[-1])
    detail = f"{count} repeats of all products and gradients of {len(data['shapes'])} matrices, rows uneven and empty"
    detail += " beside other work" if implementation == "cuda" else ""
    detail += f"; other bits in {', '.join(data['unequal'])}" if data["unequal"] else ""
    host, device = data["host_growth_kib"], data["device_growth_bytes"]
    grown = f"{data['calls']} calls grew the process by {host} KiB and the device's memory by {device} bytes"
    return [
        judged(names[0], not data["unequal"], detail),
        judged(names[1], host < GROWTH_KIB and device <= 0, grown),
    ], data


# ---- Faults


def _faults(settings: Settings, clock: Clock, implementation: str) -> tuple[list[Check], Any]:
    """Every scenario of the fault table in processes apart from this one; what ends its process is blamed alone."""
    names = [name for name, scenario in faults.SCENARIOS.items() if implementation in scenario.platforms]
    jobs = settings.jobs or max(1, environment.usable_cores() // 2)
    groups = [group for i in range(jobs) if (group := names[i::jobs])]
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda group: faults.run_all_in_subprocesses(group, implementation), groups)
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

_MEMORY = """
import resource, sys, jax, jax.numpy as jnp, jax_bsk
x = jnp.ones((1, 256, 2, 64), jnp.float32)
f = jax.jit(jax.grad(lambda x: jax_bsk.sparse_attention(
    x, x, x, is_causal=True, implementation=sys.argv[1]).sum()))
def run(n):
    for _ in range(n): y = f(x)
    jax.block_until_ready(y)
    del y
    stats = jax.devices()[0].memory_stats() or {}
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, stats.get("bytes_in_use", 0)
before = run(1000)
after = run(int(sys.argv[2]))
print(after[0] - before[0], after[1] - before[1])
"""
_TEARDOWN = """
import sys, jax, jax.numpy as jnp, jax_bsk
x = jnp.ones((1, 256, 2, 64), jnp.float32)
f = jax.jit(jax.grad(lambda x: jax_bsk.sparse_attention(
    x, x, x, is_causal=True, implementation=sys.argv[1]).sum()))
y = f(x)  # not waited for: the process ends while it may be under way
if sys.argv[2] == "raise": raise SystemExit(7)
"""


def _processes(settings: Settings, clock: Clock, implementation: str) -> tuple[list[Check], Any]:
    """Whether a process grows, and whether it ends."""
    calls = CALLS[settings.level]
    result = _python(_MEMORY, implementation, str(calls))
    if result.returncode:
        checks, data = [failed("memory", result.stderr[-500:])], {}
    else:
        host_kib, device_bytes = map(int, result.stdout.split()[-2:])
        data = {"calls": calls, "host_growth_kib": host_kib, "device_growth_bytes": device_bytes}
        detail = f"{calls} calls grew the process by {host_kib} KiB and the device's memory by {device_bytes} bytes"
        checks = [judged("memory", host_kib < GROWTH_KIB and device_bytes <= 0, detail)]
    for how, status in (("end", 0), ("raise", 7)):
        result = _python(_TEARDOWN, implementation, how)
        clean = result.returncode == status and "Error" not in result.stderr
        detail = f"exit status {result.returncode}" + ("" if clean else f": {result.stderr[-300:]}")
        checks.append(judged(f"teardown ({how})", clean, detail))
    return checks, data


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-c", code, *arguments], 300)


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    more = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ | more, check=False)
