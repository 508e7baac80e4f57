"""Building a BlockMask on the host: numpy, vectorised over blocks, threaded, within bounded memory.

Stages of one (example, head): classify blocks from bounds, in chunks of block rows or, of a long mask, from coarse
blocks to fine ones (`_descent`); evaluate the partial blocks in small chunks (one representative for each group of
blocks whose tiles are known to be equal), pack and deduplicate the tiles; settle blocks that turn out empty or full;
lay out the lists, long ones as runs (`_runs`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from jax_bsk.masks import _runs
from jax_bsk.masks._tiles import TileStore, inside_words, pack, past_end
from jax_bsk.masks.algebra.mask import Mask, classify, is_hashable, parts
from jax_bsk.masks.block_lists import RowLists
from jax_bsk.masks.builders import _descent
from jax_bsk.masks.grid import EMPTY, FULL, OWN, SHIFT, Grid, row_chunks
from jax_bsk.masks.run_lists import RowRuns

T = TypeVar("T")

# Elements evaluated at a time and thread: 1 MiB of int32 stays in the level 2 cache (measured 1.4x faster than 16 MiB).
CHUNK_ELEMENTS = 2**18
# Blocks of a grid above which coarse ones are classified first: about 32,768 tokens with blocks of 128.
DESCENT_BLOCKS = 2**16
# Entries of all lists together above which they are kept as runs: 2 MiB of lists (causal: about 92,000 tokens), which
# are 4 MiB of text where they are constants of a jitted function, and twice as much with its gradient.
RUN_ENTRIES = 2**18
# Bytes of lists for each byte of runs, below which lists stay lists: reading runs costs a bisection per entry.
RUN_GAIN = 4


def build(
    mask: Mask, grid: Grid, *, batch: int, heads: int, max_blocks: int | None = None, max_tiles: int | None = None
) -> RowLists | RowRuns:
    """Lists and tiles of a mask whose arrays all have values.

    Long lists are returned as runs, unless `max_blocks` asks for room of a given size.

    Raises:
      ValueError: where the mask needs more than `max_blocks` entries or `max_tiles` tiles.
    """
    mask = on_host(mask)
    store = TileStore(grid.block_q, grid.block_kv)
    built: list[list[_runs.Lists | _runs.Runs]] = []
    seen: dict[Mask, _runs.Lists | _runs.Runs] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for b in range(batch):
            built.append([_build_cached(mask._select(b, h), grid, store, pool, seen) for h in range(heads)])

    capacity = max((int(lists.offsets[-1]) for row in built for lists in row), default=0)
    if max_blocks is not None and capacity > max_blocks:
        raise ValueError(f"max_blocks={max_blocks}, but the mask visits {capacity} blocks in one example and head")
    # At least one entry, so that no kernel is handed an empty list.
    capacity = max(1, capacity) if max_blocks is None else max_blocks
    row_offsets = np.zeros((batch, heads, grid.nq + 1), np.int32)
    for index in np.ndindex(batch, heads):
        row_offsets[index] = built[index[0]][index[1]].offsets
    runs = _as_runs(built, grid, capacity) if max_blocks is None else None
    if runs is None:
        lists = [[x if isinstance(x, _runs.Lists) else _runs.to_lists(x) for x in row] for row in built]
        kv_blocks, tiles = (_stacked(lists, name, capacity, -1) for name in ("blocks", "tiles"))
        tiles, bit_tiles = _numbered(tiles, store, max_tiles)
        return RowLists(row_offsets, kv_blocks, tiles, bit_tiles)
    # Where the runs of a head end, they begin past the entries: a bisection never finds those.
    size = max(x.starts.size for row in runs for x in row)
    starts = _stacked(runs, "starts", size, capacity)
    blocks, tiles = (_stacked(runs, name, size, -1) for name in ("blocks", "tiles"))
    tiles, bit_tiles = _numbered(tiles, store, max_tiles)
    return RowRuns(row_offsets, starts, blocks, tiles, bit_tiles, capacity)


def _as_runs(built: list[list[_runs.Lists | _runs.Runs]], grid: Grid, capacity: int) -> list[list[_runs.Runs]] | None:
    """The lists as runs, where they are long and runs of rows and of columns are much fewer than entries."""
    lists = sum(len(row) for row in built)
    if lists * capacity <= RUN_ENTRIES:
        return None
    most = capacity // RUN_GAIN
    done: dict[int, _runs.Runs] = {}  # equal masks share their lists
    for x in (x for row in built for x in row):
        if id(x) not in done:
            runs = x if isinstance(x, _runs.Runs) else _runs.from_lists(x)
            if runs.starts.size > most or _runs.count_transposed(runs, grid.nk) > most:
                return None
            done[id(x)] = runs
    return [[done[id(x)] for x in row] for row in built]


def _stacked(built: list[list[Any]], name: str, size: int, fill: int) -> np.ndarray:
    """int32 [B, H, size] of one array of each list, padded."""
    stacked = np.full((len(built), len(built[0]) if built else 1, size), fill, np.int32)
    for b, row in enumerate(built):
        for h, lists in enumerate(row):
            array = getattr(lists, name)
            stacked[b, h, : array.size] = array
    return stacked


def _numbered(tiles: np.ndarray, store: TileStore, max_tiles: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The lists' tiles, numbered without those that no entry uses, and the bit tiles that are left."""
    used = np.unique(tiles[tiles >= 0])
    if max_tiles is not None and used.size > max_tiles:
        raise ValueError(f"max_tiles={max_tiles}, but the mask needs {used.size} distinct bit tiles")
    renumber = np.zeros(len(store) + 1, np.int32)
    renumber[used] = np.arange(used.size, dtype=np.int32)
    tiles = np.where(tiles >= 0, renumber[tiles], np.int32(-1))
    bit_tiles = store.stack(used)
    if max_tiles is not None:
        bit_tiles = np.concatenate([bit_tiles, np.zeros((max_tiles - used.size, *bit_tiles.shape[1:]), np.uint32)])
    return tiles, bit_tiles[None, None]


def on_host(mask: Mask) -> Mask:
    """The mask with numpy arrays."""
    return mask._map_fields(on_host, lambda _, x: np.asarray(x))


def _build_cached(
    mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor, seen: dict[Mask, _runs.Lists | _runs.Runs]
) -> _runs.Lists | _runs.Runs:
    """The lists of one mask. Heads and examples often share one: where it can be hashed, equal ones are built once."""
    if not is_hashable(mask):
        return _build_one(mask, grid, store, pool)
    if mask not in seen:
        seen[mask] = _build_one(mask, grid, store, pool)
    return seen[mask]


def _build_one(mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor) -> _runs.Lists | _runs.Runs:
    """Lists of one example and head, with the store's numbers of tiles; runs where coarse blocks were classified."""
    # ---- classify ----
    descends = grid.nq * grid.nk > DESCENT_BLOCKS and _descent.has_bounds(mask)
    found = _descent.find(mask, grid) if descends else None
    if found is None:
        classified = _ordered(pool, lambda rows: (rows, classify(mask, grid, rows)), row_chunks(grid))
        chunks = [_find(*item) for item in classified]
        rows, columns, codes = (np.concatenate([f[n] for f in chunks] or [np.zeros(0, np.int32)]) for n in range(3))
    else:
        rows, columns, codes = found.rows, found.columns, found.codes

    # ---- evaluate ----
    partial = np.flatnonzero(codes != FULL)
    own = partial[codes[partial] == OWN]
    shift = partial[codes[partial] == SHIFT]
    first_own, which_own = _alike(mask, grid, rows[own], columns[own])
    first, which_shift = _diagonals(mask, grid, rows[shift], columns[shift])
    evaluated = np.concatenate([own[first_own], shift[first]])
    numbers = tiles_of(mask, grid, store, pool, rows[evaluated], columns[evaluated])
    tiles = np.full(rows.size, -1, np.int32)
    tiles[own] = numbers[: first_own.size][which_own]
    tiles[shift] = numbers[first_own.size :][which_shift]

    # ---- settle blocks that are empty or full after all ----
    keep = np.ones(rows.size, bool)
    none, every = _settle(grid, store, rows[partial], columns[partial], tiles[partial])
    keep[partial[none]] = False
    tiles[partial[every]] = -1
    rows, columns, tiles = rows[keep], columns[keep], tiles[keep]
    if found is None:
        return lay_out(grid.nq, rows, columns, tiles)
    settled = _runs.Segments(rows, columns, np.ones_like(rows), tiles)
    both = _runs.Segments(*(np.concatenate(x).astype(np.int64) for x in zip(found.full, settled, strict=True)))
    return _runs.from_segments(_runs.merge(both), grid.nq)


def _alike(mask: Mask, grid: Grid, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of OWN blocks that are known to share a tile: the first of each group, and the group of each block.

    Blocks are in row-major order. They share a tile where each part is empty in both, full in both, or says that it has
    the same elements in both (`Mask._tile_key`). Blocks that reach past a length share nothing: there a part may differ
    from what it is inside.
    """
    everything = np.arange(rows.size)
    keys = [part._tile_key(grid, rows, columns) for part in parts(mask)]
    if rows.size == 0 or all(key is None for key in keys):
        return everything, everything
    alone = past_end(grid, rows, columns) > 0
    codes = [_codes_of(part, grid, rows, columns) for part in parts(mask)]
    some = [(c != EMPTY) & (c != FULL) for c in codes]
    for key, partial in zip(keys, some, strict=True):
        if key is None:
            alone |= partial
    shared = np.flatnonzero(~alone)
    group = np.zeros(shared.size, np.int64)
    for code, key, partial in zip(codes, keys, some, strict=True):
        for number in (np.where(partial, -1, code), *(np.where(partial, number, 0) for number in key or ())):
            group = _paired(group, number[shared])
    every = everything + shared.size
    every[shared] = group
    _, first, which = np.unique(every, return_index=True, return_inverse=True)
    return _in_order(first, which.ravel())


def _codes_of(mask: Mask, grid: Grid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Class codes int8 [n] of the blocks (rows, columns)."""
    return np.broadcast_to(mask._classify(grid, rows[:, None], columns[:, None]), (rows.size, 1))[:, 0]


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Numbers below their count that are equal where both `a` and `b` are."""
    if b.size == 0 or (b == b[0]).all():
        return a
    b = np.unique(b, return_inverse=True)[1].ravel().astype(np.int64)
    return np.unique(a * (b.max() + 1) + b, return_inverse=True)[1].ravel().astype(np.int64)


def _in_order(first: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups numbered by where they appear first, so that tiles are stored in the order of their blocks."""
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(order.size)
    return first[order], number[which]


def _diagonals(mask: Mask, grid: Grid, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of SHIFT blocks that share a tile: the first of each group, and the group of each block.

    The first one is inside the lengths if any of its group is, so what a mask says past its length is not shared.
    """
    distance = rows.astype(np.int64) * grid.block_q - columns.astype(np.int64) * grid.block_kv
    _, first, group = np.unique(distance, return_index=True, return_inverse=True)
    if rows.size:
        # `causal & (window | global)`: a block of the diagonal is causal where global is full, both where it is empty.
        for part in parts(mask):
            if not part._shift_invariant:
                key = group * 4 + _codes_of(part, grid, rows, columns)
                _, first, group = np.unique(key, return_index=True, return_inverse=True)
    return first, group.ravel()


def _ordered(pool: ThreadPoolExecutor, work: Callable[[Any], T], items: Iterator[Any]) -> Iterator[T]:
    """Results of `work` in order, with only a few in flight: those that wait for the consumer must not pile up."""
    waiting: list[Future[T]] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 16:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _find(chunk: slice, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and code of the visited blocks of a chunk of rows, in row-major order."""
    flat = np.flatnonzero(codes)
    rows, columns = np.divmod(flat, max(1, codes.shape[1]))
    return (rows + chunk.start).astype(np.int32), columns.astype(np.int32), codes[rows, columns]


def tiles_of(
    mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Numbers of the tiles of the blocks (rows, columns); memory for a few chunks at a time."""
    count = max(1, CHUNK_ELEMENTS // (grid.block_q * grid.block_kv))
    inner_q = np.arange(grid.block_q, dtype=np.int32)[None, :, None]
    inner_kv = np.arange(grid.block_kv, dtype=np.int32)[None, None, :]

    def evaluate(start: int) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        chunk = slice(start, start + count)
        q = rows[chunk, None, None] * np.int32(grid.block_q) + inner_q
        k = columns[chunk, None, None] * np.int32(grid.block_kv) + inner_kv
        booleans = np.broadcast_to(mask._evaluate(grid, q, k), (q.shape[0], grid.block_q, grid.block_kv))
        return start, store.compress(pack(booleans))

    numbers = np.empty(rows.size, np.int32)
    for start, (hashes, distinct, which) in _ordered(pool, evaluate, iter(range(0, rows.size, count))):
        numbers[start : start + which.size] = store.add(hashes, distinct)[which]
    return numbers


def _settle(
    grid: Grid, store: TileStore, rows: np.ndarray, columns: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two booleans [n] of partial blocks: no element inside the lengths is attended; every one is."""
    # What a block is depends on its tile and on which lengths end in it only: decide for each such pair once.
    pairs, which = np.unique(tiles.astype(np.int64) * 4 + past_end(grid, rows, columns), return_inverse=True)
    inside = [inside_words(grid, bool(ends & 1), bool(ends & 2)) for ends in range(4)] if pairs.size else []
    none, every = np.empty(pairs.size, bool), np.empty(pairs.size, bool)
    for n, pair in enumerate(pairs.tolist()):
        words = store.tile(pair // 4) & inside[pair % 4]
        none[n], every[n] = not words.any(), np.array_equal(words, inside[pair % 4])
    return none[which.ravel()], every[which.ravel()]


def lay_out(nq: int, rows: np.ndarray, columns: np.ndarray, tiles: np.ndarray) -> _runs.Lists:
    """Entries in row-major order as lists: in each row the partial ones first, then the full ones, both ascending."""
    counts = np.bincount(rows, minlength=nq)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    _runs.check_count(int(offsets[-1]))
    partial = tiles >= 0
    partial_counts = np.bincount(rows[partial], minlength=nq)
    # The rank of an entry among its class in its row: its rank in the class less that of the row's first.
    before = np.concatenate([[0], np.cumsum(partial_counts)])[:-1]
    position = np.empty(rows.size, np.int64)
    row = rows[partial]
    position[partial] = offsets[row] + np.arange(row.size) - before[row]
    row = rows[~partial]
    position[~partial] = offsets[row] + partial_counts[row] + np.arange(row.size) - (offsets[:-1] - before)[row]
    kv_blocks, ordered = np.empty(rows.size, np.int32), np.empty(rows.size, np.int32)
    kv_blocks[position], ordered[position] = columns, tiles
    return _runs.Lists(offsets.astype(np.int32), kv_blocks, ordered)
