"""The whole table, and its scenarios in processes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax_bsk.qa.support.progress import Note, unheard
from jax_bsk.qa.testing.faults import (
    arguments,
    biases,
    boundary,
    columns,
    decoding,
    gates,
    installation,
    lists,
    memory,
    packed,
    sizes,
    values,
)
from jax_bsk.qa.testing.faults.scenario import Scenario
from jax_bsk.qa.testing.isolate import Worker

_GROUPS = (lists, columns, gates, biases, sizes, arguments, boundary, decoding, packed, values, memory, installation)

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for group in _GROUPS for scenario in group.SCENARIOS}
assert len(SCENARIOS) == sum(len(group.SCENARIOS) for group in _GROUPS), "two scenarios have one name"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a scenario.

    Attributes:
      name: the scenario's.
      passed: whether what must happen did, and the process lived.
      detail: what happened instead; empty where it passed.
    """

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'ok' if self.passed else 'FAILED'} {self.detail}".rstrip()


def run_all_in_subprocesses(
    names: Sequence[str], implementation: str, timeout: float = 180, *, note: Note = unheard
) -> list[Outcome]:
    """Runs scenarios in as few processes as they allow, in order.

    Scenarios of the same environment share a process, and with it JAX's start and the compilations. One that ends the
    process or hangs is blamed alone: those after it go on in a fresh one. What is wrong when a process goes away is the
    last one's.

    Args:
      names: the scenarios'.
      implementation: "xla", "cpu" or "cuda".
      timeout: seconds for each scenario, the start of its process included.
      note: told the name of each scenario before it runs.
    """
    groups: dict[tuple, list[str]] = {}
    for name in names:
        groups.setdefault(tuple(sorted(SCENARIOS[name].environment.items())), []).append(name)
    outcomes: dict[str, Outcome] = {}
    for variables, group in groups.items():
        worker = Worker(implementation, timeout, dict(variables))
        for name in group:
            note(name)
            (record,) = worker.ask(f"fault:{name}")
            outcomes[name] = Outcome(name, record["ok"], record["text"])
        if problem := worker.close():
            outcomes[group[-1]] = Outcome(group[-1], False, problem)
    return [outcomes[name] for name in names]
