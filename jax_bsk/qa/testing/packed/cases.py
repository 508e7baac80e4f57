"""Cases of packed attention as data: layouts of sequences, masks within them, named corners and random ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_bsk.masks import CausalMask, ChunkedMask, GlobalMask, LocalMask, Mask, MultiHeadMask, PrefixLMMask
from jax_bsk.qa.testing.judgement import NamedCase

Layout = Literal["cuts", "spread", "one", "empty", "aligned", "single"]
LAYOUTS: tuple[Layout, ...] = ("cuts", "spread", "one", "empty", "aligned", "single")


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One call of packed attention. `longest` bounds the lengths of sequences; `promised` says so in the call."""

    q_len: int = 256
    kv_len: int | None = None  # None: the keys are those of the queries' sequences
    sequences: int = 4
    layout: str = "cuts"
    longest: int = 256
    promised: bool = False
    within: str = "causal"
    size: int = 40  # of the mask within
    bottom_right: bool = False
    heads: int = 2
    kv_heads: int = 2
    head_size: int = 64
    value_size: int = 64
    dtype: str = "float32"
    block_size: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    amplitude: float = 1.0
    seed: int = 0

    kit = "packed"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of a case (NumPy), where its sequences begin, which pairs attend [1, N, T, S], and cotangents."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    sinks: np.ndarray | None
    q_numbers: np.ndarray
    kv_numbers: np.ndarray | None
    dense: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray

    @property
    def present(self) -> dict[str, np.ndarray]:
        """What has a gradient, by the gradient's name."""
        named = {"dq": self.query, "dk": self.key, "dv": self.value, "dsinks": self.sinks}
        return {name: x for name, x in named.items() if x is not None}


# ---- masks within sequences: the call's, and the same as booleans of positions

Dense = Callable[[np.ndarray, np.ndarray, int, int], Any]  # (query positions, key positions, head, size)
WITHIN: dict[str, tuple[Callable[[int, int], Mask | None], Dense]] = {
    "full": (lambda n, heads: None, lambda q, k, h, n: (q == q) & (k == k)),
    "causal": (lambda n, heads: CausalMask(), lambda q, k, h, n: q >= k),
    "window": (lambda n, heads: LocalMask((n, n // 3)), lambda q, k, h, n: (k >= q - n) & (k <= q + n // 3)),
    "causal window": (lambda n, heads: LocalMask((n, 0)), lambda q, k, h, n: (k >= q - n) & (k <= q)),
    "chunks": (
        lambda n, heads: ChunkedMask(n) & CausalMask(),
        lambda q, k, h, n: (q // n == k // n) & (q >= k),
    ),
    "prefix": (lambda n, heads: PrefixLMMask(n), lambda q, k, h, n: (k < n) | (q >= k)),
    "streaming": (
        lambda n, heads: CausalMask() & (LocalMask((n, 0)) | GlobalMask(4)),
        lambda q, k, h, n: (q >= k) & ((q - k <= n) | (k < 4) | ((q >= 0) & (q < 4))),
    ),
    "heads": (
        lambda n, heads: MultiHeadMask([CausalMask() if h % 2 else LocalMask((n, 0)) for h in range(heads)]),
        lambda q, k, h, n: (q >= k) & ((h % 2 == 1) | (q - k <= n)),
    ),
}


def within(case: Case) -> Mask | None:
    """The mask of the call."""
    return WITHIN[case.within][0](case.size, case.heads)


# ---- layouts


def _lengths(rng: np.random.Generator, case: Case, tokens: int) -> np.ndarray:
    """Lengths of the sequences, whose sum is at most `tokens`."""
    n, most = case.sequences, min(case.longest, tokens)
    if case.layout == "empty":
        return np.zeros(n, int)
    if case.layout == "single":
        lengths = (rng.random(n) < 0.8).astype(int)
    elif case.layout == "one":
        lengths = np.zeros(n, int)
        lengths[rng.integers(n)] = most
    elif case.layout == "aligned":
        lengths = 64 * rng.integers(0, most // 64 + 1, n)
    elif case.layout == "spread":  # log-uniform, some empty
        lengths = np.exp(rng.uniform(0, math.log(max(most, 2)), n)).astype(int) * (rng.random(n) < 0.85)
    else:
        lengths = np.diff(np.sort(np.concatenate([[0], rng.integers(0, tokens + 1, n - 1), [tokens]])))
    lengths = np.minimum(lengths, most)
    return np.diff(np.minimum(np.cumsum(np.concatenate([[0], lengths])), tokens))


def make_inputs(case: Case) -> Inputs:
    """Builds the arrays of a case; the same on every machine."""
    rng = np.random.default_rng([case.seed, 31])
    kv_len = case.q_len if case.kv_len is None else case.kv_len
    dtype = jnp.dtype(case.dtype)
    stats = np.dtype(np.float64 if case.dtype == "float64" else np.float32)

    def normal(*shape: int, amplitude: float = 1.0) -> np.ndarray:
        return (amplitude * rng.standard_normal(shape)).astype(dtype)

    query = normal(case.q_len, case.heads, case.head_size, amplitude=case.amplitude)
    key, value = (normal(kv_len, case.kv_heads, size) for size in (case.head_size, case.value_size))
    dout = normal(case.q_len, case.heads, case.value_size)
    dlse = rng.standard_normal((case.q_len, case.heads)).astype(stats)
    sinks = rng.standard_normal(case.heads).astype(stats) if case.sinks else None
    q_numbers, kv_numbers = (
        np.concatenate([[0], np.cumsum(_lengths(rng, case, tokens))]).astype(np.int32)
        for tokens in (case.q_len, kv_len)
    )
    if case.kv_len is None:
        kv_numbers = q_numbers
    dense = np.zeros((1, case.heads, case.q_len, kv_len), bool)
    attends = WITHIN[case.within][1]
    for n in range(case.sequences):
        (a, b), (c, d) = q_numbers[n : n + 2], kv_numbers[n : n + 2]
        ahead = (d - c) - (b - a) if case.bottom_right else 0
        q, k = np.arange(b - a)[:, None] + ahead, np.arange(d - c)[None]
        for head in range(case.heads):
            dense[0, head, a:b, c:d] = attends(q, k, head, case.size)
    return Inputs(query, key, value, sinks, q_numbers, None if case.kv_len is None else kv_numbers, dense, dout, dlse)


# ---- which cases there are

DRAWS = 4  # cases of one shape, see `redraw`


def random_case(seed: int, *, max_len: int = 600, dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> Case:
    """The case of a seed. Note that it depends on the options too: the command line uses the defaults."""
    rng = np.random.default_rng([seed, 30])

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    q_len = round(math.exp(rng.uniform(0, math.log(max_len))))
    kv_heads = pick(1, 1, 2, 3)
    head_size = pick(64, 96, 128, 256, 8, 40)
    longest = round(math.exp(rng.uniform(0, math.log(max_len))))
    return Case(
        name=f"seed-{seed}",
        q_len=q_len,
        kv_len=None if rng.random() < 0.5 else round(math.exp(rng.uniform(0, math.log(max_len)))),
        sequences=pick(1, 2, 3, 8, 40),
        layout=pick(*LAYOUTS),
        longest=longest,
        promised=rng.random() < 0.5,
        within=pick(*WITHIN),
        size=int(rng.integers(1, 150)),
        bottom_right=rng.random() < 0.5,
        heads=kv_heads * pick(1, 4) if kv_heads < 3 else 3,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=head_size if rng.random() < 0.7 else pick(32, 64, 128, 24),
        dtype=pick(*dtypes),
        block_size=pick(None, None, 64, 128),
        soft_cap=pick(None, None, 5.0, 30.0),
        sinks=rng.random() < 0.3,
        scale=pick(None, None, 0.5),
        amplitude=pick(1.0, 1.0, 4.0),
        seed=seed,
    )


def redraw(case: Case, draw: int) -> Case:
    """Another case that the same compiled program serves: other numbers, and another layout. Draw 0 is the case."""
    if draw == 0:
        return case
    rng = np.random.default_rng([case.seed, 31, draw])
    return dataclasses.replace(
        case,
        name=f"{case.name}.{draw}",
        layout=LAYOUTS[int(rng.integers(len(LAYOUTS)))],
        seed=int(rng.integers(2**31)),
    )


CORNER_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("one-token", q_len=1, sequences=1),
        Case("nothing", q_len=200, layout="empty", sinks=True),
        Case("single-tokens", q_len=90, kv_len=300, sequences=60, layout="single", within="full"),
        Case("gqa", q_len=500, sequences=9, layout="spread", heads=8, kv_heads=2, dtype="bfloat16", promised=True),
        Case("bottom-right", q_len=300, kv_len=420, sequences=7, bottom_right=True, sinks=True, soft_cap=20.0),
        Case("fewer-keys", q_len=420, kv_len=130, sequences=5, bottom_right=True, within="window"),
        Case("chunks", q_len=400, sequences=3, within="chunks", head_size=128, value_size=128, dtype="float16"),
        Case("streaming", q_len=380, sequences=4, within="streaming", block_size=64),
        Case("heads", q_len=260, kv_len=300, sequences=6, within="heads", heads=4),
        Case("short", q_len=512, sequences=64, layout="aligned", longest=64, promised=True, head_size=128),
    )
}
