"""`python -m jax_bsk.qa.testing.faults`: runs scenarios of the fault table in this process, a line each.

One that must start with an environment of its own gets a process of its own. The last line is `survived`.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

from jax_bsk.core import dispatch
from jax_bsk.qa.testing.faults import SCENARIOS, Outcome, Scenario, run_in_subprocess
from jax_bsk.qa.testing.faults.process import SURVIVED


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 all passed, 1 some did not, 2 nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing.faults", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="by default all that apply to the implementation")
    parser.add_argument("--implementation", default="xla", choices=dispatch.IMPLEMENTATIONS)
    parser.add_argument("--list", action="store_true", help="names the scenarios and what must happen")
    args = parser.parse_args(argv)
    if args.list:
        for scenario in SCENARIOS.values():
            print(f"{scenario.name} ({', '.join(scenario.platforms)}): {scenario.fault}: {scenario.expected}")
        return 0
    names = args.names or [s.name for s in SCENARIOS.values() if args.implementation in s.platforms]
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)} (--list has all)")
    if foreign := [name for name in names if args.implementation not in SCENARIOS[name].platforms]:
        parser.error(f"not with implementation {args.implementation}: {', '.join(foreign)}")
    if reasons := dispatch.unavailable(args.implementation):
        print(f"implementation {args.implementation} cannot run here: {' '.join(reasons)}", file=sys.stderr)
        return 2
    failures = 0
    for name in names:
        outcome = _run(SCENARIOS[name], args.implementation)
        failures += not outcome.passed
        print(outcome, flush=True)
    print(SURVIVED)
    return 1 if failures else 0


def _run(scenario: Scenario, implementation: str) -> Outcome:
    if not scenario.environment_holds():
        return run_in_subprocess(scenario.name, implementation)
    start = time.perf_counter()
    try:
        scenario.run(implementation)
        detail = ""
    except AssertionError as error:
        traceback.print_exc()
        detail = str(error) or "AssertionError"
    return Outcome(scenario.name, not detail, detail, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
