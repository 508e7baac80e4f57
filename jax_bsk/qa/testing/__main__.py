"""`python -m jax_bsk.qa.testing [matmul|packed]`: judges single cases of one implementation."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax

from jax_bsk.core.errors import UnsupportedError
from jax_bsk.qa.testing import battery, cases
from jax_bsk.qa.testing.battery import from_public
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.matmul import battery as products
from jax_bsk.qa.testing.matmul import cases as product_cases
from jax_bsk.qa.testing.packed import battery as packed
from jax_bsk.qa.testing.packed import cases as packed_cases


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a case is outside the tolerance rule, or where all were refused."""
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing", description=__doc__)
    parser.add_argument("operation", nargs="?", choices=["attention", "matmul", "packed"], default="attention")
    parser.add_argument("--seed", type=int, help="first random case")
    parser.add_argument("--count", type=int, default=1, help="random cases, of seeds counted up from --seed")
    parser.add_argument("--draw", type=int, default=0, help="which of a seed's cases of one shape, default the first")
    parser.add_argument("--case", metavar="NAME", help="a named case, or `corners` for all of them")
    parser.add_argument("--max-len", type=int, help="of random cases of attention (default 1024) and packed ones (600)")
    parser.add_argument("--implementation", default="xla", choices=["xla", "cpu", "cuda"])
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--traced-mask", action="store_true", help="attention: the mask as an argument of the jit")
    parser.add_argument("--multiprocessors", type=int, help="on CUDA, judge it once more on so many")
    parser.add_argument("--sequence-shards", type=int, help="attention: over so many devices, which JAX must see")
    args = parser.parse_args(argv)
    if (args.seed is None) == (args.case is None):
        parser.error("give one of --seed and --case")
    of_products, of_packed = (args.operation == name for name in ("matmul", "packed"))
    kit: Any = {"attention": cases, "matmul": product_cases, "packed": packed_cases}[args.operation]
    named = kit.CORNER_CASES | (cases.PERFORMANCE_CASES if kit is cases else {})
    if args.seed is not None:
        seeds = range(args.seed, args.seed + args.count)
        of_length = {} if args.max_len is None else {"max_len": args.max_len}
        options = {"implementation": args.implementation} if of_products else of_length
        chosen = [kit.redraw(kit.random_case(seed, **options), args.draw) for seed in seeds]
    elif args.case == "corners":
        chosen = list(kit.CORNER_CASES.values())
    elif args.case in named:
        chosen = [named[args.case]]
    else:
        parser.error(f"no case {args.case!r}; there are corners, {', '.join(named)}")

    command = f"--implementation {args.implementation}"
    if args.seed is not None and args.max_len is not None:
        command += f" --max-len {args.max_len}"
    command += " --traced-mask" if args.traced_mask else ""
    command += " --no-gradients" if args.no_gradients else ""
    command += "" if args.multiprocessors is None else f" --multiprocessors {args.multiprocessors}"
    command += "" if args.sequence_shards is None else f" --sequence-shards {args.sequence_shards}"
    attention = from_public(args.implementation)
    if args.sequence_shards is not None:
        attention = battery.with_sharded_sequence(attention, args.sequence_shards)
        chosen = [cases.for_shards(case, args.sequence_shards) for case in chosen]
    options = {"gradients": not args.no_gradients, "multiprocessors": args.multiprocessors}

    def judge(case: Any) -> Judgement:
        if of_packed:
            with jax.numpy_dtype_promotion("standard"):
                return packed.judge_case(case, args.implementation, **options)
        if of_products:
            with jax.numpy_dtype_promotion("standard"):
                return products.judge_case(case, args.implementation, **options)
        return battery.judge_case(case, attention, traced_mask=args.traced_mask, **options)

    failures, refused = 0, 0
    for case in chosen:
        try:
            text = judge(case).report(command)
            print(text if len(chosen) == 1 else f"{case.name} ok", flush=True)
        except UnsupportedError as error:
            refused += 1
            print(f"refused {case.name}: {' '.join(error.reasons)}", flush=True)
        except Exception as error:  # outside the rule, or it does not run at all: the others may
            failures += 1
            print(error, flush=True)
    if len(chosen) > 1:
        print(f"{len(chosen) - failures - refused} of {len(chosen)} cases passed, {refused} refused")
    return 1 if failures or refused == len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
