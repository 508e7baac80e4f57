"""A run: measures the chosen cases one after the other, and writes what it has after each."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_bsk.core import compat
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking.contender import first_line
from jax_bsk.qa.benchmarking.matmul import contenders, measure, options, report
from jax_bsk.qa.benchmarking.matmul.cases import Case
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.benchmarking.report import surroundings
from jax_bsk.qa.support.progress import Progress


def run(args: argparse.Namespace, results: Path | None = None) -> int:
    """Measures, prints and writes; the exit status.

    Args:
      args: of `options.add_options`.
      results: where the whole default run on a GPU is written unless the options say where.
    """
    # Before JAX starts: PyTorch shares the GPU's memory, and one must not take most of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    on_gpu = compat.default_platform() == "cuda"
    try:
        chosen = options.chosen_cases(args, on_gpu)
        plot = _plotter() if args.plot_dir is not None else None  # not after minutes of measuring
    except (ImportError, ValueError) as error:
        print(f"matmul benchmark: {error}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    output = args.output
    if output is None and results is not None and on_gpu and options.is_usual(args):
        device = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
        output = results / f"matmul-{device}.json"

    result = _measure(args, chosen, output, on_gpu)
    print(report.render(result))
    if output is not None:
        print(f"Wrote {output} and {output.with_suffix('.csv')}")
    if plot is not None:
        for path in plot(result, args.plot_dir):
            print(f"Wrote {path}")
    return 0 if all(case["ok"] for case in result["cases"]) else 1


def _plotter() -> Any:
    try:
        return importlib.import_module("jax_bsk.qa.benchmarking.matmul.plots").plot
    except ImportError as error:
        raise ImportError("--plot-dir needs matplotlib; install it with `pip install matplotlib`") from error


def _measure(args: argparse.Namespace, chosen: list[Case], output: Path | None, on_gpu: bool) -> dict[str, Any]:
    """The report of those cases, written after each: a run that is cut short leaves what it measured."""
    rounds = args.rounds or (options.QUICK_ROUNDS if args.quick else options.ROUNDS)
    budget = (options.BUDGET_SECONDS if on_gpu else 0.0) if args.budget is None else args.budget
    result: dict[str, Any] = {
        "benchmark": "block-sparse matrix products",
        **surroundings(),
        "implementation": args.implementation or "its own choice",
        "options": {
            "rounds": rounds,
            "seed": args.seed,
            "contenders": args.contenders,
            "budget_seconds": budget or None,
        },
        "method": report.METHOD,
        "cases": [],
        "not_measured": [],
    }
    start = time.perf_counter()
    with Progress(len(chosen), args.quiet) as progress:
        for record in records(
            chosen,
            lambda case: args.contenders,
            args.implementation,
            rounds=rounds,
            seed=args.seed,
            deadline=start + budget if budget else None,
            on_case=lambda case: progress.step(case.name),
        ):
            result["not_measured" if isinstance(record, str) else "cases"].append(record)
            if output is not None:
                report.write(result, output)
    return result


def records(
    chosen: Sequence[Case],
    names: Callable[[Case], Sequence[str]],
    implementation: Implementation | None,
    *,
    rounds: int,
    seed: int,
    deadline: float | None,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Iterator[dict[str, Any] | str]:
    """The record of each case in order, or why there is none; neighbours of one config share their operands.

    Args:
      chosen: the cases.
      names: contenders of a case.
      implementation: of jax_bsk; None for its own choice.
      rounds: samples of each time.
      seed: of operands and patterns.
      deadline: on `time.perf_counter`, after which no case is begun.
      on_case: called before each.
    """
    known = contenders.makers(implementation)
    rates = measure.Rates()
    operands: Operands | None = None
    for i, case in enumerate(chosen):
        if deadline is not None and time.perf_counter() > deadline:
            left = ", ".join(case.name for case in chosen[i:])
            yield f"the time of --budget is spent before {left}"
            return
        on_case(case)
        try:
            if operands is None or operands.config != case.config:
                operands = None  # frees the last ones before the next are made
                operands = Operands(case.config, seed)
            makers = {name: known[name] for name in dict.fromkeys(names(case))}
            yield measure.measure(case, operands, makers, rates, rounds=rounds, seed=seed)
        except Exception as error:  # the cases before it took minutes, and those after it may well run
            operands = None
            yield _failure(case, first_line(error))


def _failure(case: Case, reason: str) -> dict[str, Any]:
    """The record of a case whose operands or reference could not be made."""
    return case.facts | {
        "contenders": {contenders.OURS: {"failed": f"before any contender ran: {reason}"}},
        "ok": False,
    }
