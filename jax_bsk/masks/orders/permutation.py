"""A host mask of reordered tokens: chunks of whole blocks change places, and with them rows and ids.

A mask says nothing about positions but in its lists, its bit tiles and the lengths. So the mask of a permuted sequence
is the same data in another order: row r of the new mask is that of the query block which now stands there, its entries
name the places where its key blocks now stand, in the order in which the row visited them before.
"""

from __future__ import annotations

import numpy as np

from jax_bsk.masks import _runs
from jax_bsk.masks.block_lists import BlockLists, RowLists
from jax_bsk.masks.run_lists import RowRuns


def permuted(mask: BlockLists, order: np.ndarray, chunk: int) -> RowLists | RowRuns:
    """The query-major lists of a mask whose queries and keys are reordered alike.

    Args:
      mask: Host mask.
      order: Integers [chunks], the old number of the chunk at each new place: a permutation.
      chunk: Tokens per chunk, a multiple of both block sizes; chunks * chunk is the length of queries and of keys.

    Returns:
      Runs where the mask holds runs, else lists of the same capacity.
    """
    rows_per_chunk, columns_per_chunk = chunk // mask.block_q, chunk // mask.block_kv
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    tables = np.ndindex(mask.row_offsets.shape[:2])
    found = {
        (b, h): _permuted(mask.row_segments(b, h), place, rows_per_chunk, columns_per_chunk, mask.nq) for b, h in tables
    }
    lead = mask.row_offsets.shape[:2]

    def stack(arrays: dict[tuple[int, ...], np.ndarray], size: int, fill: int) -> np.ndarray:
        result = np.full((*lead, size), fill, np.int32)
        for index, values in arrays.items():
            result[index][: values.size] = values
        return result

    offsets = stack({i: x.offsets for i, x in found.items()}, mask.nq + 1, 0)
    if mask.holds_runs:
        size = max(x.starts.size for x in found.values())
        starts, blocks, tiles = (
            stack({i: getattr(x, name) for i, x in found.items()}, size, fill)
            for name, fill in (("starts", mask.capacity), ("blocks", -1), ("tiles", -1))
        )
        return RowRuns(offsets, starts, blocks, tiles, np.asarray(mask.bit_tiles), mask.capacity)
    lists = {i: _runs.to_lists(x) for i, x in found.items()}
    blocks, tiles = (
        stack({i: getattr(x, name) for i, x in lists.items()}, mask.capacity, -1) for name in ("blocks", "tiles")
    )
    return RowLists(offsets, blocks, tiles, mask.bit_tiles)


def _permuted(
    segments: _runs.Segments, place: np.ndarray, rows_per_chunk: int, columns_per_chunk: int, rows: int
) -> _runs.Runs:
    pieces = _cut(segments, columns_per_chunk)
    row = _moved(pieces.rows, place, rows_per_chunk)
    first = _moved(pieces.first, place, columns_per_chunk)
    by_row = np.argsort(row, kind="stable")
    row, first, length, tiles = row[by_row], first[by_row], pieces.length[by_row], pieces.tiles[by_row]
    ends = np.cumsum(length, dtype=np.int64)
    offsets = np.concatenate([[0], ends])[np.searchsorted(row, np.arange(rows + 1))]
    return _runs.Runs(*(x.astype(np.int32) for x in (offsets, ends - length, first, tiles)))


def _moved(blocks: np.ndarray, place: np.ndarray, per_chunk: int) -> np.ndarray:
    return place[blocks // per_chunk] * per_chunk + blocks % per_chunk


def _cut(segments: _runs.Segments, per_chunk: int) -> _runs.Segments:
    """The same segments, none of which reaches from one chunk into another, in the same order."""
    first, last = segments.first // per_chunk, (segments.first + segments.length - 1) // per_chunk
    count = last - first + 1
    source = np.repeat(np.arange(count.size), count)
    number = np.arange(source.size) - np.repeat(np.cumsum(count) - count, count)
    begin = np.maximum(segments.first[source], (first[source] + number) * per_chunk)
    end = np.minimum((segments.first + segments.length)[source], (first[source] + number + 1) * per_chunk)
    return _runs.Segments(segments.rows[source], begin, end - begin, segments.tiles[source])
