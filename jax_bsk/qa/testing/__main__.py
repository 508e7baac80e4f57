"""``python -m jax_bsk.qa.testing``: runs single cases over one implementation and prints their reports."""

from __future__ import annotations

import argparse
import sys

from jax_bsk.qa.testing.battery import Mismatch, from_public, run_case
from jax_bsk.qa.testing.cases import CORNER_CASES, PERFORMANCE_CASES, random_case, redraw


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing", description=__doc__)
    parser.add_argument("--seed", type=int, help="first random case")
    parser.add_argument("--count", type=int, default=1, help="random cases, of seeds counted up from --seed")
    parser.add_argument("--draw", type=int, default=0, help="which of a seed's cases of one shape, default the first")
    parser.add_argument("--case", choices=[*CORNER_CASES, *PERFORMANCE_CASES, "corners"], help="a named case")
    parser.add_argument("--max-len", type=int, default=1024, help="of random cases")
    parser.add_argument("--implementation", default="xla", choices=["xla", "cpu", "cuda"])
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--traced-mask", action="store_true", help="the mask as an argument of the jitted function")
    parser.add_argument("--multiprocessors", type=int, help="on CUDA, judge it once more on so many")
    args = parser.parse_args(argv)
    if (args.seed is None) == (args.case is None):
        parser.error("give one of --seed and --case")
    if args.seed is not None:
        seeds = range(args.seed, args.seed + args.count)
        cases = [redraw(random_case(seed, max_len=args.max_len), args.draw) for seed in seeds]
    elif args.case == "corners":
        cases = list(CORNER_CASES.values())
    else:
        cases = [(CORNER_CASES | PERFORMANCE_CASES)[args.case]]
    attention = from_public(args.implementation)
    command = f"--implementation {args.implementation}"
    if args.seed is not None and args.max_len != parser.get_default("max_len"):
        command += f" --max-len {args.max_len}"
    if args.traced_mask:
        command += " --traced-mask"
    if args.multiprocessors is not None:
        command += f" --multiprocessors {args.multiprocessors}"
    failures = 0
    for case in cases:
        try:
            report = run_case(
                case,
                attention,
                gradients=not args.no_gradients,
                traced_mask=args.traced_mask,
                multiprocessors=args.multiprocessors,
                command=command,
            )
            print(report if len(cases) == 1 else f"{case.name} ok", flush=True)
        except Mismatch as error:
            failures += 1
            print(error, flush=True)
    if len(cases) > 1:
        print(f"{len(cases) - failures} of {len(cases)} cases passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
