"""The options of a run, for `benchmarks/matmul.py` and `python -m jax_bsk bench-matmul` alike."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from jax_bsk.core import dispatch
from jax_bsk.qa.benchmarking.matmul import cases, contenders
from jax_bsk.qa.benchmarking.matmul.cases import Case, Grid, Operation

ROUNDS, QUICK_ROUNDS = 5, 2
BUDGET_SECONDS = 140.0  # of a run on a GPU

DESCRIPTION = (
    "Times jax_bsk.sparse_matmul beside the dense product of the same device, PyTorch's BSR tensors, cuSPARSE's CSR "
    "and jax.experimental.sparse, each where it is installed, checks every result against float64, and prints a "
    "table. Exit status 1 where a result of any contender is wrong or jax_bsk fails, 2 where nothing can be measured."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all of them."""

    def choice(name: str, text: str, field: str, **kwargs) -> None:
        shown = [" ".join(map(str, getattr(grid, field))) for grid in (cases.CPU, cases.GPU)]
        parser.add_argument(name, nargs="+", help=f"{text}; default {shown[0]} (GPU: {shown[1]})", **kwargs)

    choice("--sizes", "M = N = K", "sizes", type=_positive, metavar="S")
    choice("--sparsities", "shares of the blocks that are not stored", "sparsities", type=_sparsity, metavar="P")
    choice("--blocks", "rows and columns of a block", "blocks", type=_positive, metavar="B")
    choice("--dtypes", "types", "dtypes", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--operations",
        nargs="+",
        type=Operation,
        choices=list(Operation),
        metavar="NAME",
        help="of " + ", ".join(f"{o.value} ({o.formula})" for o in Operation) + "; default all (GPU: forward, and at "
        "8192 all)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=contenders.NAMES,
        default=list(contenders.DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(contenders.NAMES)}; default {' '.join(contenders.DEFAULT)}",
    )
    parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, help="of jax_bsk; default its choice")
    parser.add_argument("--quick", action="store_true", help=f"one small matrix and {QUICK_ROUNDS} rounds")
    parser.add_argument("--rounds", type=_positive, help=f"samples of each time, default {ROUNDS}")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"start no case after so many seconds, 0 for no limit; default {BUDGET_SECONDS:g} on a GPU, else none",
    )
    parser.add_argument("--seed", type=int, default=0, help="of operands and patterns, default 0")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write all numbers there, and FILE.csv; after each case"
    )
    parser.add_argument("--plot-dir", type=Path, metavar="DIR", help="draw the pictures there; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def chosen_cases(args: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """The cases that the options ask for.

    Raises:
      ValueError: a size is not a multiple of a block.
    """
    usual = {(False, False): cases.CPU, (False, True): cases.CPU_QUICK, (True, False): cases.GPU}
    grid: Grid = usual.get((on_gpu, args.quick), cases.GPU_QUICK)
    names = ("sizes", "sparsities", "blocks", "dtypes", "operations")
    given = {name: tuple(getattr(args, name)) for name in names if getattr(args, name) is not None}
    if "operations" in given:
        given["more"] = ()
    grid = dataclasses.replace(grid, **given)
    for size in grid.sizes:
        for block in grid.blocks:
            if size % block:
                raise ValueError(f"sizes are multiples of the blocks, got {size} and {block}")
    return grid.cases()


def is_usual(args: argparse.Namespace) -> bool:
    """Whether the run is the whole default one."""
    chosen = (args.sizes, args.sparsities, args.blocks, args.dtypes, args.operations, args.implementation)
    return not args.quick and chosen == (None,) * 6 and set(args.contenders) >= set(contenders.DEFAULT)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _sparsity(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return number
