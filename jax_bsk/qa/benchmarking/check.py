"""The check before any timing: some rows of some heads against float64, and every element finite.

Whole outputs would take S^2 work on the host; a few rows cost nothing at any length and meet every block column. The
tolerance is made row by row from what the type costs: twice the error of the same row computed with probabilities and
output rounded to the type, and one rounding of the row's largest number (64 in float32, where sums of thousands of
terms scatter by tens of roundings).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.benchmarking.cases import Case, Pattern
from jax_bsk.qa.benchmarking.inputs import Inputs

HEADS, ROWS = 3, 8


@dataclasses.dataclass(frozen=True)
class Spots:
    """Where to look.

    Attributes:
      examples, heads: int [n].
      rows: int [n, r].
    """

    examples: np.ndarray
    heads: np.ndarray
    rows: np.ndarray

    def of_kv(self, group: int) -> Spots:
        """The same positions of the key/value heads that those query heads share, so many a head."""
        return dataclasses.replace(self, heads=self.heads // group)


def rounding_of(dtype: np.dtype) -> float:
    """What one result may be off by for its rounding alone, as a share of it."""
    return float(jnp.finfo(dtype).eps) * (64 if dtype == np.float32 else 1)


def choose_spots(case: Case, seed: int) -> Spots:
    """The first and last head and one between; first and last row of each, and others at random."""
    rng = np.random.default_rng([seed, *case.shape])
    flat = np.array([0, case.batch * case.heads - 1, rng.integers(case.batch * case.heads)][:HEADS])
    rows = rng.integers(case.length, size=(HEADS, ROWS))
    rows[:, :2] = 0, case.length - 1
    return Spots(flat // case.heads, flat % case.heads, rows)


@jax.jit
def _pick(x: jax.Array, examples: Any, heads: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    return x[examples[:, None], rows, heads[:, None]], jnp.isfinite(x).all()


@jax.jit
def whole_heads(x: jax.Array, examples: Any, heads: Any) -> jax.Array:
    """Those heads of [B, S, H, D], as [n, S, D]."""
    return x[examples, :, heads]


def pick(x: jax.Array, spots: Spots) -> tuple[np.ndarray, bool]:
    """The spots' rows of [B, S, H, D] as float64 [n, r, D], and whether all of x is finite."""
    rows, finite = _pick(x, spots.examples, spots.heads, spots.rows)
    return np.asarray(rows).astype(np.float64), bool(finite)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one result must be at some spots.

    Attributes:
      spots: where.
      rows: float64 [n, r, D].
      tolerance: [n, r].
    """

    spots: Spots
    rows: np.ndarray
    tolerance: np.ndarray

    def check(self, rows: np.ndarray, finite: bool) -> dict[str, Any]:
        """The largest error, as a share of what is allowed and by itself; NaN anywhere fails."""
        return verdict(rows, self.rows, self.tolerance, finite)


def verdict(rows: np.ndarray, reference: np.ndarray, tolerance: np.ndarray, finite: bool) -> dict[str, Any]:
    """The largest error of rows, as a share of each row's tolerance and by itself; NaN anywhere fails.

    Args:
      rows, reference: float64 [..., D].
      tolerance: [...]; where it is 0, as of rows of zeros, only an equal row is right.
      finite: whether all of the result is, rows that are not looked at included.
    """
    error = np.abs(rows - reference).max(-1)
    with np.errstate(over="ignore"):
        share = float(np.max(error / np.maximum(tolerance, np.finfo(np.float64).tiny)))
    ok = finite and share <= 1  # NaN compares false
    largest = float(np.max(error))
    return {
        "ok": bool(ok),
        "finite": finite,
        "largest_error": largest if math.isfinite(largest) else None,
        "share_of_tolerance": share if math.isfinite(share) else None,
    }


def together(checks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The checks of several results as one, the worst of each part; a single one stays as it is."""
    if len(checks) == 1:
        return next(iter(checks.values()))

    def worst(part: str) -> float | None:
        values = [check[part] for check in checks.values()]
        return None if None in values else max(values)

    return {
        "ok": all(check["ok"] for check in checks.values()),
        "finite": all(check["finite"] for check in checks.values()),
        "largest_error": worst("largest_error"),
        "share_of_tolerance": worst("share_of_tolerance"),
        "results": checks,
    }


class References:
    """References of the output of one case, one a pattern (a peer may be measured without the mask)."""

    def __init__(self, case: Case, inputs: Inputs, spots: Spots):
        self._length, self._spots = case.length, spots
        query, key, value = inputs.arrays
        kv = spots.of_kv(case.group)
        self._dtype = np.dtype(query.dtype)  # bfloat16 too: JAX's is numpy's
        self._query = pick(query, spots)[0]
        self._key, self._value = (
            np.asarray(whole_heads(x, kv.examples, kv.heads)).astype(np.float64) for x in (key, value)
        )
        self._made: dict[int, Reference] = {}

    def of(self, pattern: Pattern) -> Reference:
        if id(pattern) not in self._made:
            self._made[id(pattern)] = self._make(pattern)
        return self._made[id(pattern)]

    def _make(self, pattern: Pattern) -> Reference:
        allowed = pattern.attends(self._spots.rows[..., None], np.arange(self._length), self._length)
        logits = self._query @ self._key.swapaxes(1, 2) / math.sqrt(self._query.shape[-1])
        logits = np.where(allowed, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        out = weights @ self._value / total
        rounded = (self._round(weights) @ self._value) / total
        error = np.abs(self._round(rounded) - out).max(-1)
        eps = rounding_of(self._dtype)
        return Reference(self._spots, out, 2 * error + eps * np.abs(out).max(-1))

    def _round(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(self._dtype).astype(np.float64)
