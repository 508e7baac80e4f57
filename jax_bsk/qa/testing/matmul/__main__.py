"""`python -m jax_bsk.qa.testing.matmul`: runs single cases over one implementation and prints their reports."""

from __future__ import annotations

import argparse
import sys

import jax

from jax_bsk.qa.testing.matmul.battery import run_case
from jax_bsk.qa.testing.matmul.cases import CORNER_CASES, random_case, redraw


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing.matmul", description=__doc__)
    parser.add_argument("--seed", type=int, help="first random case")
    parser.add_argument("--count", type=int, default=1, help="random cases, of seeds counted up from --seed")
    parser.add_argument("--draw", type=int, default=0, help="which of a seed's cases of one shape, default the first")
    parser.add_argument("--case", choices=[*CORNER_CASES, "corners"], help="a named case")
    parser.add_argument("--implementation", default="xla", choices=["xla", "cpu", "cuda"])
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--multiprocessors", type=int, help="on CUDA, the second run is confined to so many")
    args = parser.parse_args(argv)
    if (args.seed is None) == (args.case is None):
        parser.error("give one of --seed and --case")
    if args.seed is not None:
        seeds = range(args.seed, args.seed + args.count)
        cases = [redraw(random_case(seed, args.implementation), args.draw) for seed in seeds]
    else:
        cases = list(CORNER_CASES.values()) if args.case == "corners" else [CORNER_CASES[args.case]]
    failures = 0
    with jax.numpy_dtype_promotion("standard"):
        for case in cases:
            try:
                options = {"gradients": not args.no_gradients, "multiprocessors": args.multiprocessors}
                report = run_case(case, args.implementation, **options)
                print(report if len(cases) == 1 else f"{case.name} ok", flush=True)
            except Exception as error:
                failures += 1
                print(error, flush=True)
    if len(cases) > 1:
        print(f"{len(cases) - failures} of {len(cases)} cases passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
