"""Building a BlockMask on the host: numpy, vectorised over blocks, threaded, within bounded memory.

Stages of one (example, head): classify strips of block rows from bounds; evaluate the partial blocks in small chunks
(one representative for each distance where a tile depends on the distance alone), pack and deduplicate the tiles;
settle blocks that turn out empty or full; lay out the lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jax_bsk.masks.algebra import FULL, OWN, SHIFT, Grid, Mask, classify, is_hashable, parts, strips

# Elements evaluated at a time and thread: 1 MiB of int32 stays in the level 2 cache (measured 1.4x faster than 16 MiB).
CHUNK_ELEMENTS = 2**18


class BlockLists(NamedTuple):
    """The arrays of a BlockMask, query-major."""

    row_offsets: Any
    kv_blocks: Any
    tiles: Any
    bit_tiles: Any


class TileStore:
    """Deduplicated bit tiles, in order of arrival. Tiles are compared by a 64-bit hash and then word by word."""

    def __init__(self, block_q: int, block_kv: int) -> None:
        self._shape = (block_q, block_kv // 32)
        self._words = block_q * block_kv // 32
        self._multipliers = np.random.default_rng(0).integers(0, 2**63, self._words, np.uint64) * np.uint64(
            2
        ) + np.uint64(1)
        self._numbers: dict[Any, int] = {}
        self._tiles: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._tiles)

    def compress(self, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of tiles [n, words]: hashes of the distinct ones, the distinct ones, and which one each tile is."""
        # Mixed before the sum, or words that differ in their top bits alone could cancel out.
        mixed = (tiles ^ (tiles >> np.uint32(15))) * self._multipliers
        mixed ^= mixed >> np.uint64(31)
        hashes, first, which = np.unique(mixed.sum(1), return_index=True, return_inverse=True)
        distinct = tiles[first]
        if not np.array_equal(distinct[which], tiles):  # two tiles of one hash: compare bytes instead
            rows = np.ascontiguousarray(tiles).view(np.dtype((np.void, tiles.shape[1] * 4))).ravel()
            _, first, which = np.unique(rows, return_index=True, return_inverse=True)
            distinct, hashes = tiles[first], mixed.sum(1)[first]
        return hashes, distinct, which.ravel()

    def add(self, hashes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Numbers of distinct tiles, new ones stored."""
        numbers = np.empty(len(tiles), np.int32)
        for n, (key, tile) in enumerate(zip(hashes.tolist(), tiles, strict=True)):
            number = self._numbers.setdefault(key, len(self._tiles))
            if number < len(self._tiles) and not np.array_equal(self._tiles[number], tile):
                number = self._numbers.setdefault(tile.tobytes(), len(self._tiles))
            if number == len(self._tiles):
                self._tiles.append(tile)
            numbers[n] = number
        return numbers

    def stack(self, numbers: np.ndarray) -> np.ndarray:
        """uint32 [len(numbers), block_q, block_kv // 32]."""
        stacked = np.empty((len(numbers), self._words), np.uint32)
        for n, number in enumerate(numbers):
            stacked[n] = self._tiles[number]
        return stacked.reshape(-1, *self._shape)

    def tile(self, number: int) -> np.ndarray:
        """uint32 [words] of one tile."""
        return self._tiles[number]


def pack(booleans: np.ndarray) -> np.ndarray:
    """Booleans [n, block_q, block_kv] as uint32 [n, block_q * block_kv // 32]; key c is bit c % 32 of word c // 32."""
    packed = np.packbits(booleans, axis=-1, bitorder="little")
    return packed.reshape(booleans.shape[0], booleans.shape[1] * booleans.shape[2] // 8).view("<u4")


def build(
    mask: Mask, grid: Grid, *, batch: int, heads: int, max_blocks: int | None = None, max_tiles: int | None = None
) -> BlockLists:
    """Lists and tiles of a mask whose arrays all have values.

    Raises:
      ValueError: where the mask needs more than `max_blocks` entries or `max_tiles` tiles.
    """
    mask = _on_host(mask)
    store = TileStore(grid.block_q, grid.block_kv)
    built: list[list[_Lists]] = []
    seen: dict[Mask, _Lists] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for b in range(batch):
            built.append([_build_cached(mask._select(b, h), grid, store, pool, seen) for h in range(heads)])

    capacity = max((lists.kv_blocks.size for row in built for lists in row), default=0)
    if max_blocks is not None and capacity > max_blocks:
        raise ValueError(f"max_blocks={max_blocks}, but the mask visits {capacity} blocks in one example and head")
    # At least one entry, so that no kernel is handed an empty list.
    capacity = max(1, capacity) if max_blocks is None else max_blocks
    row_offsets = np.zeros((batch, heads, grid.nq + 1), np.int32)
    kv_blocks = np.full((batch, heads, capacity), -1, np.int32)
    tiles = np.full((batch, heads, capacity), -1, np.int32)
    for b, row in enumerate(built):
        for h, lists in enumerate(row):
            row_offsets[b, h] = lists.row_offsets
            kv_blocks[b, h, : lists.kv_blocks.size] = lists.kv_blocks
            tiles[b, h, : lists.tiles.size] = lists.tiles

    used = np.unique(tiles[tiles >= 0])
    if max_tiles is not None and used.size > max_tiles:
        raise ValueError(f"max_tiles={max_tiles}, but the mask needs {used.size} distinct bit tiles")
    renumber = np.zeros(len(store) + 1, np.int32)
    renumber[used] = np.arange(used.size, dtype=np.int32)
    tiles = np.where(tiles >= 0, renumber[tiles], np.int32(-1))
    bit_tiles = store.stack(used)
    if max_tiles is not None:
        bit_tiles = np.concatenate([bit_tiles, np.zeros((max_tiles - used.size, *bit_tiles.shape[1:]), np.uint32)])
    return BlockLists(row_offsets, kv_blocks, tiles, bit_tiles[None, None])


def _on_host(mask: Mask) -> Mask:
    return mask._map_fields(_on_host, lambda _, x: np.asarray(x))


class _Lists(NamedTuple):
    """Lists of one example and head."""

    row_offsets: np.ndarray  # int32 [nq + 1]
    kv_blocks: np.ndarray  # int32 [entries]
    tiles: np.ndarray  # int32 [entries], numbers of the store


def _build_cached(
    mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor, seen: dict[Mask, _Lists]
) -> _Lists:
    """Heads (and examples) often share a mask; where it can be hashed, equal ones are built once."""
    if not is_hashable(mask):
        return _build_one(mask, grid, store, pool)
    if mask not in seen:
        seen[mask] = _build_one(mask, grid, store, pool)
    return seen[mask]


def _build_one(mask: Mask, grid: Grid, store: TileStore, pool: ThreadPoolExecutor) -> _Lists:
    # ---- classify ----
    found = [_find(*item) for item in _ordered(pool, lambda rows: (rows, classify(mask, grid, rows)), strips(grid))]
    rows, columns, codes = (np.concatenate([f[n] for f in found] or [np.zeros(0, np.int32)]) for n in range(3))

    # ---- evaluate ----
    partial = np.flatnonzero(codes != FULL)
    own = partial[codes[partial] == OWN]
    shift = partial[codes[partial] == SHIFT]
    first, which_shift = _diagonals(mask, grid, rows[shift], columns[shift])
    evaluated = np.concatenate([own, shift[first]])
    numbers = _tiles_of(mask, grid, store, pool, rows[evaluated], columns[evaluated])
    tiles = np.full(rows.size, -1, np.int32)
    tiles[own] = numbers[: own.size]
    tiles[shift] = numbers[own.size :][which_shift]

    # ---- settle blocks that are empty or full after all ----
    keep = np.ones(rows.size, bool)
    none, every = _settle(grid, store, rows[partial], columns[partial], tiles[partial])
    keep[partial[none]] = False
    tiles[partial[every]] = -1
    return lay_out(grid.nq, rows[keep], columns[keep], tiles[keep])


def _diagonals(mask: Mask, grid: Grid, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For SHIFT blocks in row-major order: the first of each group that shares a tile, and the group of each.

    The first one is inside the lengths if any of its group is, so what a mask says past its length is not shared.
    """
    distance = rows.astype(np.int64) * grid.block_q - columns.astype(np.int64) * grid.block_kv
    _, first, group = np.unique(distance, return_index=True, return_inverse=True)
    if rows.size:
        # `causal & (window | global)`: a block of the diagonal is causal where global is full, both where it is empty.
        for part in parts(mask):
            if not part._shift_invariant:
                codes = np.broadcast_to(part._classify(grid, rows[:, None], columns[:, None]), (rows.size, 1))[:, 0]
                _, first, group = np.unique(group * 4 + codes, return_index=True, return_inverse=True)
    return first, group.ravel()


def _ordered(pool: ThreadPoolExecutor, work: Any, items: Iterator[Any]) -> Iterator[Any]:
    """Results of `work` in order, with only a few in flight: those that wait for the consumer must not pile up."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 16:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _find(strip: slice, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and code of the visited blocks of a strip, in row-major order."""
    flat = np.flatnonzero(codes)
    rows, columns = np.divmod(flat, max(1, codes.shape[1]))
    return (rows + strip.start).astype(np.int32), columns.astype(np.int32), codes[rows, columns]


def _tiles_of(
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


def inside_words(grid: Grid, row_end: bool, column_end: bool) -> np.ndarray:
    """Tile words uint32 with the bits that lie inside the lengths, for a block at the end of rows or columns or not."""
    rows = grid.q_len - (grid.nq - 1) * grid.block_q if row_end else grid.block_q
    columns = grid.kv_len - (grid.nk - 1) * grid.block_kv if column_end else grid.block_kv
    inside = np.zeros((1, grid.block_q, grid.block_kv), bool)
    inside[:, :rows, :columns] = True
    return pack(inside)[0]


def end_kind(grid: Grid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """0 for blocks inside; 1 for those past the end of the queries, 2 of the keys, 3 of both."""
    past_q = (rows == grid.nq - 1) & (grid.q_len % grid.block_q != 0)
    past_kv = (columns == grid.nk - 1) & (grid.kv_len % grid.block_kv != 0)
    return past_q + 2 * past_kv


def _settle(
    grid: Grid, store: TileStore, rows: np.ndarray, columns: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each partial block has no, or every, element inside the lengths attended."""
    # What a block is depends on its tile and on its end kind only: decide for each such pair once.
    pairs, which = np.unique(tiles.astype(np.int64) * 4 + end_kind(grid, rows, columns), return_inverse=True)
    inside = [inside_words(grid, bool(kind & 1), bool(kind & 2)) for kind in range(4)] if pairs.size else []
    none, every = np.empty(pairs.size, bool), np.empty(pairs.size, bool)
    for n, pair in enumerate(pairs.tolist()):
        words = store.tile(pair // 4) & inside[pair % 4]
        none[n], every[n] = not words.any(), np.array_equal(words, inside[pair % 4])
    return none[which.ravel()], every[which.ravel()]


def lay_out(nq: int, rows: np.ndarray, columns: np.ndarray, tiles: np.ndarray) -> _Lists:
    """Entries in row-major order as lists: in each row the partial ones first, then the full ones, both ascending."""
    counts = np.bincount(rows, minlength=nq)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"the mask visits {offsets[-1]} blocks: more than int32 offsets can number; use larger blocks")
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
    return _Lists(offsets.astype(np.int32), kv_blocks, ordered)
