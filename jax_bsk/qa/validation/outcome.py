"""What a stage found: checks with verdicts, and data. Plain values that become JSON and come back."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Any


class Verdict(enum.Enum):
    """Of a check, a stage, a report."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # never as good as passed


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
      name: what, in a few words.
      verdict: what came of it.
      detail: the figures, the failure with its repro, or why it was skipped.
      required: whether a stage passes without it. What only adds to a report (hardware counters) is not.
    """

    name: str
    verdict: Verdict
    detail: str = ""
    required: bool = True


def passed(name: str, detail: str = "") -> Check:
    return Check(name, Verdict.PASSED, detail)


def failed(name: str, detail: str) -> Check:
    return Check(name, Verdict.FAILED, detail)


def skipped(name: str, why: str, *, required: bool = True) -> Check:
    return Check(name, Verdict.SKIPPED, why, required)


def judged(name: str, ok: bool, detail: str = "") -> Check:
    return passed(name, detail) if ok else failed(name, detail)


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage found.

    Attributes:
      stage: its name.
      checks: in the order in which they were made.
      data: what the report shows beyond them, ready for JSON.
      seconds: it took, and `budget_seconds` it had.
      provenance: of the code that ran: `provenance.collect()`.
    """

    stage: str
    checks: tuple[Check, ...]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    budget_seconds: float = 0.0
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.checks)

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"verdict": self.verdict.value}
        fields["checks"] = [dataclasses.asdict(check) | {"verdict": check.verdict.value} for check in self.checks]
        return finite(fields)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StageResult:
        checks = tuple(Check(**{**check, "verdict": Verdict(check["verdict"])}) for check in fields["checks"])
        rest = {name: fields[name] for name in ("stage", "data", "seconds", "budget_seconds", "provenance")}
        return cls(checks=checks, **rest)


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """Failed where one failed; passed only where every required one passed, and there is one."""
    checks = list(checks)
    if any(check.verdict is Verdict.FAILED for check in checks):
        return Verdict.FAILED
    required = [check for check in checks if check.required]
    good = required and all(check.verdict is Verdict.PASSED for check in required)
    return Verdict.PASSED if good else Verdict.SKIPPED


def finite(x: Any) -> Any:
    """JSON has no NaN or infinity; they are written as strings."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
