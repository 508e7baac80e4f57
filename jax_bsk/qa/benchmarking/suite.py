"""The suite: check, time in turn, record. The same for every operation, which is an object that says what is measured.

`records` measures cases and is all that the validation tool needs. `run` is a whole command: options, a report that is
written after each case, tables, pictures, and the exit status.
"""

from __future__ import annotations

import abc
import argparse
import importlib
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from jax_bsk.core import compat, dispatch
from jax_bsk.qa.benchmarking import report
from jax_bsk.qa.benchmarking.check import Reference, together
from jax_bsk.qa.benchmarking.contender import OURS, Contender, Refused, first_line
from jax_bsk.qa.benchmarking.timing import Timing, interleaved
from jax_bsk.qa.support.progress import Progress

ROUNDS, QUICK_ROUNDS = 5, 2


class Case(Protocol):
    """One row of a table.

    Attributes:
      name: as the report and its goals know it.
      calls: how many calls a contender chains in one program; 1 measures single calls.
      useful_flops: operations that the sparsity leaves.
      kind: what else cases must share for the speed of one to foretell that of another.
    """

    @property
    def name(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def useful_flops(self) -> float: ...
    @property
    def kind(self) -> Hashable: ...


Maker = Callable[[Any, Any], Contender]  # case, operands -> the contender; raises `Refused` where it cannot compute it


class Operation(abc.ABC):
    """What is measured.

    Attributes:
      inexact: tolerances within which a peer is timed though its result is wrong: it computes the same with less care.
      slow_seconds: a call that takes longer is measured once.
      most_seconds: a call that would take longer, by the rates of the cases before, is left out.
      csv: whether there is a table of all contenders beside the JSON.
    """

    inexact: float = 1.0
    slow_seconds: float = math.inf
    most_seconds: float = math.inf
    csv: bool = False

    @abc.abstractmethod
    def key(self, case: Any) -> Hashable:
        """Cases with equal keys share operands."""

    @abc.abstractmethod
    def operands(self, case: Any, seed: int) -> Any:
        """The numbers that every contender of a case gets."""

    @abc.abstractmethod
    def makers(self, case: Any) -> Mapping[str, Maker]:
        """Who takes part, by name; jax_bsk's own names begin with `OURS`."""

    @abc.abstractmethod
    def references(self, case: Any, operands: Any, seed: int) -> Callable[[Contender], dict[str, Reference]]:
        """What each result of a contender must be, by name in the order of `Contender.once`."""

    @abc.abstractmethod
    def record(self, case: Any, found: dict[str, dict[str, Any]] | None, reason: str = "") -> dict[str, Any]:
        """The record of a case with those of its contenders; None for a case of which nothing could be measured."""

    @abc.abstractmethod
    def tables(self, found: dict[str, Any]) -> list[str]:
        """The lines of a whole report that only this operation knows how to show: a title, and its tables."""

    def write_csv(self, cases: Sequence[dict[str, Any]], path: Path) -> None:
        """A line a contender of a case."""
        raise NotImplementedError


class Rates:
    """Seconds a useful operation that contenders took in the cases before, to foretell those that follow."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Hashable], tuple[float, str]] = {}

    def learn(self, name: str, case: Case, seconds: float) -> None:
        mine = seconds / max(case.useful_flops, 1.0), case.name
        # The best so far: rates rise with the size, and a dense product's falls with the density.
        self._seconds[name, case.kind] = min(mine, self._seconds.get((name, case.kind), mine))

    def ask(self, name: str, case: Case, most_seconds: float) -> None:
        """Raises `Refused` for a call that would take longer."""
        rate, where = self._seconds.get((name, case.kind), (0.0, ""))
        expected = rate * case.useful_flops
        if expected > most_seconds:
            raise Refused(f"a call would take some {expected:.0f} s, even at the rate of '{where}'")


def measure(
    operation: Operation, case: Any, operands: Any, rates: Rates, *, rounds: int | None, seed: int
) -> dict[str, Any]:
    """One case's record, ready for JSON. What fails is in it with its reason; nothing is raised for it."""
    start = time.perf_counter()
    references = operation.references(case, operands, seed)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, make in operation.makers(case).items():
        try:
            rates.ask(name, case, operation.most_seconds)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")  # a slower implementation than asked for is told of every time
                contender = make(case, operands)
                check, seconds = _check(contender, references(contender))
            found[name] = {"variant": contender.variant, "check": check}
            if contender.temp_bytes is not None:
                found[name]["temp_bytes"] = contender.temp_bytes
            if told:
                found[name]["notes"] = list(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in told))
            if not check["ok"]:
                share = check["share_of_tolerance"] if check["finite"] else None
                if name.startswith(OURS) or share is None or share > operation.inexact:
                    continue  # the time of a wrong result means nothing
                found[name]["inexact"] = share
            rates.learn(name, case, seconds)
            if seconds > operation.slow_seconds:
                found[name] |= _times(Timing((seconds,), 1), 1, case)
            else:
                jax.block_until_ready(contender.dispatch(0))  # compiles the chain
                ready[name] = contender
        except Refused as reason:
            found[name] = {"refused": str(reason)}
        except Exception as error:  # no memory, an unsupported shape: a result, and the other contenders go on
            found[name] = {"failed" if name.startswith(OURS) else "refused": first_line(error)}
    for name, timing in _time(ready, rounds, found).items():
        found[name] |= _times(timing, ready[name].calls, case)
    ok = all(_is_right(record) for record in found.values())
    return operation.record(case, found) | {"ok": ok, "seconds_with_compilation": time.perf_counter() - start}


def _check(contender: Contender, references: dict[str, Reference]) -> tuple[dict[str, Any], float]:
    """The check, and how long that call took; the results are gone when this returns."""
    start = time.perf_counter()
    results = contender.once()
    seconds = time.perf_counter() - start
    checks = {}
    for (name, reference), result in zip(references.items(), results, strict=True):
        checks[name] = reference.check(*contender.pick(result, reference.spots))
    return together(checks), seconds


def _time(ready: dict[str, Contender], rounds: int | None, found: dict[str, dict[str, Any]]) -> dict[str, Timing]:
    queued = compat.default_platform() != "cpu"
    calls = {name: contender.dispatch for name, contender in ready.items()}
    try:
        return interleaved(calls, rounds, queued=queued)
    except Exception as error:  # each ran once, so memory is short with many calls queued: one by one, then
        problem = first_line(error)
    timings = {}
    for name, call in calls.items():
        try:
            timings |= interleaved({name: call}, rounds, queued=False)
            found[name].setdefault("notes", []).append(f"timed by itself, each call waited for: {problem}")
        except Exception as error:
            found[name]["failed" if name.startswith(OURS) else "refused"] = f"while timed: {first_line(error)}"
    return timings


def _times(timing: Timing, calls: int, case: Case) -> dict[str, Any]:
    one = timing.of_one(calls)
    return one.to_json() | {"chained_calls": calls, "useful_flops_per_second": case.useful_flops / one.median}


def _is_right(record: dict[str, Any]) -> bool:
    return "failed" not in record and ("check" not in record or record["check"]["ok"])


def records(
    operation: Operation,
    cases: Sequence[Any],
    *,
    rounds: int | None,
    seed: int,
    deadline: float | None = None,
    on_case: Callable[[Any], None] = lambda case: None,
) -> Iterator[dict[str, Any] | str]:
    """The record of each case in order, or why there is none; neighbours of one key share their operands.

    Args:
      operation: what is measured.
      cases: of it.
      rounds: number of samples of each time; None as in `timing.interleaved`.
      seed: seed of operands and spots.
      deadline: time of `time.perf_counter` after which no case is begun.
      on_case: called before each.
    """
    rates = Rates()
    operands, key = None, None
    for i, case in enumerate(cases):
        if deadline is not None and time.perf_counter() > deadline:
            yield f"the time of --budget is spent before {', '.join(case.name for case in cases[i:])}"
            return
        on_case(case)
        try:
            if operands is None or operation.key(case) != key:
                operands = None  # frees the last ones before the next are made
                operands, key = operation.operands(case, seed), operation.key(case)
            yield measure(operation, case, operands, rates, rounds=rounds, seed=seed)
        except Exception as error:  # the cases before it took minutes, and those after it may well run
            operands = None
            yield operation.record(case, None, f"before any contender ran: {first_line(error)}") | {"ok": False}


# ---- A whole command


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every operation has; `run` reads them."""
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}, or less")
    parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, help="of jax_bsk; default its choice")
    parser.add_argument("--seed", type=int, default=0, help="seed of operands and patterns, default 0")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write all numbers there, after each case; default: into "
        "results/ after a whole run of the script on a GPU, else nowhere",
    )  # fmt: skip
    parser.add_argument("--plot-dir", type=Path, metavar="DIR", help="draw the pictures there; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def positive(text: str) -> int:
    """The type of options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def plotter() -> Any:
    """The module of pictures, asked for before minutes of measuring.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("jax_bsk.qa.benchmarking.plots")
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with `pip install matplotlib`") from error


def share_the_gpu() -> None:
    """To be called before JAX starts: PyTorch shares the GPU's memory, and one must not take most of it at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def results_path(folder: Path, name: str) -> Path:
    """Where a whole run on this device is written."""
    device = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return folder / f"{name}-{device}.json"


def run(
    operation: Operation,
    cases: Sequence[Any],
    args: argparse.Namespace,
    facts: dict[str, Any],
    *,
    rounds: int,
    output: Path | None,
    budget: float | None = None,
    judge: Callable[[dict[str, Any]], None] = lambda record: None,
) -> int:
    """Measures, prints and writes; the exit status: 1 where a result is wrong or jax_bsk has none.

    Args:
      operation: what is measured.
      cases: of it.
      args: values of `add_options`.
      facts: what the report says beside versions, devices and cases.
      rounds: number of samples of each time.
      output: path of the JSON, which is written after each case: a run that is cut short leaves what it measured.
      budget: seconds after which no case is begun.
      judge: adds a goal and its verdict to a record.
    """
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    try:
        pictures = None if args.plot_dir is None else plotter()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    result = {**facts, **report.surroundings(), "cases": [], "not_measured": []}
    deadline = None if budget is None else time.perf_counter() + budget
    with Progress(len(cases), args.quiet) as progress:
        for record in records(
            operation,
            cases,
            rounds=rounds,
            seed=args.seed,
            deadline=deadline,
            on_case=lambda case: progress.step(case.name),
        ):
            if isinstance(record, str):
                result["not_measured"].append(record)
            else:
                judge(record)
                result["cases"].append(record)
            if output is not None:
                report.write(result, output)
                if operation.csv:
                    operation.write_csv(result["cases"], output.with_suffix(".csv"))
    print(report.render(result, operation.tables(result)))
    if output is not None:
        print(f"Wrote {output}" + (f" and {output.with_suffix('.csv')}" if operation.csv else ""))
    if pictures is not None:
        for path in pictures.plot(result, args.plot_dir):
            print(f"Wrote {path}")
    return 0 if all(case["ok"] for case in result["cases"]) else 1
