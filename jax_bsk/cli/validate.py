"""`python -m jax_bsk validate`: analyses, builds, validates, benchmarks, profiles, hardens and reports."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jax_bsk.qa.validation import runner
from jax_bsk.qa.validation.outcome import StageResult, Verdict
from jax_bsk.qa.validation.report import CPU_PASSED
from jax_bsk.qa.validation.settings import STAGES, Level, Settings

MARKS = {Verdict.PASSED: "passed ", Verdict.FAILED: "FAILED ", Verdict.SKIPPED: "skipped"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    stages = "; ".join(f"{stage.name}: {stage.title}" for stage in STAGES.values())
    parser = subparsers.add_parser(
        "validate",
        help="whether jax_bsk is right, safe and fast on this machine, with a report",
        description=f"Seven stages. {stages} Exit status 0 where everything that ran passed, 1 where something failed, "
        "2 where --require-gpu finds no GPU. The verdict is 'cleared' only on a GPU with every stage run; on a machine "
        f"without one it is '{CPU_PASSED}' where all stages passed. report.json has it as `verdict`.",
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="a few minutes (the default)")
    level.add_argument("--full", action="store_true", help="what a release is judged by: thousands of cases")
    parser.add_argument(
        "--require-gpu", action="store_true", help="run nothing where JAX finds no NVIDIA GPU: exit status 2"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("validation"), help="default: validation/")
    parser.add_argument(
        "--stage",
        action="append",
        choices=STAGES,
        help="run this stage alone (may be repeated); the report is of whatever lies in DIR",
    )
    parser.add_argument("--cases", type=int, help="random cases of the stage validate; default by level and platform")
    parser.add_argument("--seed", type=int, default=0, help="of the first random case, default 0")
    parser.add_argument("--jobs", type=int, help="processes beside each other; default: what the cores allow")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="built check programs (see tests/csrc)")
    parser.add_argument("--no-peers", action="store_true", help="measure jax_bsk alone")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="benchmark, harden: go on with what a run that was cut short has left in DIR",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def run(args: argparse.Namespace) -> int:
    for name in ("cases", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            print(f"validate: --{name} is at least 1, got {value}", file=sys.stderr)
            return 2
    if args.require_gpu and (platform := runner.platform()) != "cuda":
        print(
            f"validate: --require-gpu needs JAX to run on an NVIDIA GPU, and it runs on {platform or 'nothing'} here; "
            "`python -m jax_bsk info` says what is missing",
            file=sys.stderr,
        )
        return 2
    settings = Settings(
        out=args.out.resolve(),
        level=Level.FULL if args.full else Level.QUICK,
        cases=args.cases,
        seed=args.seed,
        jobs=args.jobs,
        programs=None if args.programs is None else args.programs.resolve(),
        peers=not args.no_peers,
        resume=args.resume,
        quiet=args.quiet,
    )
    stages = [name for name in STAGES if args.stage is None or name in args.stage]
    if "report" not in stages:
        stages.append("report")
    results = runner.run(settings, stages, on_result=_show)
    path = settings.out / "report.json"
    if path.exists():
        report = json.loads(path.read_text())
        print(f"\n{report['verdict'].upper()}" + "".join(f"\n  {reason}" for reason in report["reasons"]))
        print(f"Wrote {settings.out / 'report.md'}")
    return 1 if any(result.verdict is Verdict.FAILED for result in results) else 0


def _show(result: StageResult) -> None:
    print(f"{MARKS[result.verdict]} {result.stage} ({result.seconds:.0f} of {result.budget_seconds:.0f} s)", flush=True)
    for check in result.checks:
        detail = check.detail if check.verdict is Verdict.FAILED else check.detail.split("\n")[0]
        note = "" if check.required else " (not required)"
        print(f"  {MARKS[check.verdict]} {check.name}{note}: {detail}".rstrip(": "), flush=True)
