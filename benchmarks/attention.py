"""Compares `sparse_attention` with every peer that can be imported, on one device, and with the goals of an H200.

`python benchmarks/attention.py` measures the forward pass; `--pass` chooses the backward pass or both. On a GPU it runs
the whole table: block-sparse, causal, dense and window masks, packed documents and lengths from 2,048 to 32,768 in the
forward pass, grouped heads in the others, and calls so short that they are chained in one jit. Peers are
`jax.nn.dot_product_attention` (cuDNN, XLA), PyTorch (FlexAttention, SDPA), flash-attn3-jax, fa4-jax and tokamax, each
where it is installed and can compute the case. On a CPU it compares a few small cases with XLA, to show that everything
runs. `python -m jax_bsk bench` compares any size with `jax.nn`.

The exit status is 1 where a result of any contender is wrong or jax_bsk has none, and 2 where nothing can be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX starts: PyTorch shares the GPU's memory, and one must not take most of it at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from jax_bsk.core import compat, dispatch
from jax_bsk.qa.benchmarking import ceilings, measure, report, runs, tables
from jax_bsk.qa.benchmarking.cases import Case
from jax_bsk.qa.benchmarking.passes import Pass
from jax_bsk.qa.support.progress import Progress

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 5, 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    description = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="benchmarks/attention.py", description=description)
    parser.add_argument(
        "--pass",
        dest="measured",
        type=Pass,
        choices=list(Pass),
        default=Pass.FORWARD,
        metavar="|".join(which.value for which in Pass),
        help="what to measure: the forward (default), the gradients alone, or both together",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--no-peers", "--ours-only", action="store_true", dest="no_peers", help="measure jax_bsk alone")
    parser.add_argument("--implementation", choices=dispatch.IMPLEMENTATIONS, help="default: this platform's native")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and masks, default 0")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="default: into results/ after a whole run on a GPU, else none"
    )
    parser.add_argument("--plot-dir", type=Path, metavar="DIR", help="draw the two pictures there; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    args = parse(argv)
    platform = compat.default_platform()
    table = tables.table(args.measured, args.seed, on_gpu=platform == "cuda")
    chosen = [case for case in table if args.only in case.name]
    if not chosen:
        print(f"attention.py: no case's name contains {args.only!r}; --list prints them", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if args.plot_dir is not None:
        importlib.import_module(
            "jax_bsk.qa.benchmarking.plots"
        )  # matplotlib may be absent: not after minutes of measuring
    implementation = args.implementation or ("cuda" if platform == "cuda" else "cpu")
    reasons = dispatch.unavailable(implementation)
    if reasons:
        print(f"attention.py: {implementation} cannot run: {' '.join(reasons)}", file=sys.stderr)
        return 2

    output = args.output
    if output is None and platform == "cuda" and not (args.only or args.quick or args.no_peers or args.implementation):
        device = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
        output = RESULTS / f"{args.measured.value}-{device}.json"
    result = _measure(args, chosen, implementation, output)
    print(report.render(result))
    if output is not None:
        print(f"Wrote {output}")
    if args.plot_dir is not None:
        for path in importlib.import_module("jax_bsk.qa.benchmarking.plots").plot(result, args.plot_dir):
            print(f"Wrote {path}")
    return 0 if all(case["ok"] for case in result["cases"]) else 1


def _measure(args: argparse.Namespace, chosen: list[Case], implementation: str, output: Path | None) -> dict[str, Any]:
    """The report of those cases, written after each: a run that is cut short leaves what it measured."""
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    dtype = chosen[0].dtype
    result: dict[str, Any] = {
        "benchmark": f"attention {args.measured.title}",
        "pass": args.measured.value,
        **report.surroundings(),
        "implementation": implementation,
        "options": {"dtype": dtype, "rounds": rounds, "seed": args.seed, "only": args.only, "peers": not args.no_peers},
        "method": report.method(args.measured),
        "matrix_product_flops_per_second": ceilings.matrix_product_rate(dtype, args.seed),
        "cases": [],
    }
    options = {"implementation": implementation, "with_peers": not args.no_peers, "rounds": rounds, "seed": args.seed}
    with Progress(len(chosen), args.quiet) as progress:
        progress.step(chosen[0].name)
        for i, record in enumerate(runs.records(chosen, **options), 1):
            if i < len(chosen):
                progress.step(chosen[i].name)
            measure.judge(record, result["devices"][0]["name"], args.measured)
            result["cases"].append(record)
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
