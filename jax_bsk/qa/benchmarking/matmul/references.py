"""What a product must be: some rows and columns of the result in float64.

A row and a column are drawn from each of many equal strips, so that no tile of the result goes unseen. The tolerance
of a row is that of the attention benchmark: twice the error of the exact row rounded to the type, and one rounding of
its largest number (64 in float32). It knows nothing of the sum's length: a kernel that sums in the type of the operands
fails.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.benchmarking.check import Reference, rounded, rounding_of
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.matmul.operands import Operands

STRIPS = 256


@dataclasses.dataclass(frozen=True)
class Spots:
    """Where to look: int [r] and int [c]."""

    rows: np.ndarray
    columns: np.ndarray


def choose_spots(size: int, seed: int) -> Spots:
    """One row and column of each strip at random, the first and the last among them."""
    rng = np.random.default_rng([seed, size])
    edges = np.linspace(0, size, min(STRIPS, size) + 1).astype(np.int64)

    def draw() -> np.ndarray:
        drawn = rng.integers(edges[:-1], edges[1:])
        drawn[0], drawn[-1] = 0, size - 1
        return drawn

    return Spots(draw(), draw())


@jax.jit
def _at(x: jax.Array, rows: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
    return x[rows][:, columns].astype(jnp.float32), jnp.isfinite(x).all()


def pick(x: jax.Array, spots: Spots) -> tuple[np.ndarray, bool]:
    """The spots of a dense matrix as float64 [r, c], and whether all of it is finite."""
    values, finite = _at(x, spots.rows, spots.columns)
    return np.asarray(values).astype(np.float64), bool(finite)


def make_reference(
    operands: Operands, operation: Operation, spots: Spots, weights: jax.Array | None = None
) -> Reference:
    """The exact product of the operands as the type holds them, at the spots; of `weights` in place of W if given."""
    left, right, left_transposed, right_transposed = operands.factors(operation, weights)
    rows = _lines(left, spots.rows, columns=left_transposed)  # [r, size]
    columns = _lines(right, spots.columns, columns=not right_transposed)  # [c, size]
    values = rows @ columns.T
    wanted = np.ones(values.shape, bool)
    if operation is Operation.DATA_GRADIENT:
        block = operands.config.block
        wanted = operands.kept[spots.rows[:, None] // block, spots.columns // block]
    values = np.where(wanted, values, 0)
    return Reference(spots, values, tolerance_of(values, np.dtype(operands.x.dtype)), wanted)


def tolerance_of(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What each row of exact values may be off by as a result of that type (bfloat16 too: JAX's is numpy's)."""
    return 2 * np.abs(rounded(values, dtype) - values).max(-1) + rounding_of(dtype) * np.abs(values).max(-1)


def _lines(x: jax.Array, places: np.ndarray, columns: bool) -> np.ndarray:
    """Those rows or columns of a matrix as float64 [n, size]."""
    return np.asarray(_taken(x, places, columns)).astype(np.float64)


@functools.partial(jax.jit, static_argnums=2)
def _taken(x: jax.Array, places: Any, columns: bool) -> jax.Array:
    return (x[:, places].T if columns else x[places]).astype(jnp.float32)
