"""`python -m jax_bsk.qa.testing.decode`: judges random or named cases of one implementation; a line per failure."""

from __future__ import annotations

import argparse
import sys
import time

import jax

from jax_bsk.core.errors import UnsupportedError
from jax_bsk.qa.testing.decode import battery, cases


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a case is outside the tolerance rule."""
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing.decode", description=__doc__)
    parser.add_argument("--implementation", default="native", choices=["native", "xla", "cpu", "cuda"])
    parser.add_argument("--platform", choices=["cpu", "cuda"], help="where it runs; default JAX's own choice")
    parser.add_argument("--cases", type=int, default=40, help="random cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first random case")
    parser.add_argument("--case", metavar="NAME", help="a named case instead, or `corners` for all of them")
    parser.add_argument("--multiprocessors", type=int, help="on CUDA, the second run is confined to so many")
    parser.add_argument("--verbose", action="store_true", help="prints the report of each case")
    args = parser.parse_args(argv)
    if args.platform is not None:
        jax.config.update("jax_platforms", args.platform)
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    implementation = platform if args.implementation == "native" else args.implementation
    if args.case == "corners":
        chosen = list(cases.CORNER_CASES.values())
    elif args.case is not None:
        if args.case not in cases.CORNER_CASES:
            parser.error(f"no case {args.case!r}; there are corners, {', '.join(cases.CORNER_CASES)}")
        chosen = [cases.CORNER_CASES[args.case]]
    else:
        chosen = [cases.random_case(seed) for seed in range(args.seed, args.seed + args.cases)]

    failures, refused, begun = 0, 0, time.perf_counter()
    for case in chosen:
        try:
            judgement = battery.judge_case(case, implementation, multiprocessors=args.multiprocessors)
        except UnsupportedError as error:
            refused += 1
            print(f"refused {case.name}: {' '.join(error.reasons)}", flush=True)
            continue
        except Exception as error:  # it does not run at all; the others may
            failures += 1
            print(f"FAIL {case} | {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        wrong = [str(c) for c in judgement.comparisons if not c.ok] + list(judgement.problems)
        if wrong:
            failures += 1
            print(f"FAIL {case} | {'; '.join(wrong)}", flush=True)
        elif args.verbose:
            print(f"ok   {case} | {'; '.join(map(str, judgement.comparisons))}", flush=True)
    seconds = time.perf_counter() - begun
    passed = len(chosen) - failures - refused
    print(f"{implementation}: {passed} of {len(chosen)} cases passed, {refused} refused, in {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
