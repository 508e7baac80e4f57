"""What the output must be: some rows of some heads in float64.

Whole outputs would take S^2 work on the host; a few rows cost nothing at any length and meet every block column. The
tolerance is made row by row from what the type costs: twice the error of the same row computed with probabilities and
output rounded to the type, and one rounding of the row's largest number.
"""

from __future__ import annotations

import math

import numpy as np

from jax_bsk.qa.benchmarking.attention.cases import Case, Pattern
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.spots import Spots, pick, whole_heads
from jax_bsk.qa.benchmarking.check import Reference, rounded, rounding_of

HEADS, ROWS = 3, 8
WHOLE = 1024  # tokens up to which every row of so many heads can be looked at
WHOLE_HEADS = 16  # their logits take 134 MB in float64


def choose_spots(case: Case, seed: int, *, whole: bool = False) -> Spots:
    """The first and last head and one between; first and last row of each, and others at random.

    Args:
      case: its sizes count.
      seed: seed of the draw.
      whole: whether all rows of short sequences are looked at, of all heads up to `WHOLE_HEADS`, and eight times as
        many rows of long ones.
    """
    rng = np.random.default_rng([seed, *case.shape])
    count = case.batch * case.heads
    if whole and case.length <= WHOLE:
        flat = np.sort(rng.choice(count, min(count, WHOLE_HEADS), replace=False))
        rows = np.tile(np.arange(case.length), (flat.size, 1))
    else:
        flat = np.array([0, count - 1, rng.integers(count)][:HEADS])
        rows = rng.integers(case.length, size=(HEADS, 8 * ROWS if whole else ROWS))
        rows[:, :2] = 0, case.length - 1
    return Spots(flat // case.heads, flat % case.heads, rows)


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
        of_type = (rounded(weights, self._dtype) @ self._value) / total
        error = np.abs(rounded(of_type, self._dtype) - out).max(-1)
        eps = rounding_of(self._dtype)
        return Reference(self._spots, out, 2 * error + eps * np.abs(out).max(-1))
