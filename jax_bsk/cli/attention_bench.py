"""Measures `jax_bsk.sparse_attention` beside `jax.nn.dot_product_attention`: cases, peers, checks, numbers.

Used by `python -m jax_bsk bench`, which has the options and prints. `benchmarks/attention.py` has more peers.

Everything of one length and pass (forward, or forward and backward) is timed in one interleaved group. A peer that
takes the dense boolean mask does the same work whatever the mask holds, so it is sampled once a round, with the group's
masks in turn, and not once a mask: five masks take a third of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core import compat
from jax_bsk.masks import BlockMask, CausalMask, FullMask, LocalMask
from jax_bsk.qa.benchmarking.timing import MOST_REPEATS, interleaved
from jax_bsk.qa.support.progress import Progress

OURS = "jax_bsk"
PASSES = ("forward", "forward+backward")
# Products of the backward are five of the forward's two: S = QK^T, dP, dQ, dK, dV against QK^T, PV.
PASS_FLOPS = {"forward": 1.0, "forward+backward": 3.5}
RESULTS = ("out", "dquery", "dkey", "dvalue")

Attention = Callable[..., jax.Array]  # query, key, value, mask -> out


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of a call."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int

    def useful_flops(self, density: float, which: str) -> float:
        """Operations that the attended elements need: two products of 2 H operations each, 3.5 times with backward."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim * density
        return forward * PASS_FLOPS[which]


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask of a group; `native` are the arguments that make `jax.nn.dot_product_attention` apply it by itself."""

    pattern: str
    mask: BlockMask
    build_seconds: float
    native: dict[str, Any] | None

    @functools.cached_property
    def density(self) -> float:
        return self.mask.element_density


def random_blocks(count: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """Random blocks and the diagonal, bool [count, count], of that density on average (at least the diagonal's)."""
    diagonal = 1 / count
    chance = max(0.0, (density - diagonal) / (1 - diagonal)) if count > 1 else 1.0
    return (rng.uniform(size=(count, count)) < chance) | np.eye(count, dtype=bool)


def make_cases(
    work: Workload, patterns: Sequence[str], densities: Sequence[float], window: int, rng: np.random.Generator
) -> list[Case]:
    """The masks of one length; "random" gives one a density."""
    length, size = work.length, work.block_size

    count = -(-length // size)

    def random(density: float) -> BlockMask:
        blocks = random_blocks(count, density, rng)
        return BlockMask.from_block_mask(blocks, q_len=length, block_size=size)

    makers: list[tuple[str, Callable[[], BlockMask], dict[str, Any] | None]] = []
    for pattern in patterns:
        if pattern == "random":
            possible = dict.fromkeys(max(density, 1 / count) for density in densities)  # at least the diagonal
            makers += [("random", functools.partial(random, density), None) for density in possible]
        elif pattern == "causal":
            makers.append((pattern, lambda: CausalMask().bind(length, block_size=size), {"is_causal": True}))
        elif pattern == "window":
            native = {"is_causal": True, "local_window_size": (window, 0)}
            makers.append((f"window {window}", lambda: LocalMask((window, 0)).bind(length, block_size=size), native))
        elif pattern == "dense":
            makers.append((pattern, lambda: FullMask().bind(length, block_size=size), {}))
        else:
            raise ValueError(f"patterns are random, causal, window and dense, got {pattern!r}")
    cases = []
    for pattern, make, native in makers:
        start = time.perf_counter()
        mask = make().transpose()
        cases.append(Case(pattern, mask, time.perf_counter() - start, native))
    return cases


class Contender:
    """One implementation, compiled for one pass; remembers why it failed instead of stopping the others."""

    def __init__(self, attention: Attention, which: str):
        self._jitted = jax.jit(_forward(attention) if which == "forward" else _with_backward(attention))
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.temp_bytes: int | None = None
        self.failure: str | None = None

    def __call__(self, inputs: Sequence[jax.Array], mask: Any) -> Any:
        """The pass's results. Compiles on the first call with masks of new shapes."""
        args = (*inputs, mask)
        key = tuple(x.shape for x in jax.tree.leaves(mask))
        if key not in self._compiled:
            compiled = self._jitted.lower(*args).compile()
            self._compiled[key] = compiled
            analysis = compiled.memory_analysis()
            self.temp_bytes = None if analysis is None else int(analysis.temp_size_in_bytes)
        return self._compiled[key](*args)

    def attempt(self, inputs: Sequence[jax.Array], mask: Any) -> Any:
        """The same, or None and `failure` where it cannot: an unsupported shape or no memory is a result to report."""
        if self.failure is None:
            try:
                return jax.block_until_ready(self(inputs, mask))
            except Exception as error:
                lines = str(error).strip().splitlines()
                self.failure = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        return None


def _forward(attention: Attention):
    def run(query, key, value, dout, mask):
        del dout
        return (attention(query, key, value, mask),)

    return run


def _with_backward(attention: Attention):
    def run(query, key, value, dout, mask):
        out, pullback = jax.vjp(lambda *args: attention(*args, mask), query, key, value)
        return out, *pullback(dout)

    return run


def ours(implementation: str | None) -> Attention:
    """`sparse_attention`; the mask is a BlockMask."""

    def attention(query, key, value, mask):
        return sparse_attention(query, key, value, mask=mask, implementation=implementation)  # type: ignore[arg-type]

    return attention


def peer(implementation: str, native: dict[str, Any] | None = None) -> Attention:
    """`jax.nn.dot_product_attention`, with the dense boolean mask or, given `native`, with its own arguments for it."""

    def attention(query, key, value, mask):
        options = {"mask": mask} if native is None else native
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation, **options)  # type: ignore

    return attention


def _reference(inputs: Sequence[jax.Array], mask: jax.Array, which: str) -> tuple[jax.Array, ...]:
    """The pass in float32 at full precision, a key/value head at a time to hold few S^2 numbers in memory."""

    def split(x):  # [B, S, K * G, H] -> [B * K, 1, S, G, H]
        b, s, n, h = x.shape
        x = x.astype(jnp.float32).reshape(b, s, kv_heads, n // kv_heads, h)
        return jnp.moveaxis(x, 2, 1).reshape(b * kv_heads, 1, s, n // kv_heads, h)

    def join(x):
        _, _, s, g, h = x.shape
        return jnp.moveaxis(x.reshape(-1, kv_heads, s, g, h), 1, 2).reshape(-1, s, kv_heads * g, h)

    kv_heads = inputs[1].shape[2]
    run: Any
    run = _forward(peer("xla")) if which == "forward" else _with_backward(peer("xla"))
    with jax.default_matmul_precision("highest"):
        return tuple(map(join, jax.lax.map(lambda args: run(*args, mask), tuple(map(split, inputs)))))


@jax.jit
def _largest_difference(got: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    got, reference = got.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.max(jnp.abs(got - reference)), jnp.max(jnp.abs(reference))


@dataclasses.dataclass
class Check:
    """Largest absolute differences from the reference, result by result, and what they may be."""

    error: dict[str, float]
    scale: dict[str, float]
    tolerance: dict[str, float] | None = None

    @property
    def ok(self) -> bool:
        """Whether every difference is a number within the tolerance; NaN compares false."""
        return self.tolerance is None or all(self.error[name] <= self.tolerance[name] for name in self.error)

    @property
    def relative(self) -> float:
        """The largest difference as a share of the result's largest number; NaN if any is."""
        shares = [e / (self.scale[name] or 1.0) for name, e in self.error.items()]
        return math.nan if any(map(math.isnan, shares)) else max(shares)

    def to_json(self) -> dict[str, Any]:
        judged = self.tolerance is not None
        return {
            "error": self.error,
            "scale": self.scale,
            "tolerance": self.tolerance,
            "ok": self.ok if judged else None,
        }


def _check(results: Sequence[jax.Array], reference: Sequence[jax.Array]) -> Check:
    error, scale = {}, {}
    for name, got, expected in zip(RESULTS, results, reference, strict=False):
        difference, largest = _largest_difference(got, expected)
        error[name], scale[name] = float(difference), float(largest)
    return Check(error, scale)


def _tolerance(check: Check, peer_check: Check | None, dtype: str) -> dict[str, float]:
    """Twice the peer's own largest error (three times for gradients) and a term of roundings.

    The reference computes in float32. For 16-bit types that is exact by comparison, and the term is one rounding of the
    result; for float32 both sides round sums of thousands of terms, which scatters by tens of roundings.
    """
    rounding = float(jnp.finfo(dtype).eps) * (64 if dtype == "float32" else 1)
    if peer_check is None:
        rounding *= 4  # no peer ran to tell what the type costs
    return {
        name: (2 if name == "out" else 3) * (peer_check.error[name] if peer_check else 0.0) + rounding * scale
        for name, scale in check.scale.items()
    }


def steps(cases_per_length: int, lengths: int, passes: Sequence[str], repeats: int | None) -> int:
    """How many steps of progress `measure` reports over all lengths, at most."""
    return lengths * (cases_per_length + len(passes) * (repeats or MOST_REPEATS))


def measure(
    work: Workload,
    cases: Sequence[Case],
    *,
    implementation: str | None,
    passes: Sequence[str] = PASSES,
    repeats: int | None,
    seed: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Checks and times one group; yields one JSON-ready record a case and pass."""
    platform = compat.default_platform()
    on_gpu = platform != "cpu"
    inputs = _input_sets(work, seed)
    masks = [jax.device_put(case.mask) for case in cases]
    dense = [jnp.asarray(case.mask.to_dense()) for case in cases]

    shared = {"xla": None, "cudnn": None} if platform == "cuda" else {"xla": None}
    contenders: dict[str, dict[str, Contender]] = {}
    for which in passes:
        group = {OURS: Contender(ours(implementation), which)}
        group |= {name: Contender(peer(name), which) for name in shared}
        if platform == "cuda":
            for case in cases:
                if case.native is not None:
                    group[f"cudnn {case.pattern}"] = Contender(peer("cudnn", case.native), which)
        contenders[which] = group

    # Checks: every contender, mask and pass, which also compiles and warms up all of them.
    fullest = passes[-1]
    peer_is_reference = platform == "cpu" and work.dtype == "float32"  # it computes in float32 at full precision
    checks: dict[tuple[str, str, int], Check] = {}
    temp_bytes: dict[tuple[str, str, int], int | None] = {}
    for i, case in enumerate(cases):
        progress.step(f"checking length {work.length}, {case.pattern}, density {case.density:.3f}")
        reference = None
        if peer_is_reference:
            reference = contenders[fullest]["xla"].attempt(inputs[0], dense[i])
        if reference is None:
            reference = jax.jit(_reference, static_argnums=2)(inputs[0], dense[i], fullest)
        for which, group in contenders.items():
            for name, contender in group.items():
                if name.startswith("cudnn ") and name != f"cudnn {case.pattern}":
                    continue
                if name == "xla" and peer_is_reference and which == fullest:
                    results = reference if contender.failure is None else None
                else:
                    results = contender.attempt(inputs[0], masks[i] if name == OURS else dense[i])
                if results is not None:
                    checks[which, name, i] = _check(results, reference)
                    temp_bytes[which, name, i] = contender.temp_bytes
                del results
            mine = checks.get((which, OURS, i))
            if mine is not None:
                others = [checks[which, name, i] for name in shared if (which, name, i) in checks]
                sound = [other for other in others if not math.isnan(other.relative)]
                mine.tolerance = _tolerance(mine, sound[0] if sound else None, work.dtype)

    # Times.
    for which, group in contenders.items():

        def call(contender: Contender, masks: Sequence[Any]) -> Callable[[int], Any]:
            return lambda n: contender(inputs[n % len(inputs)], masks[n % len(masks)])

        calls = {}
        for name, contender in group.items():
            if contender.failure is not None:
                continue
            if name == OURS:
                calls |= {f"{OURS} {i}": call(contender, [mask]) for i, mask in enumerate(masks)}
            else:
                calls[name] = call(contender, dense)
        timings = interleaved(
            calls,
            repeats,
            queued=on_gpu,
            on_round=lambda n, which=which: progress.step(f"timing length {work.length}, {which}, round {n + 1}"),
        )
        for i, case in enumerate(cases):
            flops = work.useful_flops(case.density, which)
            records = {}
            for name, contender in group.items():
                if name.startswith("cudnn ") and name != f"cudnn {case.pattern}":
                    continue
                records["cudnn native" if name.startswith("cudnn ") else name] = _record(
                    contender.failure,
                    timings.get(f"{OURS} {i}" if name == OURS else name),
                    checks.get((which, name, i)),
                    temp_bytes.get((which, name, i)),
                    flops,
                )
            mine = records.pop(OURS)
            for record in records.values():
                if "seconds" in record and "seconds" in mine:
                    record["ratio"] = record["seconds"] / mine["seconds"]
            yield {
                **dataclasses.asdict(work),
                "pattern": case.pattern,
                "density": case.density,
                "block_density": case.mask.density,
                "mask_build_seconds": case.build_seconds,
                "pass": which,
                "useful_flops": flops,
                "reference": "the xla peer" if peer_is_reference else "float32 at full precision",
                OURS: mine,
                "peers": records,
                "ok": "failed" not in mine and mine["check"]["ok"],
            }


def _record(failure: str | None, timing: Any, check: Check | None, temp: int | None, flops: float) -> dict[str, Any]:
    if failure is not None or timing is None or check is None:
        return {"failed": failure or "it was not run"}
    return {
        **timing.to_json(),
        "useful_flops_per_second": flops / timing.median,
        "temp_bytes": temp,
        "check": check.to_json(),
        "largest_relative_error": check.relative,
    }


def _input_sets(work: Workload, seed: int) -> list[tuple[jax.Array, ...]]:
    """Sets of random query, key, value and dout; several of small ones, so that calls do not find theirs in a cache."""
    shapes = [
        (work.batch, work.length, n, work.head_dim) for n in (work.heads, work.kv_heads, work.kv_heads, work.heads)
    ]
    size = sum(map(math.prod, shapes)) * jnp.dtype(work.dtype).itemsize
    sets = min(4, -(-(256 << 20) // size))
    keys = jax.random.split(jax.random.key(seed), (sets, len(shapes)))
    dtype = jnp.dtype(work.dtype)
    return [tuple(jax.random.normal(k, shape, dtype) for k, shape in zip(row, shapes, strict=True)) for row in keys]
