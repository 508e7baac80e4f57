"""The whole table, and its scenarios in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jax_bsk.qa.testing.faults import (
    arguments,
    boundary,
    columns,
    gates,
    installation,
    lists,
    memory,
    sizes,
    values,
)
from jax_bsk.qa.testing.faults.process import Outcome, child_environment, run_commands
from jax_bsk.qa.testing.faults.scenario import Scenario

_GROUPS = (lists, columns, gates, sizes, arguments, boundary, values, memory, installation)

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for group in _GROUPS for scenario in group.SCENARIOS}
assert len(SCENARIOS) == sum(len(group.SCENARIOS) for group in _GROUPS), "two scenarios have one name"


def run_in_subprocess(name: str, implementation: str, timeout: float = 180) -> Outcome:
    """Runs one scenario in a process of its own, with its environment.

    Args:
      name: the scenario's.
      implementation: "xla", "cpu" or "cuda".
      timeout: seconds after which the process counts as hung.
    """
    return run_all_in_subprocesses([name], implementation, timeout)[0]


def run_all_in_subprocesses(names: Sequence[str], implementation: str, timeout: float = 180) -> list[Outcome]:
    """Runs scenarios in as few processes as they allow, in order.

    Scenarios of the same environment share a process, and with it JAX's start and the compilations. One that ends the
    process or hangs is blamed alone: those after it go on in a fresh one.

    Args:
      names: the scenarios'.
      implementation: "xla", "cpu" or "cuda".
      timeout: seconds for a process that runs one scenario; each further one gives it a quarter more.
    """
    groups: dict[tuple, list[str]] = {}
    for name in names:
        groups.setdefault(tuple(sorted(SCENARIOS[name].environment.items())), []).append(name)
    command = [sys.executable, "-m", "jax_bsk.qa.testing.faults", "--implementation", implementation]
    outcomes: dict[str, Outcome] = {}
    for variables, group in groups.items():
        outcomes |= run_commands(command, group, child_environment(implementation, dict(variables)), timeout)
    return [outcomes[name] for name in names]
