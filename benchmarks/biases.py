"""Measures what biases and dropout cost: causal attention with each beside the same call without.

`python benchmarks/biases.py` measures in bfloat16, forward and with gradients, 4 x 32 heads of 128 over 8,192 tokens:

    causal             nothing else
    alibi              `AlibiBias`; gradients of query, key and value
    t5                 `RelativeBias` of a table of 32 buckets, likewise
    t5 and its table   the table's gradient, too
    dropout            a tenth of the probabilities
    dense              one example with `bias` [1, 32, 8192, 8192] in bfloat16, its gradient included, every pair

Beside `dense` runs `jax.nn.dot_product_attention` with cuDNN and the same array. Before anything is timed, sampled rows
of each output are compared with float64 (not of dropout, whose pairs tests compare). Goals are of an H200. Exit status
1 where a result is wrong. `--quick` shows on any machine that all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import sparse_attention
from jax_bsk.biases import AlibiBias, RelativeBias, alibi_slopes
from jax_bsk.core import compat
from jax_bsk.qa.benchmarking import report, suite, timing
from jax_bsk.qa.benchmarking.contender import Refused, first_line, need_gpu
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
BUCKETS, DISTANCE, DROPPED = 32, 128, 0.1
CHECKED = 6  # rows of each output
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-6}  # of an error, by the largest number of the sampled rows


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every case; `dense` has one example."""

    batch: int = 4
    tokens: int = 8192
    heads: int = 32
    head_dim: int = 128
    dtype: str = "bfloat16"

    def normal(self, seed: int, *shape: int, dtype: str | None = None) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype or self.dtype)


QUICK = Sizes(batch=1, tokens=256, heads=2, head_dim=32, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Row:
    """A call that is measured.

    Attributes:
      name: as the report and the goals know it.
      call: the output of (query, key, value, what is added).
      added: what `call` gets beside them: nothing, or numbers.
      bias: what is added to the logits of query t of head n, float64 [S]; None where the output is not compared.
      causal: whether the call is.
      with_added: whether gradients are those of `added`, too.
      peer: whether another implementation computes it, which may refuse.
    """

    name: str
    call: Callable[..., Any]
    added: Any
    bias: Callable[[int, int], Any] | None
    causal: bool = True
    with_added: bool = False
    peer: bool = False


def _inputs(sizes: Sizes, batch: int) -> list[jax.Array]:
    return [sizes.normal(i, batch, sizes.tokens, sizes.heads, sizes.head_dim) for i in range(3)]


def causal_rows(sizes: Sizes) -> Iterator[Row]:
    """Causal calls: the first one adds nothing."""
    slopes = alibi_slopes(sizes.heads)
    numbers = sizes.normal(7, BUCKETS, sizes.heads, dtype="float32")
    keys = np.arange(sizes.tokens)

    def of_buckets(t: int, n: int) -> np.ndarray:
        distance = np.maximum(t - keys, 0)
        exact = BUCKETS // 2
        far = np.log(np.maximum(distance, 1) / exact) / math.log(DISTANCE / exact) * (BUCKETS - exact)
        bucket = np.where(distance < exact, distance, np.minimum(exact + far.astype(int), BUCKETS - 1))
        return np.asarray(numbers, np.float64)[bucket, n]

    def alibi(q: Any, k: Any, v: Any, slopes: Any) -> Any:
        return sparse_attention(q, k, v, AlibiBias(slopes), is_causal=True)

    def t5(q: Any, k: Any, v: Any, numbers: Any) -> Any:
        return sparse_attention(
            q, k, v, RelativeBias.t5(numbers, bidirectional=False, max_distance=DISTANCE), is_causal=True
        )

    def dropout(q: Any, k: Any, v: Any, rng: Any) -> Any:
        return sparse_attention(q, k, v, is_causal=True, dropout_rate=DROPPED, dropout_rng=rng)

    yield Row("causal", lambda q, k, v, _: sparse_attention(q, k, v, is_causal=True), (), lambda t, n: 0.0)
    yield Row("alibi", alibi, jnp.asarray(slopes), lambda t, n: -float(slopes[n]) * (t - keys))
    yield Row("t5", t5, numbers, of_buckets)
    yield Row("t5 and its table", t5, numbers, of_buckets, with_added=True)
    yield Row("dropout", dropout, jax.random.key(3), None)


def dense_rows(sizes: Sizes) -> Iterator[Row | tuple[str, Refused]]:
    """One example, every pair, a number for each."""
    bias = sizes.normal(9, 1, sizes.heads, sizes.tokens, sizes.tokens)

    def of_array(t: int, n: int) -> np.ndarray:
        return np.asarray(bias[0, n, t].astype(jnp.float32), np.float64)

    def ours(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return sparse_attention(q, k, v, bias)

    def cudnn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn")

    yield Row("dense", ours, bias, of_array, causal=False, with_added=True)
    try:
        need_gpu()
        yield Row("dense, cudnn", cudnn, bias, of_array, causal=False, with_added=True, peer=True)
    except Refused as reason:
        yield "dense, cudnn", reason


def error(row: Row, out: Any, inputs: Sequence[Any]) -> float:
    """Largest error of sampled rows, by the largest number that they should hold."""
    assert row.bias is not None
    tokens, heads, dim = inputs[0].shape[1:]
    rng = np.random.default_rng(tokens)
    got, want, every = [], [], slice(None)
    for t, n in ((int(rng.integers(tokens)), int(rng.integers(heads))) for _ in range(CHECKED)):
        q, k, v = (
            np.asarray(x[0, at, n].astype(jnp.float32), np.float64)
            for x, at in zip(inputs, (t, every, every), strict=True)
        )
        logits = k @ q / math.sqrt(dim) + row.bias(t, n)
        if row.causal:
            logits = np.where(np.arange(tokens) <= t, logits, -np.inf)
        weights = np.exp(logits - logits.max())
        want.append(weights @ v / weights.sum())
        got.append(np.asarray(out[0, t, n].astype(jnp.float32), np.float64))
    return float(np.abs(np.stack(got) - np.stack(want)).max() / np.abs(np.stack(want)).max())


def measure(rows: Iterator[Any], batch: int, sizes: Sizes, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each row's forward, and of its forward and gradients, timed in turn."""
    inputs = _inputs(sizes, batch)
    weights = sizes.normal(5, *inputs[0].shape)
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, timing.Call] = {}
    for row in rows:
        if isinstance(row, tuple):
            records[row[0]] = {"name": row[0], "refused": str(row[1])}
            continue
        records[row.name] = record = {"name": row.name, "ok": True}
        try:
            forward = jax.jit(row.call)

            def loss(q: Any, k: Any, v: Any, added: Any, row: Row = row) -> Any:
                return jnp.sum((row.call(q, k, v, added) * weights).astype(jnp.float32))

            both = jax.jit(jax.grad(loss, (0, 1, 2, 3) if row.with_added else (0, 1, 2)))
            out = jax.block_until_ready(forward(*inputs, row.added))
            jax.block_until_ready(both(*inputs, row.added))
            if row.bias is not None:
                record["largest_error"] = error(row, out, inputs)
                record["ok"] = bool(record["largest_error"] <= TOLERANCE[sizes.dtype])
        except Exception as problem:  # what a peer does not take is a result
            if not row.peer:
                raise
            record["refused"] = first_line(problem)
            continue
        ready[f"{row.name}: forward"] = lambda _, forward=forward, row=row: forward(*inputs, row.added)
        ready[f"{row.name}: both"] = lambda _, both=both, row=row: both(*inputs, row.added)
    found = timing.interleaved(ready, rounds, queued=compat.default_platform() == "cuda")
    for key, one in found.items():
        name, what = key.split(": ")
        records[name][what] = one.median
    for record in records.values():
        if "both" in record:
            record["backward"] = record["both"] - record["forward"]
    return records


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio of two rows' times that an H200 is to reach."""

    row: str
    other: str
    what: str
    bound: float

    def judge(self, rows: Mapping[str, Mapping[str, Any]]) -> str:
        if any(self.what not in rows.get(name, {}) for name in (self.row, self.other)):
            return "open"
        ratio = rows[self.row][self.what] / rows[self.other][self.what]
        return f"{'met' if operator.le(ratio, self.bound) else 'missed'} ({ratio:.3g})"


GOALS = (
    *(Goal(name, "causal", "forward", 1.12) for name in ("alibi", "t5", "dropout")),
    *(Goal(name, "causal", "backward", bound) for name, bound in (("alibi", 1.2), ("t5", 1.2), ("dropout", 1.12))),
    *(Goal("dense", "dense, cudnn", what, 1.0) for what in ("forward", "both")),
)


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/biases.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--rounds", type=suite.positive, help=f"samples of each time, default {suite.ROUNDS}")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on a GPU")
    args = parser.parse_args(argv)
    suite.share_the_gpu()
    sizes = QUICK if args.quick else Sizes()
    rounds = args.rounds or (2 if args.quick else suite.ROUNDS)
    rows = measure(causal_rows(sizes), sizes.batch, sizes, rounds)
    rows |= measure(dense_rows(sizes), 1, sizes, rounds)
    device = environment.devices()[0]["name"]
    ok = all(record.get("ok", True) for record in rows.values())
    judged = ok and not args.quick and "H200" in device
    verdicts = {f"{g.row} over {g.other}, {g.what} <= {g.bound}": g.judge(rows) for g in GOALS} if judged else {}
    print(f"{device}, {sizes.dtype}, {sizes.batch} x {sizes.heads} heads of {sizes.head_dim}, {sizes.tokens} tokens")
    print(table(("case", "forward ms", "backward ms", "check"), [_cells(record) for record in rows.values()]))
    for goal, verdict in verdicts.items():
        print(f"{verdict}: {goal}")
    output = args.output
    if output is None and compat.default_platform() == "cuda" and not args.quick:
        output = suite.results_path(RESULTS, "biases")
    if output is not None:
        result = {
            "benchmark": "biases",
            "versions": environment.versions(),
            "devices": environment.devices(),
            "sizes": dataclasses.asdict(sizes),
            "rounds": rounds,
            "ok": ok,
            "cases": list(rows.values()),
            "goals": verdicts,
        }
        report.write(result, output)
        print(f"Wrote {output}")
    return 0 if ok else 1


def _cells(record: Mapping[str, Any]) -> list[str]:
    if "refused" in record:
        return [record["name"], "-", "-", record["refused"]]
    times = [f"{1e3 * record[what]:.3f}" for what in ("forward", "backward")]
    check = "wrong" if not record["ok"] else "ok" if "largest_error" in record else "-"
    return [record["name"], *times, check]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
