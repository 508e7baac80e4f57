"""Random masks of the kinds that papers and libraries define, with the dense booleans they stand for.

The booleans are written down independently of the masks, for whole arrays; `tests/masks` has the definitions pair by
pair.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jax_bsk import masks as m

Draw = tuple[m.Mask, np.ndarray]  # a mask, and its booleans [q_len, kv_len]


def _positions(q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(q_len)[:, None], np.arange(kv_len)[None, :]


def neighborhood(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    """Rows of a few tokens, with a window that is moved inward; tokens behind the grid attend to nothing."""
    width = int(rng.integers(1, 9))
    rows = min(q_len, kv_len) // width
    if rows == 0:
        return m.FullMask(), np.ones((q_len, kv_len), bool)
    (q, k), sizes = _positions(q_len, kv_len), (rows, width)
    kernel = tuple(int(rng.integers(1, size + 1)) for size in sizes)
    dense = (q < rows * width) & (k < rows * width)
    for size, keys, x, y in zip(sizes, kernel, (q // width, q % width), (k // width, k % width), strict=True):
        first = np.clip(x - keys // 2, 0, size - keys)
        dense = dense & (first <= y) & (y < first + keys)
    return m.NeighborhoodMask(sizes, kernel, start=0), dense


def row_ranges(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    _, k = _positions(q_len, kv_len)
    begin = rng.integers(-5, kv_len + 1, q_len).astype(np.int32)
    end = begin + rng.integers(0, kv_len + 1, q_len).astype(np.int32)
    return m.RowRangeMask(begin, end), (begin[:, None] <= k) & (k < end[:, None])


def column_ranges(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    q, _ = _positions(q_len, kv_len)
    a, b, c, d = rng.integers(0, q_len + 1, (4, kv_len)).astype(np.int32)
    return m.ColumnRangeMask(a, b, c, d), ~(((a <= q) & (q < b)) | ((c <= q) & (q < d)))


def slices(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    (q, k), n = _positions(q_len, kv_len), int(rng.integers(0, 4))
    q_ranges, kv_ranges = (np.sort(rng.integers(0, size + 1, (n, 2))).astype(np.int32) for size in (q_len, kv_len))
    kinds = rng.integers(0, 4, n).astype(np.int32)
    dense = np.zeros((q_len, kv_len), bool)
    for (a, b), (c, d), kind in zip(q_ranges, kv_ranges, kinds, strict=True):
        causal, inverse = k - d <= q - b, k - c >= q - a
        dense |= (a <= q) & (q < b) & (c <= k) & (k < d) & (True, causal, inverse, causal & inverse)[kind]
    return m.SliceMask(q_ranges, kv_ranges, kinds), dense


def sequences(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    """Sequences of equal lengths on both sides, with tokens of none behind them, and a causal window."""
    (q, k), left = _positions(q_len, kv_len), int(rng.integers(0, 100))
    lengths = np.diff(np.sort(np.append(rng.integers(0, min(q_len, kv_len) + 1, 4), 0))).astype(np.int32)
    ids = np.append(np.repeat(np.arange(4), lengths), np.full(max(q_len, kv_len), -1))
    dense = (ids[q] >= 0) & (ids[q] == ids[k]) & (k <= q) & (q - k <= left)
    return m.BlockDiagonalMask(lengths, window=(left, 0)), dense


def lines(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    q, k = _positions(q_len, kv_len)
    vertical, slash = rng.integers(-1, kv_len, 3).astype(np.int32), rng.integers(-1, q_len, 9).astype(np.int32)
    return m.VerticalSlashMask(vertical, slash), (k <= q) & (np.isin(k, vertical) | np.isin(q - k, slash))


def tree(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    """Chains of tokens that branch, behind a context of whatever keys there are more than queries."""
    if kv_len < q_len:
        return m.CausalMask(), np.tri(q_len, kv_len, dtype=bool)
    parents = np.arange(q_len) - 1
    branches = rng.integers(1, q_len, 4) if q_len > 1 else np.zeros(0, int)
    parents[branches] = [rng.integers(-1, branch) for branch in branches]
    above = np.eye(q_len, dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            above[token] |= above[parent]
    context = np.ones((q_len, kv_len - q_len), bool)
    return m.TreeMask(parents.astype(np.int32)), np.concatenate([context, above], 1)


def function_within(rng: np.random.Generator, q_len: int, kv_len: int) -> Draw:
    (q, k), width = _positions(q_len, kv_len), int(rng.integers(0, max(q_len, kv_len)))
    a, b = (int(x) for x in rng.integers(1, 20, 2))
    mask = m.FunctionMask(lambda q, k: (q * a + k * b) % 17 < 9, within=m.LocalMask(width))
    return mask, ((q * a + k * b) % 17 < 9) & (abs(q - k) <= width)


DRAWS: dict[str, Callable[[np.random.Generator, int, int], Draw]] = {
    f.__name__: f for f in (neighborhood, row_ranges, column_ranges, slices, sequences, lines, tree, function_within)
}
