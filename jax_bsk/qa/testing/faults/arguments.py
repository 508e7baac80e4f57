"""Arguments that do not fit: refused when the call is traced, by an error with the argument's name and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_bsk import UnsupportedError, sparse_attention
from jax_bsk.masks import CausalMask, FullMask
from jax_bsk.qa.testing.faults import checks
from jax_bsk.qa.testing.faults.scenario import Scenario, scenario

FAULT = "wrong dtype, rank, head size, GQA ratio"
EXPECTED = "ValueError or TypeError when traced, naming argument and remedy"
B, T, S, N, H = 2, 64, 96, 4, 16

# The arguments that differ from a good call's, the error, and what its message says: the argument, then what is wanted.
Mistake = tuple[dict[str, Any], type[Exception], str]


def _array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


DTYPE: dict[str, Mistake] = {
    "integer query": ({"query": _array(B, T, N, H, dtype=np.int32)}, TypeError, r"query.*floating-point.*cast"),
    "complex query": ({"query": _array(B, T, N, H, dtype=np.complex64)}, TypeError, r"query.*floating-point.*cast"),
    "boolean value": ({"value": _array(B, S, N, H, dtype=bool)}, TypeError, r"value.*floating-point.*cast"),
    "key of another type": ({"key": _array(B, S, N, H, dtype=np.float16)}, TypeError, r"key.*query's type.*cast"),
    "value of another type": ({"value": _array(B, S, N, H, dtype=np.float16)}, TypeError, r"value.*query's type.*cast"),
    "numbers as a mask": ({"mask": _array(T, S)}, TypeError, r"mask.*boolean.*as bias"),
    "integer gates": (
        {"gates": _array(1, 1, 1, dtype=int), "mask": FullMask().bind(T, S)},
        TypeError,
        r"gates.*floating-point.*cast",
    ),
    "lengths that are no integers": (
        {"key_value_seq_lengths": _array(B)},
        TypeError,
        r"key_value_seq_lengths.*integers",
    ),
}
RANK: dict[str, Mistake] = {
    "query TH": ({"query": _array(T, H)}, ValueError, r"query is BTNH"),
    "query TNH with the others BSKH": ({"query": _array(T, N, H)}, ValueError, r"query is BTNH.*all three"),
    "key SKH with the others B...": ({"key": _array(S, N, H)}, ValueError, r"key and value BSKH"),
    "value of rank 5": ({"value": _array(1, B, S, N, H)}, ValueError, r"value BSKH"),
    "mask of rank 5": ({"mask": _array(1, B, N, T, S, dtype=bool)}, ValueError, r"mask broadcasts to"),
    "lengths of rank 2": (
        {"query_seq_lengths": _array(B, 1, dtype=int)},
        ValueError,
        r"query_seq_lengths.*shape \(2,\)",
    ),
}
HEAD_SIZE: dict[str, Mistake] = {
    "key's is another": ({"key": _array(B, S, N, 8)}, ValueError, r"key has query's head size 16, got 8"),
}
HEAD_SIZE_NATIVE: dict[str, Mistake] = {
    "too large": (
        {"query": _array(B, T, N, 264), "key": _array(B, S, N, 264)},
        UnsupportedError,
        r"query's head size is at most 256, got 264",
    ),
    "value's too large": ({"value": _array(B, S, N, 264)}, UnsupportedError, r"value's head size is at most 256"),
}
HEAD_SIZE_CUDA: dict[str, Mistake] = {
    "not a multiple": (
        {"query": _array(B, T, N, 12), "key": _array(B, S, N, 12)},
        UnsupportedError,
        r"query's head size is a multiple of 8, got 12; pad it",
    ),
}
HEADS: dict[str, Mistake] = {
    "no multiple": ({"key": _array(B, S, 3, H), "value": _array(B, S, 3, H)}, ValueError, r"query's heads.*key's"),
    "no key heads": ({"key": _array(B, S, 0, H), "value": _array(B, S, 0, H)}, ValueError, r"query's heads.*key's"),
    "key's and value's differ": ({"value": _array(B, S, 2, H)}, ValueError, r"key and value.*heads"),
    "mask of key heads": (
        {"mask": _array(2, T, S, dtype=bool), "key": _array(B, S, 2, H), "value": _array(B, S, 2, H)},
        ValueError,
        r"mask broadcasts to BNTS",
    ),
    "sinks of key heads": ({"sinks": _array(2)}, ValueError, r"sinks.*query head.*\(4,\)"),
}
SHAPES: dict[str, Mistake] = {
    "batch": ({"key": _array(1, S, N, H), "value": _array(1, S, N, H)}, ValueError, r"key has query's batch size 2"),
    "value's batch": ({"value": _array(3, S, N, H)}, ValueError, r"value has query's batch size 2"),
    "key/value length": ({"value": _array(B, S + 1, N, H)}, ValueError, r"key and value have the same length"),
    "mask": ({"mask": _array(T, S + 1, dtype=bool)}, ValueError, r"mask broadcasts to"),
    "BlockMask": ({"mask": CausalMask().bind(T, T)}, ValueError, r"mask is a BlockMask.*bind the mask"),
    "lengths": ({"key_value_seq_lengths": _array(3, dtype=int)}, ValueError, r"key_value_seq_lengths.*shape \(2,\)"),
    "bias": ({"bias": _array(T, S + 1)}, ValueError, r"bias broadcasts to"),
    "gates without a BlockMask": (
        {"gates": _array(B, N, 4), "is_causal": True},
        ValueError,
        r"gates.*pass a BlockMask",
    ),
    "gates": (
        {"gates": _array(B, N + 1, 2), "mask": FullMask().bind(T, S)},
        ValueError,
        r"gates.*\(2, 4, 1\).*kv_blocks",
    ),
    "gates of another capacity": (
        {"gates": _array(1, 1, 2), "mask": FullMask().bind(T, S)},
        ValueError,
        r"gates.*got shape \(1, 1, 2\).*capacity is mask.kv_blocks.shape\[-1\]",
    ),
}


def _check(mistakes: Mapping[str, Mistake], implementation: Any) -> None:
    for what, (changes, error, words) in mistakes.items():
        good = {"query": _array(B, T, N, H), "key": _array(B, S, N, H), "value": _array(B, S, N, H)}
        operands = [changes.get(name, x) for name, x in good.items()]
        options = {name: x for name, x in changes.items() if name not in good}
        call = functools.partial(sparse_attention, implementation=implementation, **options)
        # Traced alone, nothing can have run; called, the error must be the same.
        for how, attend in (("traced", functools.partial(jax.eval_shape, call)), ("called", call)):
            checks.check_raises(f"{what}, {how}", functools.partial(attend, *operands), error, words)


def _mistakes(name: str, fault: str, mistakes: Mapping[str, Mistake]) -> Scenario:
    return scenario(name, fault, EXPECTED)(functools.partial(_check, mistakes))


@scenario("wrong-dtype", FAULT, EXPECTED)
def wrong_dtype(implementation: str) -> None:
    _check(DTYPE, implementation)
    if implementation == "cuda":
        with jax.enable_x64(True):
            doubles = {n: _array(B, m, N, H, dtype=np.float64) for n, m in (("query", T), ("key", S), ("value", S))}
            _check({"float64": (doubles, UnsupportedError, r"float64; cast the inputs")}, implementation)


@scenario("wrong-head-size", FAULT, EXPECTED + " (UnsupportedError for what one implementation cannot take)")
def wrong_head_size(implementation: str) -> None:
    native = HEAD_SIZE_NATIVE if implementation != "xla" else {}
    _check(HEAD_SIZE | native | (HEAD_SIZE_CUDA if implementation == "cuda" else {}), implementation)


SCENARIOS = (
    wrong_dtype,
    _mistakes("wrong-rank", FAULT, RANK),
    wrong_head_size,
    _mistakes("wrong-gqa-ratio", FAULT, HEADS),
    _mistakes("mismatched-shapes", FAULT, SHAPES),
)
