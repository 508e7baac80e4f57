"""Bit tiles of partial blocks on the host: packing booleans, storing each distinct tile once, the ends of lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_bsk.masks.grid import Grid


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
        """Distinct tiles among tiles [n, words]: their hashes, they themselves, and which of them each tile is."""
        # Words are mixed before the sum, or some that differ in their top bits alone could cancel out.
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


def inside_words(grid: Grid, row_end: bool, column_end: bool) -> np.ndarray:
    """Tile words uint32 with the bits that lie inside the lengths, for a block at the end of rows or columns or not."""
    rows = grid.q_len - (grid.nq - 1) * grid.block_q if row_end else grid.block_q
    columns = grid.kv_len - (grid.nk - 1) * grid.block_kv if column_end else grid.block_kv
    inside = np.zeros((1, grid.block_q, grid.block_kv), bool)
    inside[:, :rows, :columns] = True
    return pack(inside)[0]


def past_end(grid: Grid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """0 for blocks inside; 1 for those past the end of the queries, 2 of the keys, 3 of both."""
    past_q = (rows == grid.nq - 1) & (grid.q_len % grid.block_q != 0)
    past_kv = (columns == grid.nk - 1) & (grid.kv_len % grid.block_kv != 0)
    return past_q + 2 * past_kv
