"""`python -m jax_bsk bench`: `sparse_attention` beside `jax.nn.dot_product_attention`, timed and checked.

The suite of `jax_bsk.qa.benchmarking` with cases of the options' sizes. `benchmarks/attention.py` has more peers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_bsk.attention import refusals
from jax_bsk.core import compat, dispatch
from jax_bsk.core.errors import UnsupportedError
from jax_bsk.qa.benchmarking import ceilings, report, suite, timing
from jax_bsk.qa.benchmarking.attention.cases import Case, Pattern
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.operation import Attention
from jax_bsk.qa.benchmarking.attention.passes import Pass, of_jax
from jax_bsk.qa.benchmarking.attention.peers import jax_nn
from jax_bsk.qa.benchmarking.attention.tables import time_of
from jax_bsk.qa.benchmarking.contender import OURS, Contender
from jax_bsk.qa.benchmarking.suite import Maker, positive
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.support.table import table

PASSES = {"forward": Pass.FORWARD, "forward+backward": Pass.TRAINING}
METHOD = (
    "Each call is jitted, checked on random inputs, and then timed in rounds that visit every contender in turn. The "
    "check compares rows with float64: up to 1,024 tokens all rows of 16 heads (of all, where there are fewer), of "
    "longer sequences 64 rows of three heads; and every element must be finite. A time is the median of its samples; a "
    f"sample is one call, or as many as fill {timing.SAMPLE_SECONDS * 1e3:.0f} ms. The mask is an argument, built "
    "beforehand. Useful FLOPs: 4 B N T S H density for the forward, 3.5 times that with the backward. A ratio is the "
    "peer's time / jax_bsk's."
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

    option("--lengths", "tokens", nargs="+", type=positive, metavar="S")
    option("--densities", "shares of blocks for the random pattern", nargs="+", type=_share, metavar="P")
    option("--patterns", "masks", nargs="+", choices=("random", "causal", "window", "dense"))
    option("--batch", "examples", type=positive)
    option("--heads", "query heads", type=positive)
    parser.add_argument("--kv-heads", help="key/value heads; default as many as query heads", type=positive)
    option("--head-dim", "head size", type=positive)
    option("--dtype", "type of the inputs", choices=("float32", "bfloat16", "float16"))
    option("--block-size", "tokens of a mask's block", type=positive)
    option("--window", "tokens to the left in the window pattern", type=positive)
    parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, help="default: chosen as in any call")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--forward-only", action="store_true", help="do not time the backward")
    passes.add_argument("--backward", action="store_true", help="time forward and forward with backward (the default)")
    parser.add_argument("--repeats", type=positive, help="samples of each time; default 5, or 3 of very long calls")
    parser.add_argument("--seed", type=int, help="of inputs and masks; default a fresh one, written in the output")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw useful FLOP/s against density")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return number


def run(args: argparse.Namespace) -> int:
    try:
        pictures = None if args.plot is None else suite.plotter()
        found = measure(args)
    except (ImportError, UnsupportedError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(report.render(found, tables(found)))
    print("\n" + "\n".join(["Next:", *(f"  {line}" for line in next_steps(found, named=args.implementation))]))
    if args.output is not None:
        report.write(found, args.output)
        print(f"Wrote {args.output}")
    if pictures is not None and args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        panels = pictures.grouped(found["cases"], lambda case: f"{case['pass']}, {case['length']:,} tokens")
        if panels:
            pictures.density(found, panels, args.plot, _sizes(found["options"]))
            print(f"Wrote {args.plot}")
    return 0 if all(case["ok"] for case in found["cases"]) else 1


# ---- What is measured


class BesideJax(Attention):
    """The suite's attention whose peers are of `jax.nn`: with the dense mask, and cuDNN also with masks of its own."""

    whole = ahead = True

    def peers(self, case: Case) -> Iterator[tuple[str, Maker]]:
        on_gpu = compat.default_platform() == "cuda"
        for name in ("xla", "cudnn") if on_gpu else ("xla",):
            yield name, lambda case, inputs, name=name: _masked(name, case, inputs)
        if on_gpu and jax_nn.native(case) is not None:
            yield "cudnn native", lambda case, inputs: jax_nn.make("cudnn", case, inputs)


def _masked(name: Any, case: Case, inputs: Inputs) -> Contender:
    """`jax.nn.dot_product_attention` with the dense mask."""

    def attend(query, key, value, mask):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=name)

    return of_jax(case, inputs, attend, jax_nn.dense_mask(case), variant="dense mask", ahead=True)


def random_blocks(count: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """Random blocks and the diagonal, bool [count, count], of that density on average (at least the diagonal's)."""
    diagonal = 1 / count
    chance = max(0.0, (density - diagonal) / (1 - diagonal)) if count > 1 else 1.0
    return (rng.uniform(size=(count, count)) < chance) | np.eye(count, dtype=bool)


def make_cases(options: dict[str, Any], length: int, rng: np.random.Generator) -> list[Case]:
    """The cases of one length, pass by pass; "random" gives one a density."""
    count = -(-length // options["block_size"])
    patterns: list[tuple[str, Pattern]] = []
    for name in options["patterns"]:
        if name == "random":
            possible = dict.fromkeys(max(density, 1 / count) for density in options["densities"])
            draws = (random_blocks(count, density, rng) for density in possible)  # at least the diagonal
            size = options["block_size"]
            patterns += [("random", Pattern("random", blocks=blocks, block_size=size)) for blocks in draws]
        else:
            label = f"window {options['window']}" if name == "window" else name
            patterns.append((label, Pattern(name, window=options["window"])))
    sizes = {name: options[name] for name in ("batch", "heads", "kv_heads", "head_dim", "dtype", "block_size")}
    return [
        Case(label, length=length, pattern=pattern, measured=PASSES[which], columns=True, **sizes)
        for which in options["passes"]
        for label, pattern in patterns
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what the options say and returns the whole report, ready for JSON."""
    defaults = CUDA if compat.default_platform() == "cuda" else CPU
    options = {
        field.name: getattr(defaults, field.name) if getattr(args, field.name) is None else getattr(args, field.name)
        for field in dataclasses.fields(Defaults)
    }
    options |= {"kv_heads": args.kv_heads or options["heads"], "repeats": args.repeats}
    options["passes"] = list(PASSES)[:1] if args.forward_only else list(PASSES)
    if options["heads"] % options["kv_heads"]:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {options['heads']} and {options['kv_heads']}")
    implementation = _implementation(args.implementation, options)
    seed = int.from_bytes(os.urandom(4), "little") >> 1 if args.seed is None else args.seed
    rng = np.random.default_rng(seed)
    cases = [case for length in options["lengths"] for case in make_cases(options, length, rng)]
    found: dict[str, Any] = {
        "benchmark": "attention",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "implementation": implementation,
        "options": options,
        "seed": seed,
        "method": METHOD,
        "cases": [],
    }
    names = {which: name for name, which in PASSES.items()}
    build_seconds: list[float] = []
    with Progress(1 + len(cases), args.quiet) as progress:
        progress.step("a plain matrix product")
        found["matrix_product_flops_per_second"] = ceilings.matrix_product_rate(options["dtype"], seed)

        def begin(case: Case) -> None:
            progress.step(f"{case.length} tokens, {case.name}, {names[case.measured]}")
            start = time.perf_counter()
            assert case.mask.q_len == case.length  # it is built here, and the case keeps it
            build_seconds.append(time.perf_counter() - start)

        operation = BesideJax(args.implementation, with_peers=True)
        of_cases = suite.records(operation, cases, rounds=args.repeats, seed=seed, on_case=begin)
        for case, record in zip(cases, of_cases, strict=True):
            assert isinstance(record, dict)  # there is no deadline
            about = {"name": f"{case.length} tokens, {case.name}", "pattern": case.name, "pass": names[case.measured]}
            # A peer that is wrong is told, and is not this command's failure.
            ours = {"mask_build_seconds": build_seconds[-1], "ok": "seconds" in record[OURS]}
            found["cases"].append({"length": case.length, **record, **about, **ours})
    return found


def _implementation(named: str | None, options: dict[str, Any]) -> str:
    """The implementation that the calls will get, refused now rather than inside each of them."""
    facts = refusals.AttentionFacts(
        dtype=options["dtype"],
        head_dim=options["head_dim"],
        value_dim=options["head_dim"],
        block_q=options["block_size"],
        block_kv=options["block_size"],
    )
    return dispatch.choose(named, facts)[0]


# ---- How it is shown


def tables(found: dict[str, Any]) -> list[str]:
    """The table and what is needed to read it."""
    unit, factor = report.unit_of(found)
    peers = list(dict.fromkeys(name for case in found["cases"] for name in case["peers"]))
    header = ["length", "pattern", "density", "pass", "ms", unit, "temp MB"]
    for name in peers:
        header += [f"{name} ms", "temp MB", "speed-up"]
    rows = []
    for case in sorted(found["cases"], key=lambda case: case["length"]):
        mine = case[OURS]
        row = [str(case["length"]), case["pattern"], f"{case['density']:.3f}" if "density" in case else "-"]
        row += [case["pass"], time_of(mine)]
        row += [f"{mine['useful_flops_per_second'] / factor:.1f}" if "seconds" in mine else "-", _memory(mine)]
        for name in peers:
            record = case["peers"].get(name, {})
            row += [time_of(record), _memory(record), f"{record['ratio']:.2f}x" if "ratio" in record else "-"]
        check = mine.get("check", {})
        row += ["-" if check.get("largest_error") is None else f"{check['largest_error']:.1e}"]
        rows.append([*row, "ok" if case["ok"] else "WRONG"])
    ceiling = f"{found['matrix_product_flops_per_second'] / factor:.0f} {unit}"
    return [
        f"{report.where(found)}; beside jax.nn.dot_product_attention",
        f"{_sizes(found['options'])}; a plain matrix product runs at {ceiling}",
        "",
        table([*header, "largest error", "check"], rows),
        "",
        f"ms: median. {unit}: useful ones (attended elements only). temp MB: scratch that XLA allocates. speed-up: "
        "peer's time / jax_bsk's. largest error: of jax_bsk's results, in the rows that were compared with float64.",
    ]


def next_steps(found: dict[str, Any], named: str | None = None) -> list[str]:
    """What to run next, in one to three lines that depend on what was measured.

    Args:
      found: the report of `measure`.
      named: the implementation that the call named; None where it was chosen.
    """
    cases, options = found["cases"], found["options"]
    if not all(case["ok"] for case in cases):
        return [
            "`python -m jax_bsk validate --quick --stage validate` finds the random cases that are wrong here.",
            "Report them with what `python -m jax_bsk info` prints.",
        ]
    lines = []
    if found["implementation"] == "xla" and named is None:
        lines.append("`python -m jax_bsk info` says why the native kernels, which are faster, were not used.")
    ratios = [(peer["ratio"], name, case) for case in cases for name, peer in case["peers"].items() if "ratio" in peer]
    ratio, name, case = min(ratios, key=lambda of_peer: of_peer[0], default=(1.0, "", {}))
    block = options["block_size"]
    other = f"The same with `--block-size {128 if block < 128 else 64}`"
    if ratio < 1:
        lines.append(
            f"{other} may gain where {name} won ({case['name']}, {case['pass']}: {ratio:.2f}x); where it does not, "
            "take dense attention."
        )
    elif (slowest := _slowest(found)) is not None:
        share, case = slowest
        lines.append(
            f"{other} measures other blocks: with {block} the lowest rate, of {case['name']}, was {share:.0%} of a "
            "plain matrix product's."
        )
    if len(options["passes"]) == 1:
        lines.append("The same with `--backward` times the gradients, too.")
    else:
        kernels = "the CPU kernels; the CUDA kernels need an NVIDIA GPU." if _on_cpu(found) else "this GPU's kernels."
        lines.append(f"`python -m jax_bsk validate --quick` checks results, repeats and faults of {kernels}")
    return lines


def _slowest(found: dict[str, Any]) -> tuple[float, dict[str, Any]] | None:
    """The forward that is furthest from the rate of a plain matrix product, and that share; None without a time."""
    rates = [
        (case[OURS]["useful_flops_per_second"] / found["matrix_product_flops_per_second"], case)
        for case in found["cases"]
        if case["pass"] == "forward" and "seconds" in case[OURS]
    ]
    return min(rates, key=lambda rate: rate[0], default=None)


def _on_cpu(found: dict[str, Any]) -> bool:
    return found["devices"][0]["platform"] == "cpu"


def _sizes(options: dict[str, Any]) -> str:
    return (
        f"batch {options['batch']}, heads {options['heads']} (key/value {options['kv_heads']}), head size "
        f"{options['head_dim']}, {options['dtype']}, blocks of {options['block_size']}"
    )


def _memory(record: dict[str, Any]) -> str:
    return f"{record['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in record else "-"
