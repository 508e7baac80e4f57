"""Decoding: integers of a serving batch that nobody checked, what lies in pages that nobody owns, and the custom call.

A sequence whose length or pages make no sense yields NaN, and the others have the bits of a call without the fault.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import decode
from jax_bsk.core.version import __version__
from jax_bsk.decode import ffi
from jax_bsk.qa.testing.faults import boundary, calls, checks
from jax_bsk.qa.testing.faults.boundary import Changes
from jax_bsk.qa.testing.faults.direct import DirectCall, shape
from jax_bsk.qa.testing.faults.scenario import NATIVE, Scenario, scenario

FAULT = "lengths, pages and offsets of a serving batch that make no sense"
LARGEST, SMALLEST = 2**31 - 1, -(2**31)
HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 16, 16
Q_LENS, KV_LENS, SEQS, MAX_PAGES, PADDING = (1, 30, 2), (100, 90, 17), 4, 8, 3
TOKENS, PAGES = sum(Q_LENS) + PADDING, 18


@dataclasses.dataclass(frozen=True)
class Batch:
    """Three sequences, of a table with room for four, in the first pages but two of a cache.

    Attributes:
      query: [T, N, H].
      pages: [P, Z, 2 K, H].
      kv_lens, table, offsets, count: int32 [Q], [Q, M], [Q + 1], [1].
    """

    query: np.ndarray
    pages: np.ndarray
    kv_lens: np.ndarray
    table: np.ndarray
    offsets: np.ndarray
    count: np.ndarray

    @classmethod
    def sound(cls, dtype: str) -> Batch:
        rng = np.random.default_rng(0)

        def normal(*sizes: int) -> np.ndarray:
            return rng.standard_normal(sizes).astype(jnp.dtype(dtype))

        table, first = np.zeros((SEQS, MAX_PAGES), np.int32), 0
        order = rng.permutation(PAGES - 2).astype(np.int32)
        for s, length in enumerate(KV_LENS):
            used = -(-length // PAGE)
            table[s, :used] = order[first : first + used]
            first += used
        offsets = np.cumsum([0, *Q_LENS, 0]).astype(np.int32)
        lens = np.array([*KV_LENS, 0], np.int32)
        pages = normal(PAGES, PAGE, 2 * KV_HEADS, HEAD_SIZE)
        return cls(normal(TOKENS, HEADS, HEAD_SIZE), pages, lens, table, offsets, np.array([len(KV_LENS)], np.int32))

    def attend(self, implementation: str) -> dict[str, np.ndarray]:
        """out [T, N, H] and lse [T, N]."""
        arrays = [jnp.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {name: np.asarray(x) for name, x in zip(("out", "lse"), _program(implementation)(*arrays), strict=True)}

    def changed(self, name: str, at: Any, value: Any) -> Batch:
        array = getattr(self, name).copy()
        array[at] = value
        return dataclasses.replace(self, **{name: array})


@functools.cache
def _program(implementation: Any) -> Callable[..., Any]:
    def call(*arrays: jax.Array) -> Any:
        return decode.ragged_paged_attention(
            *arrays, sm_scale=0.25, keys_per_part=64, implementation=implementation, return_residual=True
        )

    return jax.jit(call)


def _tokens(*sequences: int) -> np.ndarray:
    """Which tokens the sequences have: bool [T]."""
    owners = np.repeat([*range(len(Q_LENS)), -1], [*Q_LENS, PADDING])
    return np.isin(owners, sequences)


def _check(what: str, right: dict[str, np.ndarray], got: dict[str, np.ndarray], poisoned: np.ndarray) -> None:
    for name, values in got.items():
        if poisoned.any():
            checks.check_nan(f"{name}, {what}", values[poisoned].astype(np.float32))
        others = ~poisoned
        checks.check_equal(f"{name} of other tokens, {what}", values[others], right[name][others].astype(np.float64))


def _poisons(name: str, expected: str, faults: Mapping[str, tuple[str, Any, Any, np.ndarray]]) -> Scenario:
    @scenario(name, FAULT, expected, may_crash=True)
    def run(implementation: str) -> None:
        for dtype in calls.dtypes(implementation):
            sound = Batch.sound(dtype)
            right = sound.attend(implementation)
            checks.check_finite("out without a fault", right["out"].astype(np.float32))
            for what, (array, at, value, poisoned) in faults.items():
                got = sound.changed(array, at, value).attend(implementation)
                _check(f"{what} ({dtype})", right, got, poisoned)

    return run


_EVERY = np.ones(TOKENS, bool)
bad_lengths = _poisons(
    "bad-lengths-of-a-sequence",
    "the sequence's tokens are NaN, all others have the same bits",
    {
        f"length {value} of sequence {s}": ("kv_lens", s, value, _tokens(s))
        for s in range(len(KV_LENS))
        for value in (-1, SMALLEST, MAX_PAGES * PAGE + 1, LARGEST)
    },
)
bad_pages = _poisons(
    "bad-pages-of-a-sequence",
    "tokens that would read the page are NaN, all others have the same bits",
    {
        f"page {value} at {m} of sequence {s}": ("table", (s, m), value, _tokens(s))
        for s, m in ((0, 0), (0, 6), (1, 3), (2, 0))  # pages that all tokens of the sequence attend to
        for value in (-1, SMALLEST, PAGES, LARGEST)
    }
    | {f"page {value} past the length": ("table", (2, 2), value, ~_EVERY) for value in (-1, SMALLEST, PAGES, LARGEST)},
)
bad_offsets = _poisons(
    "bad-offsets-of-a-batch",
    "all tokens are NaN; what stands past the last sequence is not read",
    {
        "an offset below 0": ("offsets", 0, -1, _EVERY),
        "offsets that decrease": ("offsets", 2, 0, _EVERY),
        "an offset past the tokens": ("offsets", 3, TOKENS + 1, _EVERY),
        "the largest offset": ("offsets", 3, LARGEST, _EVERY),
        "the smallest offset": ("offsets", 1, SMALLEST, _EVERY),
        "an offset past the last sequence": ("offsets", 4, SMALLEST, ~_EVERY),
        "a length past the last sequence": ("kv_lens", 3, LARGEST, ~_EVERY),
        "too many sequences": ("count", 0, SEQS + 1, _EVERY),
        "a negative number of sequences": ("count", 0, -1, _EVERY),
        "the largest number of sequences": ("count", 0, LARGEST, _EVERY),
    },
)


@scenario(
    "nan-in-freed-pages",
    "NaN and infinities in pages that nobody owns, and past the lengths",
    "the bits are the same: what no query attends to reaches nobody",
)
def nan_in_freed_pages(implementation: str) -> None:
    for dtype in calls.dtypes(implementation):
        sound = Batch.sound(dtype)
        right = sound.attend(implementation)
        owned = np.zeros(sound.pages.shape[:2], bool)
        for s, length in enumerate(KV_LENS):
            positions = np.arange(length)
            owned[sound.table[s, positions // PAGE], positions % PAGE] = True
        assert not owned.all()
        for value in (np.nan, np.inf, -np.inf):
            got = sound.changed("pages", ~owned, value).attend(implementation)
            _check(f"{value} in freed pages ({dtype})", right, got, ~_EVERY)


# ---- The custom call, past every Python check

_T, _P, _M, _Q = 6, 5, 3, 2
_LENGTHS, _OFFSETS = (40, 20), (0, 2, 6)
_ATTRIBUTES = ffi.DecodeAttributes(scale=0.25, short_part=64, long_part=64)


def _call(implementation: str) -> DirectCall:
    """The call of ones."""
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    operands = {
        "query": ones((_T, HEADS, HEAD_SIZE)),
        "key": ones((_P, PAGE, KV_HEADS, HEAD_SIZE)),
        "value": ones((_P, PAGE, KV_HEADS, HEAD_SIZE)),
        "kv_lens": jnp.array(_LENGTHS, jnp.int32),
        "page_indices": jnp.array([[4, 0, 2], [1, 3, -7]], jnp.int32),
        "cu_q_lens": jnp.array(_OFFSETS, jnp.int32),
        "num_seqs": jnp.array([_Q], jnp.int32),
        "selection": jnp.asarray(ffi.no_selection(KV_HEADS)),
        "tree": jnp.asarray(ffi.no_tree()),
        "sinks": jnp.asarray(ffi.no_sinks()),
    }
    results = {"out": shape("float32", _T, HEADS, HEAD_SIZE), "lse": shape("float32", _T, HEADS)}
    if implementation == "cuda":
        words = ffi.forward_workspace(list(operands.values()), _ATTRIBUTES) // 4
        results["workspace"] = shape("int32", words)
    return DirectCall(ffi.DECODE_FORWARD, operands, results, {**_ATTRIBUTES.encode(), "version": __version__})


def _check_unchanged(implementation: str) -> None:
    found = _call(implementation)()
    attended = [
        length - (last - first) + 1 + t
        for length, first, last in zip(_LENGTHS, _OFFSETS[:-1], _OFFSETS[1:], strict=True)
        for t in range(last - first)
    ]
    lse = np.log(np.array(attended, np.float64)) + HEAD_SIZE * _ATTRIBUTES.scale
    checks.check_close("out of the direct call", found["out"], np.ones((_T, HEADS, HEAD_SIZE)))
    checks.check_close("lse of the direct call", found["lse"], np.repeat(lse[:, None], HEADS, 1))


OPERANDS: Changes = {
    "query type": {"query": shape("bfloat16", _T, HEADS, HEAD_SIZE)},
    "query head size": {"query": shape("float32", _T, HEADS, HEAD_SIZE + 8)},
    "query heads": {"query": shape("float32", _T, HEADS - 1, HEAD_SIZE)},
    "query rank": {"query": shape("float32", HEADS, HEAD_SIZE)},
    "key pages": {"key": shape("float32", _P - 1, PAGE, KV_HEADS, HEAD_SIZE)},
    "key page size": {"key": shape("float32", _P, PAGE + 1, KV_HEADS, HEAD_SIZE)},
    "pages of no position": {
        "key": shape("float32", _P, 0, KV_HEADS, HEAD_SIZE),
        "value": shape("float32", _P, 0, KV_HEADS, HEAD_SIZE),
    },
    "value heads": {"value": shape("float32", _P, PAGE, KV_HEADS + 1, HEAD_SIZE)},
    "value head size": {"value": shape("float32", _P, PAGE, KV_HEADS, HEAD_SIZE + 8)},
    "value type": {"value": shape("bfloat16", _P, PAGE, KV_HEADS, HEAD_SIZE)},
    "an odd number of heads of both": {
        "key": shape("float32", _P, PAGE, 2 * KV_HEADS - 1, HEAD_SIZE),
        "value": shape("float32", 1, 1, KV_HEADS, 0),
    },
    "lengths": {"kv_lens": shape("int32", _Q + 1)},
    "lengths type": {"kv_lens": shape("float32", _Q)},
    "table rows": {"page_indices": shape("int32", _Q + 1, _M)},
    "table rank": {"page_indices": shape("int32", _Q)},
    "table type": {"page_indices": shape("uint32", _Q, _M)},
    "offsets": {"cu_q_lens": shape("int32", _Q)},
    "offsets type": {"cu_q_lens": shape("float32", _Q + 1)},
    "two numbers of sequences": {"num_seqs": shape("int32", 2)},
    "type of the number of sequences": {"num_seqs": shape("float32", 1)},
    "selection heads": {"selection": shape("int32", _Q, KV_HEADS + 1, 2)},
    "selection type": {"selection": shape("float32", _Q, KV_HEADS, 2)},
    "selection rank": {"selection": shape("int32", KV_HEADS, 2)},
    "tree words": {"tree": shape("uint32", _T, 3)},
    "tree tokens": {"tree": shape("uint32", _T - 1, 2)},
    "tree type": {"tree": shape("int32", _T, 2)},
    "sinks": {"sinks": shape("float32", HEADS - 1)},
    "sinks type": {"sinks": shape("bfloat16", HEADS)},
    "an operand less": {"kv_lens": None},
}
RESULTS: Changes = {
    "out shape": {"out": shape("float32", _T, HEADS, HEAD_SIZE - 8)},
    "out tokens": {"out": shape("float32", _T - 1, HEADS, HEAD_SIZE)},
    "out type": {"out": shape("bfloat16", _T, HEADS, HEAD_SIZE)},
    "lse shape": {"lse": shape("float32", HEADS, _T)},
    "lse type": {"lse": shape("bfloat16", _T, HEADS)},
    "no lse": {"lse": None},
}
ATTRIBUTES: Changes = {
    **{
        f"{name} of {size} keys": {name: np.int64(size)}
        for name in ("short_part", "long_part")
        for size in (0, -64, 96)
    },
    "a part of 32 bits": {"short_part": np.int32(64)},
    "a negative window": {"window": np.int64(-1)},
    "negative sink tokens": {"sink_tokens": np.int64(-1)},
    "scale of 32 bits": {"scale": np.float32(0.25)},
    "no causal": {"causal": None},
    "another version": {"version": "0.0.0"},
}


@scenario(
    "wrong-call-of-decoding",
    "wrong operand, result or attribute of decoding at the native boundary",
    boundary.EXPECTED,
    platforms=NATIVE,
    may_crash=True,
)
def wrong_call(implementation: str) -> None:
    for faults in (OPERANDS, RESULTS, ATTRIBUTES):
        boundary.check_refused(_call(implementation), faults)
    _check_unchanged(implementation)


@scenario("wrong-workspace-of-decoding", boundary.FAULT, boundary.EXPECTED, platforms=("cuda",), may_crash=True)
def wrong_workspace(implementation: str) -> None:
    """The kernels write partial results there without looking, and parts say how many there are."""
    call = _call(implementation)
    (words,) = call.results["workspace"].shape
    sizes = {"empty": 0, "a word short": words - 1, "a word long": words + 1}
    faults: dict[str, Mapping[str, Any]] = {what: {"workspace": shape("int32", n)} for what, n in sizes.items()}
    faults |= {"missing": {"workspace": None}, "type": {"workspace": shape("float32", words)}}
    # A table with more pages has more parts.
    longer = {"page_indices": shape("int32", _Q, 40 * math.ceil(64 / PAGE)), "kv_lens": shape("int32", _Q)}
    boundary.check_refused(call, {**faults, "that of a shorter table": longer})
    _check_unchanged(implementation)


SCENARIOS = (bad_lengths, bad_pages, bad_offsets, nan_in_freed_pages, wrong_call, wrong_workspace)
