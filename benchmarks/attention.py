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
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_bsk.core import compat, dispatch
from jax_bsk.qa.benchmarking import ceilings, suite
from jax_bsk.qa.benchmarking.attention import cases, goals, tables
from jax_bsk.qa.benchmarking.attention.operation import Attention
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.support import environment

RESULTS = Path(__file__).parent / "results"


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
    parser.add_argument("--short", action="store_true", help="short sequences and blocks of 64 (forward, on a GPU)")
    parser.add_argument("--no-peers", "--ours-only", action="store_true", dest="no_peers", help="measure jax_bsk alone")
    suite.add_options(parser)
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    args = parse(argv)
    suite.share_the_gpu()
    on_gpu = compat.default_platform() == "cuda"
    table = cases.short(args.seed) if args.short else cases.table(args.measured, args.seed, on_gpu)
    chosen = [case for case in table if args.only in case.name]
    if not chosen:
        print(f"attention.py: no case's name contains {args.only!r}; --list prints them", file=sys.stderr)
        return 2
    implementation = args.implementation or ("cuda" if on_gpu else "cpu")
    reasons = [] if args.list else dispatch.unavailable(implementation)
    if reasons:
        print(f"attention.py: {implementation} cannot run: {' '.join(reasons)}", file=sys.stderr)
        return 2
    output = args.output
    a_part = args.only or args.short or args.quick or args.no_peers
    if output is None and on_gpu and not (a_part or args.implementation):
        output = suite.results_path(RESULTS, args.measured.value)
    rounds = suite.QUICK_ROUNDS if args.quick else suite.ROUNDS
    dtype = chosen[0].dtype
    facts = {
        "benchmark": f"attention {args.measured.title}",
        "pass": args.measured.value,
        "implementation": implementation,
        "options": {"dtype": dtype, "rounds": rounds, "seed": args.seed, "only": args.only, "peers": not args.no_peers},
        "method": tables.method(args.measured),
    }
    if not args.list:
        facts["matrix_product_flops_per_second"] = ceilings.matrix_product_rate(dtype, args.seed)
    operation = Attention(implementation, with_peers=not args.no_peers)
    device = environment.devices()[0]["name"]
    return suite.run(
        operation,
        chosen,
        args,
        facts,
        rounds=rounds,
        output=output,
        judge=lambda record: goals.judge(record, device, args.measured),
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
