"""Measures decoding: attention of the newest tokens over caches, which is bound by reading the cache.

`python benchmarks/decode.py` measures `jax_bsk.decode` in bfloat16 with 32 query heads on 8 key/value heads of 128:

    contiguous   `decode.attention`, batch x cache, one query per example or 4
    pages        `ragged_paged_attention` over the same sequences in pages of 16 and of 64, in random order
    selected     64 of the 512 pages of each sequence and key/value head
    float8       pages of 64 that hold float8_e4m3fn
    shared       64 sequences of 1k each behind the same 8k, read once for all and by each for itself
    prefill      a chunk of 2,048 tokens into 32k beside 63 decoding sequences of 8k, in one call and in two

Beside them run `jax.nn.dot_product_attention` with cuDNN and with XLA, which are given the caches' lengths, and torch's
SDPA where torch imports (the caches are full, so that it needs no lengths). Peers have no causal mask: for one query
there is none, and of 4 queries the last ones' keys are nearly all.

A call's time is that of one among many that are unrolled in one jit, each fed by the one before. Where a cache would
stay in the L2 cache the calls take several in turn. Bytes are those of the keys and values that a call must read once.
The rate of a copy is measured in the same run on an array of 1 GB. Before anything is timed, sampled rows of each
contender's result are compared with float64.

Goals are of an H200. Exit status 1 where a result of jax_bsk is wrong. `--quick` shows on any machine that all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import decode
from jax_bsk.core import compat
from jax_bsk.qa.benchmarking import report, suite, timing
from jax_bsk.qa.benchmarking.contender import OURS, Refused, first_line, need, need_gpu
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
PEERS = ("cudnn", "xla", "torch")
COPIED_BYTES = 1 << 30
L2_BYTES = 128 << 20  # more than any GPU has: the caches of a chain are as many bytes together
CHECKED = 8  # rows of each result
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-6}  # of an error, by the largest number of the sampled rows
SECONDS = 0.002  # that a chain lasts, about: short calls are chained more often
MOST_CHAINED, LEAST_CHAINED, XLA_CHAINED = 40, 4, 8

Step = Callable[[Any, Any], Any]  # query and cache to the output, which is the next query
Program = Callable[[Any, Sequence[Any]], Any]  # of query and caches, a chain of steps


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cases of a run have in common.

    Attributes:
      shrink: divides lengths of caches and chunks.
      most_batch: of a case.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    shrink: int = 1
    most_batch: int = 256

    def batch(self, wanted: int) -> int:
        return min(wanted, self.most_batch)

    def length(self, wanted: int) -> int:
        return max(64, wanted // self.shrink)

    def bytes_of(self, positions: int) -> int:
        """Of the keys and values of so many positions."""
        return positions * 2 * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def normal(self, seed: int, *shape: int) -> jax.Array:
        if self.shrink > 1:  # a program per shape would take longer than all else
            return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
        return jax.random.normal(jax.random.key(seed), shape, self.dtype)


QUICK = Sizes(heads=4, kv_heads=2, head_dim=32, dtype="float32", shrink=64, most_batch=3)


@dataclasses.dataclass(frozen=True)
class Row:
    """A call that is measured.

    Attributes:
      name: as the report and the goals know it.
      step: the call.
      query: its first query, [.., N, H].
      caches: what takes turns as the second argument of `step`.
      cache_bytes: that a call must read.
      wanted: what token t and query head n of the first cache must give, float64 [H].
      samples: (t, n) that are checked; the output is [tokens, N, H] when its leading dimensions are merged.
    """

    name: str
    step: Step
    query: Any
    caches: Sequence[Any]
    cache_bytes: int
    wanted: Callable[[int, int], np.ndarray]
    samples: tuple[tuple[int, int], ...]


def _samples(tokens: int, heads: int) -> tuple[tuple[int, int], ...]:
    rng = np.random.default_rng(tokens)
    return tuple((int(rng.integers(tokens)), int(rng.integers(heads))) for _ in range(CHECKED))


def _exact(query: Any, keys: Any, values: Any, attends: np.ndarray) -> np.ndarray:
    """One row in float64: query [H], keys and values [S, H], and which of them it attends to."""
    query, keys, values = (np.asarray(x.astype(jnp.float32)).astype(np.float64) for x in (query, keys, values))
    logits = np.where(attends, keys @ query / math.sqrt(len(query)), -np.inf)
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


# ---- Contiguous caches


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """So many examples with full caches, and so many queries of each."""

    sizes: Sizes
    batch: int
    length: int
    queries: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {_short(self.length)}" + (f", {self.queries} queries" if self.queries > 1 else "")

    def rows(self, peers: Sequence[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Contenders' names, and what makes their rows or raises `Refused`."""
        sizes, batch, length, queries = self.sizes, self.batch, self.length, self.queries
        one = sizes.bytes_of(batch * length)
        count = max(1, min(MOST_CHAINED, -(-L2_BYTES // one))) if sizes.shrink == 1 else 2
        shape = (batch, length, sizes.kv_heads, sizes.head_dim)
        caches = [(sizes.normal(2 * i, *shape), sizes.normal(2 * i + 1, *shape)) for i in range(count)]
        query = sizes.normal(99, batch, queries, sizes.heads, sizes.head_dim)
        lengths = jnp.full((batch,), length, jnp.int32)
        group = sizes.heads // sizes.kv_heads

        def wanted(causal: bool, token: int, head: int) -> np.ndarray:
            b, t = divmod(token, queries)
            keys, values = (x[b, :, head // group] for x in caches[0])
            last = length - queries + t if causal else length
            return _exact(query[b, t, head], keys, values, np.arange(length) <= last)

        def row(step: Step, query: Any, caches: Any, *, causal: bool) -> Row:
            samples = _samples(batch * queries, sizes.heads)
            return Row(self.name, step, query, caches, one, functools.partial(wanted, causal), samples)

        def ours() -> Row:
            # Lengths are an argument, as in a program that serves: here they go with each cache.
            def step(x: Any, cache: Any) -> Any:
                return decode.attention(x, *cache)

            return row(step, query, [(*cache, lengths) for cache in caches], causal=True)

        def of_jax(name: Any) -> Row:
            if name == "cudnn":
                need_gpu()

            def step(x: Any, cache: Any) -> Any:
                key, value, lengths = cache
                return jax.nn.dot_product_attention(x, key, value, key_value_seq_lengths=lengths, implementation=name)

            return row(step, query, [(*cache, lengths) for cache in caches], causal=False)

        def of_torch() -> Row:
            need_gpu()
            torch = need("torch")
            if not torch.cuda.is_available():
                raise Refused("PyTorch sees no GPU")
            attend = torch.nn.functional.scaled_dot_product_attention
            tensors = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in cache) for cache in caches]

            def step(x: Any, cache: Any) -> Any:
                return attend(x, *cache, enable_gqa=True)

            return row(step, torch.from_dlpack(query).transpose(1, 2), tensors, causal=False)

        yield OURS, ours
        for name in peers:
            yield name, of_torch if name == "torch" else functools.partial(of_jax, name)


# ---- Pages


@dataclasses.dataclass(frozen=True)
class Paged:
    """Sequences over pages: each with its queries (tokens) and its length, multiples of a page.

    Attributes:
      selected: pages listed for each sequence and key/value head; 0 for all.
      cache: type of the cache, where it is not the queries'.
      shared: first positions that are the same pages for all sequences.
      read_once: whether the call reads these once for all.
    """

    name: str
    sizes: Sizes
    q_lens: tuple[int, ...]
    lengths: tuple[int, ...]
    page_size: int
    selected: int = 0
    cache: str = ""
    shared: int = 0
    read_once: bool = False

    def row(self) -> Row:
        sizes, size = self.sizes, self.page_size
        count, tokens = len(self.lengths), sum(self.q_lens)
        group, rng = sizes.heads // sizes.kv_heads, np.random.default_rng(0)
        needed = [length // size for length in self.lengths]
        common = self.shared // size
        own = [pages - common for pages in needed]
        order = rng.permutation(common + sum(own)).astype(np.int32)
        table_ = np.zeros((count, max(needed)), np.int32)
        table_[:, :common] = order[:common]
        for s, first in enumerate(common + np.cumsum([0, *own[:-1]])):
            table_[s, common : needed[s]] = order[first : first + own[s]]
        offsets = np.cumsum([0, *self.q_lens]).astype(np.int32)
        lists = None
        if self.selected:
            lists = np.zeros((count, sizes.kv_heads, self.selected), np.int32)
            for s, heads in enumerate(lists):
                for row in heads:  # the newest page, and others in no order
                    others = rng.choice(needed[s] - 1, self.selected - 1, replace=False)
                    row[:] = rng.permutation([*others, needed[s] - 1])
        pages = sizes.normal(0, len(order), size, 2 * sizes.kv_heads, sizes.head_dim)
        if self.cache:
            pages = pages.astype(self.cache)
        query = sizes.normal(99, tokens, sizes.heads, sizes.head_dim)
        integers = (np.array(self.lengths, np.int32), table_, offsets, np.array([count], np.int32))
        cache = (pages, *map(jnp.asarray, integers), None if lists is None else jnp.asarray(lists))
        # A selection's positions are read in all, and each cache once.
        visited = self.selected * size * count if self.selected else len(order) * size

        def step(x: Any, cache: Any) -> Any:
            *paged, selection = cache
            options: dict[str, Any] = {"shared_pages": common} if self.read_once else {"page_selection": selection}
            return decode.ragged_paged_attention(x, *paged, sm_scale=1 / math.sqrt(sizes.head_dim), **options)

        def wanted(token: int, head: int) -> np.ndarray:
            s = int(np.searchsorted(offsets, token, side="right")) - 1
            length, kv_head = self.lengths[s], head // group
            rows = pages[table_[s, : needed[s]]].reshape((length, 2 * sizes.kv_heads, sizes.head_dim))
            attends = np.arange(length) <= length - self.q_lens[s] + token - offsets[s]
            if lists is not None:
                attends &= np.isin(np.arange(length) // size, lists[s, kv_head])
            return _exact(query[token, head], rows[:, 2 * kv_head], rows[:, 2 * kv_head + 1], attends)

        samples = _samples(tokens, sizes.heads)
        cache_bytes = sizes.bytes_of(visited) * pages.dtype.itemsize // query.dtype.itemsize
        return Row(self.name, step, query, [cache], cache_bytes, wanted, samples)


# ---- Measuring


def error(row: Row, program: Program) -> float:
    """Largest error of the sampled rows of one call, by the largest number that they should hold."""
    out = program(row.query, row.caches[:1])
    if not isinstance(out, jax.Array):  # torch's [B, N, T, H]
        out = out.transpose(1, 2).float().cpu().numpy()
    out = out.reshape((-1, *out.shape[-2:]))
    got = np.stack([np.asarray(out[t, n].astype(np.float32)).astype(np.float64) for t, n in row.samples])
    want = np.stack([row.wanted(t, n) for t, n in row.samples])
    return float(np.abs(got - want).max() / np.abs(want).max())


def program(row: Row, calls: int) -> Program:
    """So many calls in one program; caches take turns."""

    def run(x: Any, caches: Any) -> Any:
        for i in range(calls):
            x = row.step(x, caches[i % len(caches)])
        return x

    return jax.jit(run) if isinstance(row.query, jax.Array) else run


def chained(row: Row, calls: int, run: Program) -> timing.Call:
    """What queues a program of so many calls, compiled and run once."""
    if not isinstance(row.query, jax.Array):
        return _captured(row, run)
    count = len(row.caches)

    def dispatch(number: int) -> Any:
        # The next program goes on where this one ends, so that few calls do not find their caches again in L2.
        return run(row.query, [row.caches[(number * calls + i) % count] for i in range(min(calls, count))])

    jax.block_until_ready(dispatch(0))
    return dispatch


def _captured(row: Row, run: Program) -> timing.Call:
    """The same of torch: a CUDA graph of the calls."""
    torch = need("torch")
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        run(row.query, row.caches)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run(row.query, row.caches)

    class Wait:
        def block_until_ready(self) -> Wait:
            torch.cuda.synchronize()
            return self

    def replay(_: int) -> Any:
        graph.replay()
        return Wait()

    return replay


def measure(
    contenders: Iterator[tuple[str, Callable[[], Row]]], rounds: int, sizes: Sizes, rate: float
) -> dict[str, dict[str, Any]]:
    """Records of contenders that are timed in turn: seconds of a call, or why there are none."""
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, timing.Call] = {}
    for name, make in contenders:
        records[name] = record = {}
        try:
            row = make()
            once = program(row, 1)
            record |= {"name": row.name, "cache_bytes": row.cache_bytes, "largest_error": error(row, once)}
            record["ok"] = bool(record["largest_error"] <= TOLERANCE[sizes.dtype])
            if not record["ok"]:  # the time of a wrong result means nothing
                record["refused"] = f"wrong, by {record['largest_error']:.1e}"
                continue
            calls = int(min(MOST_CHAINED, max(LEAST_CHAINED, SECONDS * rate / row.cache_bytes)))
            calls = 1 if sizes.shrink > 1 else min(calls, XLA_CHAINED) if name == "xla" else calls
            record["chained_calls"] = calls
            ready[name] = chained(row, calls, once if calls == 1 else program(row, calls))
        except Refused as reason:
            record["refused"] = str(reason)
        except Exception as problem:  # no memory, a shape that a peer does not take: a result
            if name.startswith(OURS):
                raise
            record["refused"] = first_line(problem)
    found = timing.interleaved(ready, rounds, queued=compat.default_platform() == "cuda")
    for name, one in found.items():
        record = records[name]
        record["seconds"] = one.of_one(record["chained_calls"]).median
        record["cache_bytes_per_second"] = record["cache_bytes"] / record["seconds"]
        record["share_of_copy"] = record["cache_bytes_per_second"] / rate
    return records


@dataclasses.dataclass(frozen=True)
class Goal:
    """What an H200 is to reach, of the seconds and shares of rows by their names."""

    text: str
    measured: Callable[[Mapping[str, dict[str, Any]]], float]
    bound: float
    at_least: bool = False

    def judge(self, rows: Mapping[str, dict[str, Any]]) -> str:
        try:
            value = self.measured(rows)
        except KeyError as missing:
            return f"open ({missing} was not measured)"
        met = (operator.ge if self.at_least else operator.le)(value, self.bound)
        return f"{'met' if met else 'missed'} ({value:.3g})"


def _seconds(name: str) -> Callable[[Mapping[str, dict[str, Any]]], float]:
    return lambda rows: 1e6 * rows[name]["seconds"]


def _ratio(name: str, other: str) -> Callable[[Mapping[str, dict[str, Any]]], float]:
    return lambda rows: rows[name]["seconds"] / rows[other]["seconds"]


def _share(name: str) -> Callable[[Mapping[str, dict[str, Any]]], float]:
    return lambda rows: rows[name]["share_of_copy"]


def _together(rows: Mapping[str, dict[str, Any]]) -> float:
    apart = rows["prefill alone"]["seconds"] + rows["decoding alone"]["seconds"]
    return apart / rows["prefill beside decoding"]["seconds"]


GOALS = (
    *(Goal(f"{name}: share of a copy's rate >= 0.88", _share(name), 0.88, True) for name in ("8 x 8k", "64 x 8k")),
    Goal("256 x 2k: share of a copy's rate >= 0.88", _share("256 x 2k"), 0.88, True),
    Goal("32 x 4k: us <= 145", _seconds("32 x 4k"), 145),
    Goal("1 x 32k: us <= 45", _seconds("1 x 32k"), 45),
    Goal("1 x 1k: us <= 8", _seconds("1 x 1k"), 8),
    Goal("8 x 8k, 4 queries over one <= 1.15", _ratio("8 x 8k, 4 queries", "8 x 8k"), 1.15),
    Goal("pages of 16 over contiguous <= 1.10", _ratio("64 x 8k, pages of 16", "64 x 8k"), 1.10),
    Goal("pages of 64 over contiguous <= 1.05", _ratio("64 x 8k, pages of 64", "64 x 8k"), 1.05),
    Goal("64 of 512 pages over all <= 0.20", _ratio("64 x 8k, 64 of 512 pages", "64 x 8k, pages of 16"), 0.20),
    Goal("float8 cache, bfloat16's time over its >= 1.7", _ratio("64 x 8k, pages of 64", "64 x 8k, float8"), 1.7, True),
    Goal("shared prefix, time apart over read once >= 4", _ratio("64 x 1k behind 8k", "the same, read once"), 4, True),
    Goal("prefill and decoding apart over together >= 0.9", _together, 0.9, True),
)


def goals(rows: Mapping[str, dict[str, Any]], device: str) -> dict[str, str]:
    """Verdicts, on an H200."""
    return {goal.text: goal.judge(rows) for goal in GOALS} if "H200" in device else {}


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def cases(sizes: Sizes, peers: Sequence[str]) -> Iterator[Iterator[tuple[str, Callable[[], Row]]]]:
    """Groups of contenders that are timed in turn; jax_bsk's are called so, or so and a colon and more."""
    for batch, length, queries in (
        (1, 1024, 1), (1, 32768, 1), (8, 8192, 1), (8, 8192, 4), (32, 4096, 1), (64, 8192, 1), (256, 2048, 1)
    ):  # fmt: skip
        found = Contiguous(sizes, sizes.batch(batch), sizes.length(length), queries).rows(peers)
        yield _with_pages(sizes, found) if (batch, length) == (64, 8192) else found
    yield _shared(sizes)
    length, chunk = sizes.length(8192), sizes.length(2048)
    decoding = sizes.batch(63)
    alone = ((1,) * decoding, (length,) * decoding), ((chunk,), (sizes.length(32768),))
    both = tuple(a + b for a, b in zip(*alone, strict=True))
    yield _ours(
        Paged(name, sizes, *lens, page_size=64)
        for name, lens in zip(
            ("prefill beside decoding", "decoding alone", "prefill alone"), (both, *alone), strict=True
        )
    )


def _shared(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Sequences that begin with the same pages."""
    batch, own, shared = sizes.batch(64), sizes.length(1024), sizes.length(8192)
    lens = (1,) * batch, (shared + own,) * batch
    name = f"{batch} x {_short(own)} behind {_short(shared)}"
    return _ours(
        Paged(name_, sizes, *lens, page_size=64, shared=shared, read_once=once)
        for name_, once in ((name, False), ("the same, read once", True))
    )


def _ours(calls: Any) -> Iterator[tuple[str, Callable[[], Row]]]:
    for call in calls:
        yield f"{OURS}: {call.name}", call.row


def _with_pages(
    sizes: Sizes, contiguous: Iterator[tuple[str, Callable[[], Row]]]
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The contiguous case, and the same sequences in pages."""
    yield from contiguous
    batch, length = sizes.batch(64), sizes.length(8192)
    name, lens = f"{batch} x {_short(length)}", ((1,) * batch, (length,) * batch)
    pages = length // 16
    calls = [Paged(f"{name}, pages of {size}", sizes, *lens, page_size=size) for size in (16, 64)]
    some = pages // 8
    calls.append(Paged(f"{name}, {some} of {pages} pages", sizes, *lens, page_size=16, selected=some))
    if compat.default_platform() == "cuda":  # elsewhere plain JAX, which no goal is for
        calls.append(Paged(f"{name}, float8", sizes, *lens, page_size=64, cache="float8_e4m3fn"))
    yield from _ours(calls)


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/decode.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all that import")
    parser.add_argument("--rounds", type=suite.positive, help=f"samples of each time, default {suite.ROUNDS}")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on a GPU")
    args = parser.parse_args(argv)
    suite.share_the_gpu()
    on_gpu = compat.default_platform() == "cuda"
    sizes = QUICK if args.quick else Sizes()
    rounds = args.rounds or (2 if args.quick else suite.ROUNDS)
    rate = timing.copy_rate((1 << 20) if args.quick else COPIED_BYTES, rounds)
    found = []
    for group in cases(sizes, args.peers):
        records = measure(group, rounds, sizes, rate)
        peers = {name: record for name, record in records.items() if not name.startswith(OURS)}
        for name, record in records.items():
            if name.startswith(OURS):
                found.append(record | {"peers": peers if name == OURS else {}})
                print(_line(found[-1]), file=sys.stderr, flush=True)
    rows = {record["name"]: record for record in found if "seconds" in record}
    ok = all(record["ok"] for record in found)
    device = environment.devices()[0]["name"]
    result = {
        "benchmark": "decoding",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "sizes": dataclasses.asdict(sizes),
        "copy_bytes_per_second": rate,
        "rounds": rounds,
        "ok": ok,
        "cases": found,
        "goals": goals(rows, device) if ok and not args.quick else {},
    }
    shape = f"{sizes.heads} query heads on {sizes.kv_heads} of {sizes.head_dim}"
    print(f"{device}, {sizes.dtype}, {shape}; copy {rate / 1e12:.3g} TB/s")
    print(table(("case", "us", "TB/s", "of copy", *PEERS, "check"), [_cells(record) for record in found]))
    for goal, verdict in result["goals"].items():
        print(f"{verdict}: {goal}")
    refused: dict[tuple[str, str], list[str]] = {}
    for record in found:
        for name, peer in record["peers"].items():
            if "refused" in peer:
                refused.setdefault((name, peer["refused"]), []).append(record["name"])
    for (name, reason), where in refused.items():
        print(f"{name}: {reason} ({', '.join(where)})")
    output = args.output
    if output is None and on_gpu and not args.quick:
        output = suite.results_path(RESULTS, "decode")
    if output is not None:
        report.write(result, output)
        print(f"Wrote {output}")
    return 0 if ok else 1


def _cells(record: dict[str, Any]) -> list[str]:
    if "seconds" not in record:
        return [record["name"], *["-"] * (3 + len(PEERS)), record["refused"]]
    numbers = [f"{1e6 * record['seconds']:.1f}", f"{record['cache_bytes_per_second'] / 1e12:.3f}"]
    peers = [record["peers"].get(name, {}).get("seconds") for name in PEERS]
    ratios = ["-" if seconds is None else f"{seconds / record['seconds']:.2f}x" for seconds in peers]
    return [record["name"], *numbers, f"{record['share_of_copy']:.3f}", *ratios, "ok"]


def _line(record: dict[str, Any]) -> str:
    return "  ".join(_cells(record))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
