"""Block-sparse products as an operation of the suite: contenders by name, operands, references, options."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_bsk.core import compat
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking import suite
from jax_bsk.qa.benchmarking.check import Reference
from jax_bsk.qa.benchmarking.contender import OURS, Contender
from jax_bsk.qa.benchmarking.matmul import cases, jax_products, tables, torch_products
from jax_bsk.qa.benchmarking.matmul.cases import Case, Grid, Operation
from jax_bsk.qa.benchmarking.matmul.jax_products import of_jax
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.benchmarking.matmul.references import choose_spots, make_reference
from jax_bsk.qa.benchmarking.suite import Maker

DENSE, DENSE_RANDOM, TORCH_BSR, CUSPARSE = "dense", "dense-random", "torch-bsr", "cusparse-csr"
OURS_CONSTANT = f"{OURS}-constant"
NAMES = (OURS, OURS_CONSTANT, DENSE, DENSE_RANDOM, TORCH_BSR, "torch-bsr-tuned", CUSPARSE, "bcoo", "bcsr")
# BCSR runs BCOO's code, constant lists tell something only where an order is made of them in every call, and tuning
# compiles four kernels a size and block: a minute of a whole run.
DEFAULT = (OURS, DENSE, TORCH_BSR, CUSPARSE, "bcoo")


def makers(implementation: Implementation | None) -> dict[str, Maker]:
    """A maker a name; the implementation is that of jax_bsk, None its own choice."""
    return {
        OURS: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=False)),
        OURS_CONSTANT: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=True)),
        DENSE: lambda case, o: of_jax(case, o, jax_products.dense(o)),
        DENSE_RANDOM: lambda case, o: of_jax(case, o, jax_products.dense_random(o, case.operation)),
        TORCH_BSR: torch_products.bsr,
        "torch-bsr-tuned": torch_products.bsr_tuned,
        CUSPARSE: torch_products.csr,
        "bcoo": lambda case, o: of_jax(case, o, jax_products.bcoo(o)),
        "bcsr": lambda case, o: of_jax(case, o, jax_products.bcsr(o)),
    }


class Products(suite.Operation):
    """`sparse_matmul` beside other products; `names` are the contenders of a case."""

    inexact, slow_seconds, most_seconds = tables.INEXACT, tables.SLOW_SECONDS, tables.MOST_SECONDS
    csv = True

    def __init__(self, implementation: Implementation | None, names: Callable[[Case], Sequence[str]]):
        self._makers, self._names = makers(implementation), names

    def key(self, case: Case) -> Hashable:
        return case.config

    def operands(self, case: Case, seed: int) -> Operands:
        return Operands(case.config, seed)

    def makers(self, case: Case) -> Mapping[str, Maker]:
        return {name: self._makers[name] for name in dict.fromkeys(self._names(case))}

    def references(self, case: Case, operands: Operands, seed: int) -> Callable[[Contender], dict[str, Reference]]:
        spots = choose_spots(case.config.size, seed)
        own = make_reference(operands, case.operation, spots)

        def of(contender: Contender) -> dict[str, Reference]:
            other = contender.instead
            return {"out": own if other is None else make_reference(operands, case.operation, spots, other)}

        return of

    def record(self, case: Case, found: dict[str, dict[str, Any]] | None, reason: str = "") -> dict[str, Any]:
        if found is None:
            return case.facts | {"contenders": {OURS: {"failed": reason}}}
        dense = found.get(DENSE, {}).get("seconds", math.nan)
        for record in found.values():
            if "seconds" in record and math.isfinite(dense):
                record["ratio_to_dense"] = dense / record["seconds"]
        config = case.config
        return case.facts | {
            "stored_blocks": config.stored_blocks,
            "density": config.density,
            "useful_flops": config.useful_flops,
            "chained_calls": case.calls,
            "contenders": found,
        }

    def tables(self, found: dict[str, Any]) -> list[str]:
        return tables.of_report(found)

    def write_csv(self, cases: Sequence[dict[str, Any]], path: Path) -> None:
        tables.write_csv(cases, path)


# ---- The command: `benchmarks/matmul.py` and `python -m jax_bsk bench-matmul` alike

BUDGET_SECONDS = 140.0  # of a run on a GPU

DESCRIPTION = (
    "Times jax_bsk.sparse_matmul beside the dense product of the same device, PyTorch's BSR tensors, cuSPARSE's CSR "
    "and jax.experimental.sparse, each where it is installed, checks every result against float64, and prints a "
    "table. Exit status 1 where a result of any contender is wrong or jax_bsk fails, 2 where nothing can be measured."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all of them."""

    def choice(name: str, text: str, **kwargs: Any) -> None:
        shown = [" ".join(map(str, getattr(grid, name))) for grid in (cases.CPU, cases.GPU)]
        parser.add_argument(f"--{name}", nargs="+", help=f"{text}; default {shown[0]} (GPU: {shown[1]})", **kwargs)

    choice("sizes", "M = N = K", type=suite.positive, metavar="S")
    choice("sparsities", "shares of the blocks that are not stored", type=_sparsity, metavar="P")
    choice("blocks", "rows and columns of a block", type=suite.positive, metavar="B")
    choice("dtypes", "types", choices=("bfloat16", "float16", "float32"))
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
        choices=NAMES,
        default=list(DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(NAMES)}; default {' '.join(DEFAULT)}",
    )
    parser.add_argument("--rounds", type=suite.positive, help=f"samples of each time, default {suite.ROUNDS}")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"start no case after so many seconds, 0 for no limit; default {BUDGET_SECONDS:g} on a GPU, else none",
    )
    suite.add_options(parser)


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
    return not args.quick and chosen == (None,) * 6 and set(args.contenders) >= set(DEFAULT)


def run(args: argparse.Namespace, results: Path | None = None) -> int:
    """Measures, prints and writes; the exit status.

    Args:
      args: values of `add_options`.
      results: folder where the whole default run on a GPU is written unless the options say where.
    """
    suite.share_the_gpu()
    on_gpu = compat.default_platform() == "cuda"
    output = args.output
    if output is None and results is not None and on_gpu and is_usual(args):
        output = suite.results_path(results, "matmul")
    rounds = args.rounds or (suite.QUICK_ROUNDS if args.quick else suite.ROUNDS)
    budget = ((BUDGET_SECONDS if on_gpu else 0.0) if args.budget is None else args.budget) or None
    options = {"rounds": rounds, "seed": args.seed, "contenders": args.contenders, "budget_seconds": budget}
    facts = {
        "benchmark": "block-sparse matrix products",
        "implementation": args.implementation or "its own choice",
        "options": options,
        "method": tables.METHOD,
    }
    try:
        chosen = chosen_cases(args, on_gpu)
    except ValueError as error:
        print(f"matmul benchmark: {error}", file=sys.stderr)
        return 2
    operation = Products(args.implementation, lambda case: args.contenders)
    return suite.run(operation, chosen, args, facts, rounds=rounds, output=output, budget=budget)


def _sparsity(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return number
