"""Attention alone: one case on one device and over all, by each split."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.qa.benchmarking.check import rounded, rounding_of

from . import measuring
from .cases import Case, Effort, Sizes
from .layouts import Layout, layouts

NAMES = ("out", "dquery", "dkey", "dvalue")
OPERANDS = {"forward": 3, "both": 4}
CHECKED_HEADS, CHECKED_ROWS = 2, 8


def measure(
    case: Case, splits: Sequence[str], devices: Sequence[Any], sizes: Sizes, effort: Effort
) -> list[dict[str, Any]]:
    """The rows of a case, one per split.

    Programs are compiled once. Outputs and gradients are compared before anything is timed; the times of all programs
    are taken in turn.
    """
    started = time.perf_counter()
    ways, refused = layouts(case, splits, devices, sizes)
    alone, count = devices[0], len(devices)
    shapes = [
        (case.batch, case.length, n, sizes.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.device_put(jax.random.normal(k, s, sizes.dtype), alone) for k, s in zip(keys, shapes, strict=True)]
    operands = {way.split: jax.device_put([way.dispatch(x) for x in arrays], way.sharding) for way in ways}
    programs = {}
    for way in ways:
        programs |= {
            (way.split, name): (f, operands[way.split][: OPERANDS[name]]) for name, f in _functions(way.mask, sizes)
        }
    compiled = measuring.compile_all(programs | _of_one(case, arrays, sizes), effort)
    # ---- one device: the whole problem, or what a device has of it
    share, free = 1, measuring.memory_of(alone, sizes)
    total = sum(x.nbytes for x in arrays)
    held = total * (1 + len(ways) / count)  # beside a program's own arguments and results
    if measuring.peak_bytes(compiled["one", "both"]) + held > free:
        share, axis = count, 0 if case.batch % count == 0 else 2
        if axis == 2 and case.kv_heads % count:
            raise ValueError(
                f"one device has no room for {case.name}, and {count} devices divide neither batch nor heads"
            )
        arrays = [jax.lax.slice_in_dim(x, 0, x.shape[axis] // count, axis=axis) for x in arrays]
        compiled |= measuring.compile_all(_of_one(case, arrays, sizes), effort)
        total //= count
    for key in list(compiled):
        if key[1] == "both" and measuring.peak_bytes(compiled[key]) > free:
            refused[" ".join(key)] = f"needs {measuring.peak_bytes(compiled.pop(key)) / 1e9:,.0f} GB"
    compiled_at = time.perf_counter()
    # ---- right, before it is fast
    calls: dict[Any, Callable[[], Any]] = {}
    for (split, name), program in compiled.items():
        given = (arrays if split == "one" else operands[split])[: OPERANDS[name]]
        calls[split, name] = lambda program=program, given=given: program(*given)
    last = "both" if ("one", "both") in calls else "forward"
    want = _results(calls["one", last]())
    rounding = rounding_of(np.dtype(sizes.dtype))
    exact = _check_rows(case, arrays, want[0])
    checks = {}
    for way in ways:
        name = last if (way.split, last) in calls else "forward"
        got = [way.undispatch(jax.device_put(x, alone)) for x in _results(calls[way.split, name]())]
        if share > 1:
            got = [jax.lax.slice_in_dim(x, 0, y.shape[axis], axis=axis) for x, y in zip(got, want, strict=False)]
        pairs = list(zip(NAMES, got, want, strict=False))
        checks[way.split] = {
            "bit_equal": {n: measuring.same_bits(a, b)[0] for n, a, b in pairs},
            "close": {n: measuring.judge(a, b, rounding) for n, a, b in pairs},
            "repeats": measuring.repeats(calls[way.split, name], effort, [n for n, _, _ in pairs]),
        }
        del got, pairs
    del want
    checked_at = time.perf_counter()
    # ---- in turn
    found = measuring.in_turn(calls, effort)
    spent = {
        "compiling": compiled_at - started,
        "checking": checked_at - compiled_at,
        "timing": time.perf_counter() - checked_at,
    }
    reference = {
        "what": "the same problem" if share == 1 else f"1/{count} of the {'batch' if axis == 0 else 'heads'}",
        "share": 1 / share,
        "peak_bytes": measuring.peak_bytes(compiled["one", last]),
        **{f"{name}_ms": found["one", name] for name in OPERANDS if ("one", name) in found},
    }
    common = {
        "part": "attention",
        "mask": case.name,
        "shape": [case.batch, case.heads, case.kv_heads, case.length, sizes.head_dim],
        "density": float(case.mask.density),
        "devices": count,
        "one": reference,
        "rows_against_float64": exact,
        "spent_seconds": {key: round(value, 2) for key, value in spent.items()},
    }
    rows = []
    for way in ways:
        row: dict[str, Any] = {**common, **way.facts(), **checks[way.split]}
        for name in OPERANDS:
            if (way.split, name) not in found:
                continue
            program = compiled[way.split, name]
            row[f"{name}_ms"] = found[way.split, name]
            if ("one", name) in found:
                row[f"{name}_efficiency"] = found["one", name] * share / count / found[way.split, name]
            row[f"{name}_collectives"] = measuring.collectives(program)
            row[f"{name}_program_bytes"] = measuring.collective_bytes(program.as_text(), count)
            row["peak_bytes"] = measuring.peak_bytes(program)
        row["ok"] = _is_right(row, way)
        rows.append(row)
    return rows + [{**common, "split": split, "refused": reason, "ok": True} for split, reason in refused.items()]


def _functions(mask: BlockMask, sizes: Sizes) -> list[tuple[str, Any]]:
    """The forward, and output and gradients of a cotangent; the mask is a constant of the program."""

    def forward(query: Any, key: Any, value: Any) -> Any:
        return sparse_attention(query, key, value, mask=mask, implementation=sizes.implementation)

    def both(query: Any, key: Any, value: Any, dout: Any) -> Any:
        out, pullback = jax.vjp(forward, query, key, value)
        return out, *pullback(dout)

    return [("forward", jax.jit(forward)), ("both", jax.jit(both))]


def _of_one(case: Case, arrays: Sequence[jax.Array], sizes: Sizes) -> dict[Any, Any]:
    return {("one", name): (f, arrays[: OPERANDS[name]]) for name, f in _functions(case.mask, sizes)}


def _results(found: Any) -> tuple[jax.Array, ...]:
    return found if isinstance(found, tuple) else (found,)


def _check_rows(case: Case, arrays: Sequence[jax.Array], out: jax.Array) -> dict[str, Any]:
    """Some rows of one device's output against float64: their largest error as a share of what rounding may do.

    That is twice the error of the row with probabilities and output rounded to the type, and one rounding of its
    largest number, as in the benchmark of attention.
    """
    batch, length, heads, size = out.shape
    rng, dtype = np.random.default_rng(0), np.dtype(out.dtype)
    worst = 0.0
    for _ in range(CHECKED_HEADS):
        b, head = int(rng.integers(batch)), int(rng.integers(heads))
        kv_head = head * case.kv_heads // case.heads
        rows = np.concatenate([[0, length - 1], rng.integers(length, size=CHECKED_ROWS - 2)])
        query, got = (_float64(x[b, rows, head]) for x in (arrays[0], out))
        key, value = (_float64(x[b, :, kv_head]) for x in arrays[1:3])
        allowed = np.stack([case.attends(int(row), np.arange(length)) for row in rows])
        logits = np.where(allowed, query @ key.T / math.sqrt(size), -np.inf)
        most = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(most), most, 0))  # a row may attend to nothing
        sums = np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        want = weights @ value / sums
        of_type = rounded(rounded(weights, dtype) @ value / sums, dtype)
        bound = 2 * np.abs(of_type - want).max(-1) + rounding_of(dtype) * np.abs(want).max(-1)
        error = np.abs(got - want).max(-1)
        worst = max(worst, float(np.where(error == 0, 0, error / np.maximum(bound, np.finfo(np.float64).tiny)).max()))
    return {"rows": CHECKED_HEADS * CHECKED_ROWS, "share_of_bound": worst, "ok": worst <= 1}


def _float64(x: jax.Array) -> np.ndarray:
    """On the host, from float32: numpy is slow with bfloat16."""
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def _is_right(row: dict[str, Any], way: Layout) -> bool:
    """Bit-equal and without a collective, or, of a sequence, within the rule; and the same bits again."""
    if not row["repeats"]["equal"] or not row["rows_against_float64"]["ok"]:
        return False
    if way.sequence:
        return all(one["ok"] for one in row["close"].values())
    sent = [row.get(f"{name}_collectives") for name in OPERANDS]
    return all(row["bit_equal"].values()) and not any(sent)
