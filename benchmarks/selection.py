"""Measures what selecting blocks from data costs beside the attention, and training steps beside dense cuDNN.

`python benchmarks/selection.py` measures three things at batch 1, 16 heads of size 128, 32,768 tokens in blocks of 128,
bfloat16:

    selections   from scores, or from queries and keys, to the lists, and on to the key-major lists of the backward;
                 beside the forward of the attention over the lists of `from_topk` (16 blocks a row)
    gates        forward, and forward with backward, of attention over these lists with and without gates
    training     output and gradients of MoBA and SparseK attention, selection included, beside dense causal attention
                 by `jax.nn.dot_product_attention` (cuDNN on a GPU, else XLA)

Every contender is compiled, run once and then timed in turn with the others. Before that the attention of each
selection is compared with the pure JAX implementation at 2,048 tokens in float32, output and gradients.

Goals of an H200: `from_topk` to both lists within 0.15 of the attention's forward; SparseK attention, with the
defaults of its function, 5 times as fast as dense causal attention, forward with backward. Exit status 1 where a
result is wrong. `--quick` shows on any machine that everything runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_bsk
from jax_bsk import selection
from jax_bsk.core import compat
from jax_bsk.masks import BlockMask, CausalMask
from jax_bsk.qa.benchmarking import report, suite, timing
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
TOP_K = 16
SIZES = {"length": 32_768, "heads": 16, "head_dim": 128, "block": 128}
QUICK_SIZES = {"length": 1_024, "heads": 2, "head_dim": 64, "block": 64}
CHECKED_LENGTH = 2_048
SHARE, SPEEDUP = 0.15, 5.0  # goals, see above

Inputs = dict[str, Any]  # arrays, and the lists of `from_topk` as a BlockMask
Function = Callable[[Inputs], Any]


def inputs(sizes: Mapping[str, int], dtype: str, seed: int) -> Inputs:
    """Normal numbers: query, key, value, a cotangent, block scores for `from_topk`, and SparseK's scores of keys."""
    keys = jax.random.split(jax.random.key(seed), 6)
    length, heads, blocks = sizes["length"], sizes["heads"], sizes["length"] // sizes["block"]
    shape = (1, length, heads, sizes["head_dim"])
    made = {
        name: jax.random.normal(key, shape, dtype) for name, key in zip(("q", "k", "v", "dout"), keys[:4], strict=True)
    }
    made["blocks"] = jax.random.normal(keys[4], (1, heads, blocks, blocks))
    # The mean of a block's keys then differs by some tenths from block to block, as gates of SparseK want it.
    made["scores"] = 5 * jax.random.normal(keys[5], (1, length, heads))
    return made


def choices(sizes: Mapping[str, int]) -> dict[str, Callable[[Inputs], BlockMask]]:
    """The selections that are a BlockMask, by name."""
    length, block = sizes["length"], sizes["block"]
    causal = CausalMask()
    return {
        "from_topk": lambda x: selection.from_topk(
            x["blocks"], TOP_K, q_len=length, block_size=block, mask=causal, own_block=True
        ),
        "moba": lambda x: selection.moba(x["q"], x["k"], top_k=TOP_K, moba_block=block, block_size=block),
        "sparsek": lambda x: selection.sparsek(x["scores"], block_size=block)[0],
    }


def attentions(sizes: Mapping[str, int], implementation: str | None) -> dict[str, Function]:
    """Attention with its selection, of (q, k, v, scores) in the inputs."""
    options: dict[str, Any] = {"implementation": implementation}
    moba = choices(sizes)["moba"]
    return {
        "moba": lambda x: jax_bsk.sparse_attention(x["q"], x["k"], x["v"], mask=moba(x), **options),
        "sparsek": lambda x: jax_bsk.sparsek_attention(
            x["q"], x["k"], x["v"], x["scores"], block_size=sizes["block"], **options
        ),
    }


def dense(x: Inputs) -> jax.Array:
    """Dense causal attention."""
    implementation = "cudnn" if compat.default_platform() == "cuda" else "xla"
    return jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, implementation=implementation)


def training(function: Function) -> Function:
    """Output and gradients of what is differentiable, for the cotangent of the inputs."""

    def run(x: Inputs) -> Any:
        leaves = {name: x[name] for name in ("q", "k", "v", "scores", "gates") if name in x}
        out, vjp = jax.vjp(lambda leaves: function({**x, **leaves}), leaves)
        return out, vjp(x["dout"])

    return run


def check(sizes: Mapping[str, int], seed: int) -> dict[str, float]:
    """Largest difference of each attention from the pure JAX implementation, over the largest number, in float32."""
    small = {**sizes, "length": min(CHECKED_LENGTH, sizes["length"])}
    x = inputs(small, "float32", seed + 1)
    reference = attentions(small, "xla")
    found = {}
    for name, function in attentions(small, None).items():
        with jax.default_matmul_precision("highest"):  # or a GPU's products in plain JAX have TF32's ten bits
            got, want = (jax.jit(training(f))(x) for f in (function, reference[name]))
        errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30), got, want)
        found[name] = max(float(error) for error in jax.tree.leaves(errors))
    return found


def contenders(sizes: Mapping[str, int]) -> dict[str, Function]:
    """Everything that is timed, by name."""

    def rows(choose: Callable[[Inputs], BlockMask]) -> Function:
        return lambda x: [getattr(choose(x), name) for name in ("row_offsets", "kv_blocks", "tiles")]

    def both(choose: Callable[[Inputs], BlockMask]) -> Function:
        return lambda x: jax.tree.leaves(choose(x).transpose())

    def attend(x: Inputs) -> jax.Array:
        return jax_bsk.sparse_attention(x["q"], x["k"], x["v"], mask=x["lists"])

    def attend_gated(x: Inputs) -> jax.Array:
        return jax_bsk.sparse_attention(x["q"], x["k"], x["v"], mask=x["lists"], gates=x["gates"])

    named: dict[str, Function] = {}
    for name, choose in choices(sizes).items():
        named[f"{name}: lists"] = rows(choose)
        named[f"{name}: lists and transpose"] = both(choose)
    functions = {"attention": attend, "attention, gates": attend_gated, **attentions(sizes, None)}
    for name, function in {**functions, "dense causal": dense}.items():
        named[f"{name}: forward"] = function
        named[f"{name}: training"] = training(function)
    return named


def measure(sizes: Mapping[str, int], dtype: str, rounds: int, seed: int, quiet: bool) -> dict[str, dict[str, Any]]:
    """Seconds of each contender."""
    x = inputs(sizes, dtype, seed)
    x["lists"] = jax.jit(choices(sizes)["from_topk"])(x)
    x["gates"] = jnp.ones((1, sizes["heads"], x["lists"].kv_blocks.shape[-1]))
    calls, named = {}, contenders(sizes)
    with Progress(len(named) + rounds, quiet) as progress:
        for name, function in named.items():
            progress.step(name)
            compiled = jax.jit(function)
            jax.block_until_ready(compiled(x))
            calls[name] = lambda number, compiled=compiled: compiled(x)
        timings = timing.interleaved(
            calls,
            rounds,
            queued=compat.default_platform() == "cuda",
            on_round=lambda number: progress.step(f"round {number + 1}"),
        )
    return {name: found.to_json() for name, found in timings.items()}


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the goals are about, and its neighbours."""
    seconds = {name: record["seconds"] for name, record in times.items()}
    forward, names = seconds["attention: forward"], ("from_topk", "moba", "sparsek")
    found = {f"{name}: share of the forward": seconds[f"{name}: lists and transpose"] / forward for name in names}
    for which in ("forward", "training"):
        found[f"gates: time of {which}"] = seconds[f"attention, gates: {which}"] / seconds[f"attention: {which}"]
        for name in ("moba", "sparsek"):
            found[f"{name}: speed over dense, {which}"] = (
                seconds[f"dense causal: {which}"] / seconds[f"{name}: {which}"]
            )
    return found


def goals(found: Mapping[str, float], device: str) -> dict[str, str]:
    """Verdicts, on an H200."""
    if "H200" not in device:
        return {}
    share, speed = found["from_topk: share of the forward"], found["sparsek: speed over dense, training"]
    return {
        f"from_topk: share of the forward <= {SHARE}": "met" if share <= SHARE else "missed",
        f"sparsek: speed over dense, training >= {SPEEDUP:g}": "met" if speed >= SPEEDUP else "missed",
    }


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/selection.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, default 0")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on a GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(argv)
    suite.share_the_gpu()  # cuDNN's workspace and XLA's own share it
    on_gpu = compat.default_platform() == "cuda"
    sizes, dtype = (QUICK_SIZES, "float32") if args.quick else (SIZES, "bfloat16")

    errors = check(sizes, args.seed)
    wrong = {name: error for name, error in errors.items() if not error <= 2e-4}
    times = measure(sizes, dtype, suite.QUICK_ROUNDS if args.quick else suite.ROUNDS, args.seed, args.quiet)
    found = ratios(times)
    device = environment.devices()[0]["name"]
    result = {
        "benchmark": "selection",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "sizes": {**sizes, "batch": 1, "dtype": dtype, "top_k": TOP_K},
        "largest_error_at_2048_float32": errors,
        "contenders": times,
        "ratios": found,
        "goals": goals(found, device),
    }
    print(table(("", "us"), [(name, f"{record['seconds'] * 1e6:.1f}") for name, record in times.items()]))
    print(table(("", "ratio"), [(name, f"{ratio:.3f}") for name, ratio in found.items()]))
    for goal, verdict in goals(found, device).items():
        print(f"{verdict}: {goal}")
    for name, error in wrong.items():
        print(f"wrong: {name} differs from plain JAX by {error:.1e} of its largest number")
    output = args.output
    if output is None and on_gpu and not args.quick:
        output = suite.results_path(RESULTS, "selection")
    if output is not None:
        report.write(result, output)
        print(f"Wrote {output}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
