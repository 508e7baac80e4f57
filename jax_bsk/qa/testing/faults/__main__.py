"""`python -m jax_bsk.qa.testing.faults`: runs scenarios of the fault table in processes apart, a line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jax_bsk.core import dispatch
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.testing.faults.table import SCENARIOS, run_all_in_subprocesses


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
    with Progress(len(names)) as progress:
        outcomes = run_all_in_subprocesses(names, args.implementation, note=progress.step)
    print("\n".join(map(str, outcomes)))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
