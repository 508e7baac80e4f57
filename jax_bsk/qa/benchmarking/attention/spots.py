"""Where the check of attention looks: some rows of some heads, and every element for whether it is finite."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
