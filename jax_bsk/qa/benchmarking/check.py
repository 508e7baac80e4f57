"""The check before any timing: some numbers of every result against float64, and every number finite.

Whole results would take minutes on the host at the sizes that are timed. Which numbers are looked at, and what rounding
may do to them, is the operation's; the rule is the same: a row may be off by its own tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def rounding_of(dtype: np.dtype) -> float:
    """What one result may be off by for its rounding alone, as a share of it.

    In float32 sums of thousands of terms scatter by tens of roundings, in 16-bit types one rounding hides that.
    """
    return float(jnp.finfo(dtype).eps) * (64 if dtype == np.float32 else 1)


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 numbers as a type holds them (bfloat16 too: JAX's is numpy's)."""
    return x.astype(np.float32).astype(dtype).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one result must be at some spots.

    Attributes:
      spots: where to look, as `Contender.pick` takes it.
      values: float64 [..., n].
      tolerance: [...], of each row.
      wanted: bool [..., n], where a result counts; None for everywhere.
    """

    spots: Any
    values: np.ndarray
    tolerance: np.ndarray
    wanted: np.ndarray | None = None

    def check(self, values: np.ndarray, finite: bool) -> dict[str, Any]:
        """The largest error, as a share of what is allowed and by itself; NaN anywhere fails."""
        values = values if self.wanted is None else np.where(self.wanted, values, 0)
        return verdict(values, self.values, self.tolerance, finite)


def verdict(values: np.ndarray, reference: np.ndarray, tolerance: np.ndarray, finite: bool) -> dict[str, Any]:
    """The largest error of rows, as a share of each row's tolerance and by itself; NaN anywhere fails.

    Args:
      values, reference: float64 [..., n].
      tolerance: [...]; where it is 0, as of rows of zeros, only an equal row is right.
      finite: whether all of the result is, rows that are not looked at included.
    """
    error = np.abs(values - reference).max(-1)
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
