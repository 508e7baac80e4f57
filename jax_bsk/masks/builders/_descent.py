"""Classifying a long mask on the host: coarse blocks first, then finer ones in those that are neither empty nor full.

The cost is that of the mask's boundary, not of its area: 8,192 x 8,192 blocks of a causal mask ask for 1,500 coarse
blocks and then for those along the diagonal. `_host` takes its full blocks as segments of rows and evaluates the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_bsk.masks import _runs
from jax_bsk.masks.algebra.mask import Mask, parts
from jax_bsk.masks.grid import EMPTY, FULL, Grid

# Each level has blocks of SIDE x SIDE of the next one; the coarsest has at most TOP blocks.
SIDE = 8
TOP = 2**12
# Blocks classified at a time: bounds the memory.
CHUNK = 2**20


class Found(NamedTuple):
    """The classified blocks of one mask.

    Attributes:
      full: segments of full blocks, merged.
      rows, columns: int32 [n], the blocks that may be partial, in row-major order.
      codes: int8 [n], their class codes.
    """

    full: _runs.Segments
    rows: np.ndarray
    columns: np.ndarray
    codes: np.ndarray


def has_bounds(mask: Mask) -> bool:
    """Whether every part can be asked about coarse blocks without reading what it holds block by block."""
    return all(part._coarse_bounds for part in parts(mask))


def find(mask: Mask, grid: Grid) -> Found | None:
    """Blocks of a mask whose parts all have bounds; None where coarse blocks decide less than half of its area."""
    factor = 1
    while -(-grid.nq // factor) * -(-grid.nk // factor) > TOP:
        factor *= SIDE
    coarse = _coarse(grid, factor)
    cells = np.indices((coarse.nq, coarse.nk)).reshape(2, -1)
    codes = mask._classify(coarse, np.arange(coarse.nq)[:, None], np.arange(coarse.nk)[None, :])
    found = [(*cells, np.broadcast_to(codes, (coarse.nq, coarse.nk)).ravel())]
    full: list[_runs.Segments] = []
    while True:
        rows, columns, codes = (np.concatenate(x) for x in zip(*found, strict=True))
        full.append(_refined(grid, factor, rows[codes == FULL], columns[codes == FULL]))
        left = (codes != FULL) & (codes != EMPTY)
        rows, columns, codes = rows[left], columns[left], codes[left]
        if factor == 1:
            break
        if not full[1:] and 2 * left.sum() > left.size:
            return None
        factor //= SIDE
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8))
        found = [empty, *_children(mask, _coarse(grid, factor), rows, columns)]
    order = np.lexsort((columns, rows))
    rows, columns, codes = rows[order].astype(np.int32), columns[order].astype(np.int32), codes[order]
    return Found(_runs.merge(_runs.Segments(*map(np.concatenate, zip(*full, strict=True)))), rows, columns, codes)


def _coarse(grid: Grid, factor: int) -> Grid:
    return dataclasses.replace(grid, block_q=grid.block_q * factor, block_kv=grid.block_kv * factor)


def _children(
    mask: Mask, grid: Grid, rows: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row, column and code of the blocks of `grid` in the coarse blocks (rows, columns), without the empty ones."""
    inner = np.arange(SIDE)
    step = CHUNK // SIDE**2
    for start in range(0, rows.size, step):
        i = rows[start : start + step, None, None] * SIDE + inner[None, :, None]
        j = columns[start : start + step, None, None] * SIDE + inner[None, None, :]
        # The last coarse blocks may reach past the grid.
        codes = mask._classify(grid, np.minimum(i, grid.nq - 1), np.minimum(j, grid.nk - 1))
        visited = np.broadcast_to(codes != EMPTY, (i.shape[0], SIDE, SIDE)) & (i < grid.nq) & (j < grid.nk)
        at = np.nonzero(visited)
        codes = np.broadcast_to(codes, visited.shape)[at]
        yield i[at[0], at[1], 0], j[at[0], 0, at[2]], codes


def _refined(grid: Grid, factor: int, rows: np.ndarray, columns: np.ndarray) -> _runs.Segments:
    """Full blocks of a coarse grid as segments of the fine one's rows."""
    full = _runs.merge(_runs.Segments(rows, columns, np.ones_like(rows), np.full_like(rows, -1)))
    fine = full.rows[:, None] * factor + np.arange(factor)
    inside = fine < grid.nq
    first = full.first * factor
    length = np.minimum(first + full.length * factor, grid.nk) - first
    first, length = (np.broadcast_to(x[:, None], fine.shape)[inside] for x in (first, length))
    return _runs.Segments(fine[inside], first, length, np.full_like(first, -1))
