"""Checks of finished lists: what kernels do not trust."""

from __future__ import annotations

import numpy as np

from jax_bsk.masks import _runs
from jax_bsk.masks.block_lists import BlockLists, of_table
from jax_bsk.masks.orders.column_lists import rows_of_entries
from jax_bsk.masks.run_lists import RunLists

_TRANSPOSED_OTHERWISE = (
    "its entries are not those of the rows that visit it; leave the key-major lists out, or make them with transpose()"
)


def check(mask: BlockLists) -> None:
    """Raises ValueError for the first row that kernels would answer with NaN, then for the first such column."""
    n_tiles = mask.bit_tiles.shape[2]
    columns = [x for x in (mask.col_offsets, mask.q_blocks, mask.col_tiles) if x is not None]
    for b, h in np.ndindex(mask.kv_blocks.shape[:2]):
        where = f"batch {b}, head {h}, "
        offsets, ids, tiles = (of_table(x, b, h) for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
        entries = _check_lists(offsets, ids, tiles, mask.nk, n_tiles, where + "row {row}: ", "key")
        if len(columns) == 3:
            offsets, ids, tiles = (of_table(x, b, h) for x in columns)
            transposed = _check_lists(offsets, ids, tiles, mask.nq, n_tiles, where + "column {row}: ", "query")
            _check_transposed(entries, transposed, where)


def _check_lists(
    offsets: np.ndarray, ids: np.ndarray, tiles: np.ndarray, blocks: int, n_tiles: int, where: str, visited: str
) -> np.ndarray:
    """The listed entries as (row, id, tile), int [n, 3], of lists that are sound."""
    capacity, offsets = ids.shape[0], offsets.astype(np.int64)
    begin, end = offsets[:-1], offsets[1:]
    for bad, what in (
        (end < begin, "its entries end before they begin"),
        (begin < 0, "its entries begin at a negative offset"),
    ):
        _raise_first(bad, where + what)
    _raise_first(
        end > capacity,
        where + f"its entries end at {{value}}, past the lists' capacity of {capacity}; give a larger max_blocks, or "
        "keep the mask's promises",
        end,
    )
    rows = rows_of_entries(offsets, capacity)
    listed = rows >= 0
    bad = listed & ((ids < 0) | (ids >= blocks))
    _raise_first(bad, where + f"it visits {visited} block {{value}}, outside [0, {blocks})", ids, rows)
    bad = listed & (tiles < -1)
    _raise_first(bad, where + "it refers to bit tile {value}, which is no number of a tile", tiles, rows)
    remedy = "give a larger max_tiles, or keep the promise of contiguous=True"
    bad = listed & (tiles >= n_tiles)
    _raise_first(bad, where + f"it refers to bit tile {{value}} of {n_tiles}; {remedy}", tiles, rows)
    return np.stack([rows[listed], ids[listed], tiles[listed]], -1)


def _check_transposed(entries: np.ndarray, transposed: np.ndarray, where: str) -> None:
    """The key-major lists must have the row-major ones' entries: gradients of keys are made of them."""
    columns, turned = entries[:, 1], entries[:, [1, 0, 2]]
    count = 1 + int(max(columns.max(initial=0), transposed[:, 0].max(initial=0)))
    for column in range(count):
        ours, theirs = turned[columns == column], transposed[transposed[:, 0] == column]
        same = len(ours) == len(theirs) and np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
        if not same:
            raise ValueError(f"invalid BlockMask: {where}column {column}: {_TRANSPOSED_OTHERWISE}")


def check_runs(mask: RunLists) -> None:
    """`check` of lists that are held as runs; the lists are not made."""
    n_tiles = mask.bit_tiles.shape[2]
    for b, h in np.ndindex(mask.row_offsets.shape[:2]):
        where, rows = f"batch {b}, head {h}, ", mask._row_runs(b, h)
        _check_runs(rows, mask.capacity, mask.nk, n_tiles, where + "row {row}: ", "key")
        if mask.col_offsets is not None:
            columns = mask._column_runs(b, h)
            _check_runs(columns, mask.capacity, mask.nq, n_tiles, where + "column {row}: ", "query")
            _check_transposed_runs(rows, columns, where)


def _check_runs(runs: _runs.Runs, capacity: int, blocks: int, n_tiles: int, where: str, visited: str) -> None:
    """`_check_lists` of lists as runs: of the first and of the last entry of each."""
    ends = runs.offsets[1:]
    _raise_first(ends > capacity, where + f"its entries end at {{value}}, past the lists' capacity of {capacity}", ends)
    first = np.searchsorted(runs.starts, runs.offsets).astype(np.int64)
    for ids in (runs.blocks, runs.blocks + np.maximum(_runs.lengths_of(runs), 1) - 1):
        _check_lists(first, ids, runs.tiles, blocks, n_tiles, where, visited)


def _check_transposed_runs(rows: _runs.Runs, columns: _runs.Runs, where: str) -> None:
    """`_check_transposed` of lists as runs."""
    ours, theirs = (
        np.stack(_runs.merge(_runs.to_segments(x))) for x in (_runs.transpose(rows, columns.offsets.size - 1), columns)
    )
    for column in np.union1d(ours[0], theirs[0]):
        if not np.array_equal(ours[:, ours[0] == column], theirs[:, theirs[0] == column]):
            raise ValueError(f"invalid BlockMask: {where}column {column}: {_TRANSPOSED_OTHERWISE}")


def _raise_first(
    bad: np.ndarray, message: str, values: np.ndarray | None = None, rows: np.ndarray | None = None
) -> None:
    if bad.any():
        n = int(np.argmax(bad))
        row = n if rows is None else int(rows[n])
        raise ValueError(
            "invalid BlockMask: " + message.format(row=row, value=None if values is None else int(values[n]))
        )
