"""Runs stages, each in a process of its own, and reads what they leave: a stage that crashes or hangs fails alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from jax_bsk.qa.validation.outcome import StageResult, failed
from jax_bsk.qa.validation.settings import STAGES, Settings

# A stage begins nothing after its budget; what it is at then may take so much longer before it counts as hung.
PATIENCE = 300


def platform() -> str | None:
    """JAX's platform, found in a process of its own, so that this one holds no GPU; None where JAX does not start."""
    command = [sys.executable, "-c", "from jax_bsk.core import compat; print(compat.default_platform())"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def run(
    settings: Settings, stages: Sequence[str], *, on_result: Callable[[StageResult], None] = lambda result: None
) -> list[StageResult]:
    """The results of those stages, in order; each is also left in `settings.results`."""
    settings.results.mkdir(parents=True, exist_ok=True)
    results = []
    for name in stages:
        results.append(_run(settings, name))
        on_result(results[-1])
    return results


def _run(settings: Settings, name: str) -> StageResult:
    path = settings.results / f"{name}.json"
    path.unlink(missing_ok=True)
    budget = STAGES[name].budget[settings.level]
    # PyTorch shares the GPU in one stage, worker processes in others.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_bsk.qa.validation", name],
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(settings.to_json()), timeout=budget + PATIENCE)
        trouble = f"its process ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        trouble = f"it hung: not done {PATIENCE} s after its budget of {budget} s"
    except KeyboardInterrupt:
        _stop(process)
        raise
    _stop(process)
    if path.exists() and process.returncode == 0:
        return StageResult.from_json(json.loads(path.read_text()))
    result = StageResult(name, (failed("the stage", f"{trouble}; see its messages above"),), budget_seconds=budget)
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return result


def _stop(process: subprocess.Popen[str]) -> None:
    """The process and what it began, which share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def load(settings: Settings) -> dict[str, StageResult]:
    """What stages have left in the folder so far, by name in their order."""
    found = {}
    for name in STAGES:
        path = settings.results / f"{name}.json"
        if path.exists():
            found[name] = StageResult.from_json(json.loads(path.read_text()))
    return found
