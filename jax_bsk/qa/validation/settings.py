"""What a validation run does: stages, levels, budgets, options."""

from __future__ import annotations

import dataclasses
import enum
import time
from pathlib import Path
from typing import Any


class Level(enum.Enum):
    """How much: minutes, or what a release is judged by."""

    QUICK = "quick"
    FULL = "full"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its module in this package, what it answers, and its time budget in seconds."""

    name: str
    module: str
    title: str
    budget: dict[Level, int]


def _stage(name: str, module: str, title: str, quick: int, full: int) -> Stage:
    return Stage(name, module, title, {Level.QUICK: quick, Level.FULL: full})


# In the order in which they run. A stage that is over its budget begins nothing more; what it then left out is skipped.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage("analyse", "analyse", "What is this machine, and what can it do at best?", 60, 120),
        _stage("build", "build", "Which code runs, and is it what the sources say?", 60, 900),
        _stage("validate", "numerics", "Are the numbers right?", 200, 1500),
        _stage("benchmark", "benchmark", "How fast is it beside its peers?", 120, 900),
        _stage("profile", "profile", "How far from what the machine allows?", 90, 300),
        _stage("harden", "harden", "Does it stay right under repetition, faults and sanitizers?", 360, 1500),
        _stage("report", "report", "What does it all say?", 60, 60),
    )
}

# Random cases of a level: forward ones, every second of them with gradients.
CASES = {("cuda", Level.QUICK): 60, ("cuda", Level.FULL): 3000, ("cpu", Level.QUICK): 24, ("cpu", Level.FULL): 1000}
# The same of block-sparse products, which share the stage. A seed has `DRAWS` (8) of them.
PRODUCTS = {("cuda", Level.QUICK): 32, ("cuda", Level.FULL): 600, ("cpu", Level.QUICK): 16, ("cpu", Level.FULL): 200}
# The same of decoding, where each is a program of its own.
DECODING = {("cuda", Level.QUICK): 48, ("cuda", Level.FULL): 600, ("cpu", Level.QUICK): 8, ("cpu", Level.FULL): 200}
# The same of packed sequences. A seed has `DRAWS` (4) of them.
PACKED = {("cuda", Level.QUICK): 32, ("cuda", Level.FULL): 600, ("cpu", Level.QUICK): 8, ("cpu", Level.FULL): 200}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a run.

    Attributes:
      out: where everything is written.
      level: quick or full.
      cases: random cases of attention; None for the level's. Of products, decoding and packed sequences there are a
        fifth, the level's at least.
      seed: of the first random case, and of inputs.
      jobs: processes beside each other; None for what the machine has cores for.
      programs: a folder with the check programs (cuda_check and others, see tests/csrc), built already; None builds
        them where there is a checkout and an nvcc.
      peers: whether other implementations are measured, too.
      resume: the stage benchmark goes on with what a run that was cut short has left in `out`.
      quiet: no progress on standard error.
    """

    out: Path
    level: Level = Level.QUICK
    cases: int | None = None
    seed: int = 0
    jobs: int | None = None
    programs: Path | None = None
    peers: bool = True
    resume: bool = False
    quiet: bool = False

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        paths = {name: None if fields[name] is None else str(fields[name]) for name in ("out", "programs")}
        return fields | paths | {"level": self.level.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        paths = {name: None if fields[name] is None else Path(fields[name]) for name in ("out", "programs")}
        return cls(**{**fields, **paths, "level": Level(fields["level"])})

    @property
    def results(self) -> Path:
        """Where stages leave their results."""
        return self.out / "stages"


class Clock:
    """A stage's time budget."""

    def __init__(self, budget: float):
        self.budget, self._start = budget, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return self.budget - self.seconds
