"""Orders of the tokens of a grid as sorting keys: tiles, and the curves of Morton and Hilbert.

Tokens are numbered row by row, the last axis fastest. Keys are made for the whole grid and sorted, so a grid of any
sizes has an order: what a curve visits outside of it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def coordinates(grid: Sequence[int]) -> np.ndarray:
    """int64 [axes, tokens]."""
    return np.indices(grid, np.int64).reshape(len(grid), -1)


def tiled(grid: Sequence[int], tile: Sequence[int]) -> np.ndarray:
    """Token at each place of an order tile after tile, row by row in each tile."""
    places = coordinates(grid)
    numbers = [x // size for x, size in zip(places, tile, strict=True)]
    return np.lexsort((*places[::-1], *numbers[::-1]))


def banded(grid: Sequence[int], band: Sequence[int]) -> np.ndarray:
    """Token at each place of an order by bands along the last axis, each passed column by column, one to and one fro.

    A column is the tokens of a band at one place of the last axis. Neighbours in the order stay neighbours in the grid,
    also where one band ends and the next begins, so a block of any number of tokens is compact.
    """
    places = coordinates(grid)
    keys: list[np.ndarray] = []
    passed = np.zeros(places.shape[1], np.int64)
    for axis, size in enumerate((*band, 1)):
        number = places[axis] // size
        keys.append(np.where(passed % 2 == 1, -number, number))
        passed = passed + number
    return np.lexsort((*places[-2::-1], *keys[::-1]))


def morton(grid: Sequence[int]) -> np.ndarray:
    """Token at each place of the Z-order curve (Morton, 1966): by the interleaved bits of its coordinates."""
    return np.argsort(_interleaved(coordinates(grid), _bits(grid)), kind="stable")


def hilbert(grid: Sequence[int]) -> np.ndarray:
    """Token at each place of the Hilbert curve through the smallest cube of a power of two around the grid.

    Coordinates are transformed as in J. Skilling, "Programming the Hilbert curve" (AIP Conference Proceedings 707,
    2004), for all tokens at once: from the highest bit down, the turn of each subcube is undone, and what is left is
    the Gray code of the place.
    """
    x, bits = coordinates(grid), _bits(grid)
    for bit in range(bits - 1, 0, -1):
        below = (1 << bit) - 1
        for axis in range(len(grid)):
            inverted = (x[axis] >> bit) & 1 == 1
            exchanged = np.where(inverted, 0, (x[0] ^ x[axis]) & below)
            x[0] ^= np.where(inverted, below, exchanged)
            x[axis] ^= exchanged
    for axis in range(1, len(grid)):
        x[axis] ^= x[axis - 1]
    turned = np.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        turned ^= ((x[-1] >> bit) & 1) * ((1 << bit) - 1)
    return np.argsort(_interleaved(x ^ turned, bits), kind="stable")


def _bits(grid: Sequence[int]) -> int:
    return max((size - 1).bit_length() for size in grid)


def _interleaved(x: np.ndarray, bits: int) -> np.ndarray:
    """Bits of x [axes, tokens] in turn, the highest first, those of the first axis before the others'."""
    key = np.zeros(x.shape[1], np.int64)
    for bit in range(bits - 1, -1, -1):
        for row in x:
            key = key << 1 | (row >> bit) & 1
    return key
