"""Measures block-sparse products with few columns, which are bound by reading the stored blocks.

`python benchmarks/few_columns.py` measures x W (rows of x, as a layer has them) and W x (columns) of a matrix
8,192 x 8,192 with 22 % of its blocks, in bfloat16, for blocks of 128 and 64 and 1, 8 and 64 columns, beside

    wide    the same product with so many columns more that it takes the kernel of many columns
    dense   `jnp.dot` with the zeros
    copy    the bytes per second that a copy of a large array reads and writes

A call's time is that of one among many that are unrolled in one jit, each fed by the one before. The calls take the
weights of several matrices in turn, so that none is found in the L2 cache; `--matrices 1` has all calls read the same.
Before anything is timed, one result of each kind is compared with float64.

Goals of an H200: 2.8 times as fast as dense, and the stored blocks read at 0.7 of the copy's bytes per second. Exit
status 1 where a result is wrong. `--quick` shows on any machine that everything runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BSR, sparse_matmul
from jax_bsk.core import compat, library
from jax_bsk.qa.benchmarking import report, suite, timing
from jax_bsk.qa.benchmarking.matmul.cases import Config
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
COLUMNS = (1, 8, 64)
CHECKED = 64  # rows of the result's long side
SPEEDUP, COPY_SHARE = 2.8, 0.7  # goals, see above
COPIED_BYTES = 1 << 30

Weights = Sequence[Any]  # a pytree of arrays a matrix


def copy_rate(copied: int, rounds: int) -> float:
    """Bytes per second that the device reads and writes where it copies an array of so many bytes."""
    x = jnp.ones(copied // 2, jnp.bfloat16)
    double = jax.jit(lambda x: x + x)
    jax.block_until_ready(double(x))
    found = timing.interleaved({"copy": lambda _: double(x)}, rounds, queued=True)
    return 2 * copied / found["copy"].median


class Products:
    """The products of one config, with so many matrices that take turns.

    Attributes:
      stored_bytes: of the blocks of one matrix.
    """

    def __init__(self, config: Config, matrices: int, seed: int):
        self.config = config
        made = [Operands(config, seed + i) for i in range(matrices)]
        self.stored_bytes = made[0].matrix.data.nbytes
        self.first = made[0].dense
        self.sparse: Weights = [m.matrix for m in made]
        self.dense: Weights = [m.dense for m in made]

    def x(self, columns: int, left: bool) -> jax.Array:
        """Normal numbers: [columns, K] for x W, [K, columns] for W x."""
        shape = (columns, self.config.size) if left else (self.config.size, columns)
        return jax.random.normal(jax.random.key(columns), shape, self.config.dtype)

    def calls(self, columns: int, left: bool, chained: int) -> dict[str, tuple[Callable[..., Any], jax.Array, Weights]]:
        """By contender a program of `chained` calls, their first operand, and the weights."""
        narrow, wide = self.x(columns, left), self.x(_wide(), left)

        def sparse(x: jax.Array, w: BSR) -> jax.Array:
            return sparse_matmul(x, w) if left else sparse_matmul(w, x)

        def dense(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.dot(x, w) if left else jnp.dot(w, x)

        def chain(step: Callable[[jax.Array, Any], jax.Array]) -> Callable[..., jax.Array]:
            def run(x: jax.Array, weights: Weights) -> jax.Array:
                for i in range(chained):
                    x = step(x, weights[i % len(weights)])
                return x

            return jax.jit(run)

        return {
            "jax_bsk": (chain(sparse), narrow, self.sparse),
            "wide": (chain(sparse), wide, self.sparse),
            "dense": (chain(dense), narrow, self.dense),
        }

    def error(self, columns: int, left: bool) -> float:
        """Largest error of one call at some rows of the long side, by the largest number of the exact result."""
        x = self.x(columns, left)
        call = self.calls(columns, left, 1)["jax_bsk"][0]
        got = np.asarray(call(x, self.sparse).astype(jnp.float32))
        chosen = np.random.default_rng(columns).choice(self.config.size, min(CHECKED, self.config.size), replace=False)
        lines = self.first[:, chosen].T if left else self.first[chosen]
        lines, x = (np.asarray(a.astype(jnp.float32)).astype(np.float64) for a in (lines, x))
        want = x @ lines.T if left else lines @ x
        got = got[:, chosen] if left else got[chosen]
        return float(np.abs(got - want).max() / np.abs(want).max())


def _wide() -> int:
    """Columns that the kernel of many columns takes."""
    return int(library.limits("cuda").get("matmul_narrow_width", 64)) + 8


def measure(products: Products, columns: int, left: bool, chained: int, rounds: int) -> dict[str, float]:
    """Seconds of a call by contender."""
    compiled = products.calls(columns, left, chained)
    ready: dict[str, timing.Call] = {}
    for name, (function, x, weights) in compiled.items():
        jax.block_until_ready(function(x, weights))
        ready[name] = lambda _, function=function, x=x, weights=weights: function(x, weights)
    found = timing.interleaved(ready, rounds, queued=compat.default_platform() == "cuda")
    return {name: one.of_one(chained).median for name, one in found.items()}


def goals(cases: Sequence[dict[str, Any]], device: str) -> dict[str, str]:
    """Verdicts, on an H200: the least of all cases."""
    if "H200" not in device:
        return {}
    speedup, share = (min(case[name] for case in cases) for name in ("ratio_to_dense", "share_of_copy"))
    return {
        f"speed over dense >= {SPEEDUP:g}": f"{'met' if speedup >= SPEEDUP else 'missed'} ({speedup:.2f})",
        f"share of the copy's rate >= {COPY_SHARE:g}": f"{'met' if share >= COPY_SHARE else 'missed'} ({share:.2f})",
    }


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/few_columns.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--size", type=suite.positive, help="rows and columns of the matrix, default 8192")
    parser.add_argument("--columns", type=suite.positive, nargs="+", default=list(COLUMNS), help="default 1 8 64")
    parser.add_argument("--matrices", type=suite.positive, default=4, help="that take turns, default 4")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, default 0")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on a GPU")
    args = parser.parse_args(argv)
    suite.share_the_gpu()
    on_gpu = compat.default_platform() == "cuda"
    size = args.size or (512 if args.quick else 8192)
    rounds, chained = (2, 2) if args.quick else (suite.ROUNDS, 40)
    dtype = "float32" if args.quick and not on_gpu else "bfloat16"
    rate = copy_rate((1 << 20) if args.quick else COPIED_BYTES, rounds)

    cases = []
    for block in (128, 64):
        products = Products(Config(size, 0.78, block, dtype), args.matrices, args.seed)
        for left in (True, False):
            for columns in args.columns:
                error = products.error(columns, left)
                seconds = measure(products, columns, left, chained, rounds)
                case: dict[str, Any] = {"form": "x W" if left else "W x", "block": block, "columns": columns}
                case |= {"largest_error": error, "ok": error <= (1e-5 if dtype == "float32" else 2**-7)}
                case |= {"seconds": seconds, "stored_bytes": products.stored_bytes}
                case |= {
                    "ratio_to_dense": seconds["dense"] / seconds["jax_bsk"],
                    "stored_bytes_per_second": products.stored_bytes / seconds["jax_bsk"],
                    "share_of_copy": products.stored_bytes / seconds["jax_bsk"] / rate,
                }
                cases.append(case)
        del products
    device = environment.devices()[0]["name"]
    result = {
        "benchmark": "block-sparse products of few columns",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "size": size,
        "dtype": dtype,
        "matrices": args.matrices,
        "chained_calls": chained,
        "copy_bytes_per_second": rate,
        "cases": cases,
        "goals": goals(cases, device),
    }
    header = ("form", "block", "columns", "us", "wide us", "dense us", "TB/s", "of copy", "times dense", "check")
    rows = []
    for case in cases:
        us = [f"{case['seconds'][name] * 1e6:.1f}" for name in ("jax_bsk", "wide", "dense")]
        numbers = [f"{case['stored_bytes_per_second'] / 1e12:.2f}", f"{case['share_of_copy']:.2f}"]
        numbers.append(f"{case['ratio_to_dense']:.2f}")
        rows.append((case["form"], str(case["block"]), str(case["columns"]), *us, *numbers, _verdict(case)))
    print(
        f"{size} x {size}, 22 % of the blocks, {dtype}; {args.matrices} matrices in turn; copy {rate / 1e12:.2f} TB/s"
    )
    print(table(header, rows))
    for goal, verdict in result["goals"].items():
        print(f"{verdict}: {goal}")
    output = args.output
    if output is None and on_gpu and not args.quick and args.size is None:
        output = suite.results_path(RESULTS, "few-columns")
    if output is not None:
        report.write(result, output)
        print(f"Wrote {output}")
    return 0 if all(case["ok"] for case in cases) else 1


def _verdict(case: dict[str, Any]) -> str:
    return "ok" if case["ok"] else f"WRONG {case['largest_error']:.1e}"


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
