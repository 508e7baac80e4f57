"""What came of scenarios in a process of their own: a wrong answer, a crash and no answer are told apart.

Below the scenarios: it knows their names alone, and the lines in which a process reports them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

SURVIVED = "survived"  # the last line of a process that lived to its end
_LINE = re.compile(r"(?P<name>\S+): (?P<verdict>ok|FAILED) \((?P<seconds>[\d.]+) s\) ?(?P<detail>.*)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a scenario.

    Attributes:
      name: the scenario's.
      passed: whether what must happen did, and the process lived.
      detail: what happened instead; empty where it passed.
      seconds: how long it took, without the start of its process where it is known.
    """

    name: str
    passed: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        """One line, which `run_commands` reads."""
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name}: {verdict} ({self.seconds:.2f} s) {' '.join(self.detail.split())}".rstrip()


def child_environment(implementation: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process that shares the machine, perhaps its GPU, with this one."""
    chosen = {"JAX_PLATFORMS": "cpu"} if implementation == "cpu" else {}
    # A process that has not asked for all memory leaves some to the others.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **chosen, **(extra or {})}


def run_commands(
    command: Sequence[str], names: Sequence[str], environment: Mapping[str, str], timeout: float
) -> dict[str, Outcome]:
    """Runs a command with names appended until every one has an outcome, each at most once."""
    outcomes: dict[str, Outcome] = {}
    while left := [name for name in names if name not in outcomes]:
        started = time.perf_counter()
        limit = timeout * (1 + (len(left) - 1) / 4)
        text, problem = _run([*command, *left], environment, limit)
        seconds = time.perf_counter() - started
        lines = {m["name"]: m for m in map(_LINE.fullmatch, text.splitlines()) if m and m["name"] in left}
        outcomes |= {n: Outcome(n, m["verdict"] == "ok", m["detail"], float(m["seconds"])) for n, m in lines.items()}
        silent = [name for name in left if name not in lines]
        if problem or silent:  # the one that it was at, or the last, if it died while it went away
            blamed = silent[0] if silent else left[-1]
            outcomes[blamed] = Outcome(blamed, False, problem or "it printed no line", seconds)
    return outcomes


def _run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> tuple[str, str]:
    """Standard output, and what is wrong with how the process ended."""
    try:
        result = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        return _text(error.stdout), f"hung: no end after {limit:.0f} s{_tail(_text(error.stderr))}"
    if result.returncode < 0:
        return result.stdout, f"crashed: {_signal_name(-result.returncode)}{_tail(result.stderr)}"
    if result.returncode not in (0, 1) or not result.stdout.endswith(f"{SURVIVED}\n"):
        return result.stdout, f"ended early: exit status {result.returncode}{_tail(result.stderr)}"
    return result.stdout, ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _tail(text: str) -> str:
    return f"; {end}" if (end := text[-2000:].strip()) else ""
