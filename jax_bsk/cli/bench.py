"""`python -m jax_bsk bench`: `sparse_attention` beside `jax.nn.dot_product_attention`, timed and checked."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_bsk.attention import refusals
from jax_bsk.cli import attention_bench
from jax_bsk.core import compat, dispatch
from jax_bsk.core.errors import UnsupportedError
from jax_bsk.qa.benchmarking import ceilings, timing
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.support.table import table

METHOD = (
    "Each call is jitted, checked against the reference on fresh random inputs, and then timed in rounds that visit "
    "every contender in turn. A time is the median of its samples; a sample is one call, or as many as fill "
    f"{timing.SAMPLE_SECONDS * 1e3:.0f} ms. The mask is an argument, built beforehand. Useful FLOPs: "
    "4 B N T S H density for the forward, 3.5 times that with the backward. A ratio is the peer's time / jax_bsk's."
)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured where no option says otherwise."""

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    patterns: tuple[str, ...]
    batch: int
    heads: int
    head_dim: int
    dtype: str
    block_size: int
    window: int


CPU = Defaults((1024, 2048, 4096), (0.05, 0.1, 0.23, 0.5, 1.0), ("random",), 1, 8, 64, "float32", 64, 256)
CUDA = Defaults(
    (2048, 4096, 8192),
    (0.05, 0.12, 0.24, 0.5, 1.0),
    ("random", "causal", "window", "dense"),
    4,
    32,
    128,
    "bfloat16",
    128,
    1024,
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench",
        help="compare with jax.nn.dot_product_attention",
        description="Times jax_bsk.sparse_attention beside jax.nn.dot_product_attention under jit, checks the results, "
        "and prints a table. Exit status 1 where a result is NaN or beyond the tolerance. Defaults are for the CPU, "
        "those on a GPU in parentheses.",
    )

    def option(name: str, text: str, **kwargs: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        values = [getattr(defaults, field) for defaults in (CPU, CUDA)]
        shown = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
        parser.add_argument(name, help=f"{text}; default {shown[0]} ({shown[1]})", **kwargs)

    option("--lengths", "tokens", nargs="+", type=_positive, metavar="S")
    option("--densities", "shares of blocks for the random pattern", nargs="+", type=_share, metavar="P")
    option("--patterns", "masks", nargs="+", choices=("random", "causal", "window", "dense"))
    option("--batch", "examples", type=_positive)
    option("--heads", "query heads", type=_positive)
    parser.add_argument("--kv-heads", help="key/value heads; default as many as query heads", type=_positive)
    option("--head-dim", "head size", type=_positive)
    option("--dtype", "type of the inputs", choices=("float32", "bfloat16", "float16"))
    option("--block-size", "tokens of a mask's block", type=_positive)
    option("--window", "tokens to the left in the window pattern", type=_positive)
    parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, help="default: chosen as in any call")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--forward-only", action="store_true", help="do not time the backward")
    passes.add_argument("--backward", action="store_true", help="time forward and forward with backward (the default)")
    parser.add_argument("--repeats", type=_positive, help="samples of each time; default 5, or 3 of very long calls")
    parser.add_argument("--seed", type=int, help="of inputs and masks; default a fresh one, written in the output")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw useful FLOP/s against density")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return number


def run(args: argparse.Namespace) -> int:
    try:
        plot = _plotter() if args.plot is not None else None  # not after minutes of measuring
        report = measure(args)
    except (ImportError, UnsupportedError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(render(report))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(_finite(report), indent=1) + "\n")
        print(f"Wrote {args.output}")
    if plot is not None and args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(report, args.plot)
        print(f"Wrote {args.plot}")
    return 0 if all(case["ok"] for case in report["cases"]) else 1


def _plotter() -> Callable[[dict[str, Any], Path], None]:
    try:
        from jax_bsk.cli.bench_plot import plot
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with `pip install matplotlib`") from error
    return plot


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what the options say and returns the whole report, ready for JSON."""
    defaults = CUDA if compat.default_platform() == "cuda" else CPU
    options = {
        field.name: getattr(defaults, field.name) if getattr(args, field.name) is None else getattr(args, field.name)
        for field in dataclasses.fields(Defaults)
    }
    kv_heads = args.kv_heads or options["heads"]
    if options["heads"] % kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {options['heads']} and {kv_heads}")
    implementation = _implementation(args.implementation, options)
    passes = attention_bench.PASSES[:1] if args.forward_only else attention_bench.PASSES
    seed = int.from_bytes(os.urandom(4), "little") >> 1 if args.seed is None else args.seed
    rng = np.random.default_rng(seed)
    masks = sum(len(options["densities"]) if pattern == "random" else 1 for pattern in options["patterns"])
    report: dict[str, Any] = {
        "benchmark": "attention",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "implementation": implementation,
        "options": options | {"kv_heads": kv_heads, "repeats": args.repeats, "passes": passes},
        "seed": seed,
        "method": METHOD,
        "matrix_product_flops_per_second": ceilings.matrix_product_rate(options["dtype"], seed),
        "cases": [],
    }
    total = attention_bench.steps(masks, len(options["lengths"]), passes, args.repeats)
    with Progress(total, args.quiet) as progress:
        for length in options["lengths"]:
            sizes = {name: options[name] for name in ("batch", "heads", "head_dim", "dtype", "block_size")}
            work = attention_bench.Workload(length=length, kv_heads=kv_heads, **sizes)
            cases = attention_bench.make_cases(work, options["patterns"], options["densities"], options["window"], rng)
            report["cases"] += attention_bench.measure(
                work,
                cases,
                implementation=args.implementation,
                passes=passes,
                repeats=args.repeats,
                seed=seed,
                progress=progress,
            )
    return report


def _implementation(named: str | None, options: dict[str, Any]) -> str:
    """The implementation that the calls will get, refused now rather than inside each of them."""
    facts = refusals.AttentionFacts(
        dtype=options["dtype"],
        head_dim=options["head_dim"],
        value_dim=options["head_dim"],
        block_q=options["block_size"],
        block_kv=options["block_size"],
        bias=False,
    )
    return dispatch.choose(named, facts)[0]


def render(report: dict[str, Any]) -> str:
    """The table and what is needed to read it."""
    options = report["options"]
    unit, factor = ("TFLOP/s", 1e12) if report["devices"][0]["platform"] == "cuda" else ("GFLOP/s", 1e9)
    peers = list(dict.fromkeys(name for case in report["cases"] for name in case["peers"]))
    header = ["length", "pattern", "density", "pass", "ms", unit, "temp MB"]
    for name in peers:
        header += [f"{name} ms", "temp MB", "speed-up"]
    header += ["largest difference", "check"]
    rows, notes = [], []
    for case in sorted(report["cases"], key=lambda c: c["length"]):
        mine = case["jax_bsk"]
        row = [str(case["length"]), case["pattern"], f"{case['density']:.3f}", case["pass"], *_cells(mine)[:1]]
        row += [f"{mine['useful_flops_per_second'] / factor:.1f}" if "seconds" in mine else "-", _cells(mine)[1]]
        for name in peers:
            record = case["peers"].get(name, {})
            row += [*_cells(record), f"{record['ratio']:.2f}x" if "ratio" in record else "-"]
            if "failed" in record:
                notes.append(f"{name}, length {case['length']}, {case['pass']}: {record['failed']}")
        if "failed" in mine:
            notes.append(f"jax_bsk, length {case['length']}, {case['pattern']}, {case['pass']}: {mine['failed']}")
        row += [f"{mine['largest_relative_error']:.1e}" if "seconds" in mine else "-", "ok" if case["ok"] else "WRONG"]
        rows.append(row)
    sizes = (
        f"B {options['batch']}, heads {options['heads']} (key/value {options['kv_heads']}), head size "
        f"{options['head_dim']}, {options['dtype']}, blocks of {options['block_size']}"
    )
    versions = report["versions"]
    lines = [
        f"jax_bsk {versions['jax_bsk']} ({report['implementation']}) beside jax.nn.dot_product_attention, "
        f"jax {versions['jax']}, {environment.describe_device(report['devices'][0])}",
        f"{sizes}; a plain matrix product runs at {report['matrix_product_flops_per_second'] / factor:.0f} {unit}",
        "",
        table(header, rows),
        "",
        f"ms: median. {unit}: useful ones (attended elements only). temp MB: scratch that XLA allocates. speed-up: "
        "peer's time / jax_bsk's.",
        "largest difference: of any result from the float32 reference, as a share of its largest number.",
    ]
    lines += [f"Not run: {note}" for note in dict.fromkeys(notes)]
    wrong = sum(not case["ok"] for case in report["cases"])
    if wrong:
        lines.append(f"WRONG: {wrong} of {len(rows)} results of jax_bsk are NaN, beyond the tolerance, or not there.")
    return "\n".join(lines)


def _cells(record: dict[str, Any]) -> tuple[str, str]:
    """Time and memory of one contender."""
    if "seconds" not in record:
        return "-", "-"
    memory = record["temp_bytes"]
    return f"{record['seconds'] * 1e3:.3f}", "-" if memory is None else f"{memory / 1e6:.1f}"


def _finite(x: Any) -> Any:
    """JSON has no NaN; it is written as a string."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
