"""Masks of other projects and papers, written from their definitions: one pair of tokens at a time, in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

import jax_bsk.masks as m
from jax_bsk.masks.grid import EMPTY, FULL, Grid


def pairs(q_len: int, kv_len: int, attends: Callable[[int, int], bool]) -> np.ndarray:
    return np.array([[bool(attends(q, k)) for k in range(kv_len)] for q in range(q_len)], bool).reshape(q_len, kv_len)


def check(mask: m.Mask, dense: np.ndarray, block_size: int) -> m.BlockMask:
    """The mask is `dense`, and its lists have no block without a pair."""
    bound = mask.bind(*dense.shape, block_size=block_size)
    np.testing.assert_array_equal(bound.to_dense()[0, 0], dense, err_msg=repr(mask))
    padded = np.zeros((bound.nq * block_size, bound.nk * block_size), bool)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    blocks = padded.reshape(bound.nq, block_size, bound.nk, block_size).any((1, 3))
    np.testing.assert_array_equal(np.diff(bound.row_offsets[0, 0]), blocks.sum(1), err_msg=repr(mask))
    # Bounds of blocks are safe, for coarser blocks too.
    for factor in (1, 2):
        grid = Grid(dense.shape[0], dense.shape[1], block_size * factor, block_size * factor)
        i, j = np.arange(grid.nq)[:, None], np.arange(grid.nk)[None]
        codes = np.broadcast_to(mask._classify(grid, i, j), (grid.nq, grid.nk))
        for (row, column), code in np.ndenumerate(codes):
            part = dense[
                row * grid.block_q : (row + 1) * grid.block_q, column * grid.block_kv : (column + 1) * grid.block_kv
            ]
            assert code != EMPTY or not part.any(), (mask, row, column)
            assert code != FULL or part.all(), (mask, row, column)
    return bound


# ---- tokens of a grid -----------------------------------------------------------------------------------------------


def order(shape: tuple[int, ...], tile: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """The place of each token: row-major, or tile after tile."""
    if tile is None:
        return list(itertools.product(*map(range, shape)))
    found = []
    for corner in itertools.product(*(range(0, n, t) for n, t in zip(shape, tile, strict=True))):
        inside = (range(c, min(c + t, n)) for c, t, n in zip(corner, tile, shape, strict=True))
        found += list(itertools.product(*inside))
    return found


def on_grid(
    shape: tuple[int, ...],
    tile: tuple[int, ...] | None,
    attends: Callable[[int, int, int], bool],
    length: int | None = None,
    start: int = 0,
) -> np.ndarray:
    """Pairs of tokens that attend along each axis: `attends(axis, query's coordinate, key's coordinate)`."""
    places = order(shape, tile)
    along = [[[attends(axis, q, k) for k in range(n)] for q in range(n)] for axis, n in enumerate(shape)]
    dense = pairs(
        len(places),
        len(places),
        lambda q, k: all(along[a][x][y] for a, (x, y) in enumerate(zip(places[q], places[k], strict=True))),
    )
    if length is None:
        return dense
    whole = np.zeros((length, length), bool)
    whole[start : start + len(places), start : start + len(places)] = dense
    return whole


def neighbor(length: int, kernel: int, dilation: int, stride: int, causal: bool) -> Callable[[int, int], bool]:
    """Neighborhood attention along one axis: arXiv 2204.07143, 2209.15001 (dilation) and 2504.16922 (stride)."""

    def neighbors(q: int) -> set[int]:
        # The tokens of the query's residue, in their order, are an axis without dilation.
        axis = list(range(q % dilation, length, dilation))
        at = axis.index(q)
        group = [i for i in range(len(axis)) if i // stride == at // stride]
        if causal:
            leader = group[-1]
            window = [i for i in range(leader - kernel + 1, leader + 1) if 0 <= i <= at]
        else:
            leader = min(group[0] + stride // 2, len(axis) - 1)
            first = leader - kernel // 2
            while first < 0:  # moved inward
                first += 1
            while first + kernel > len(axis):
                first -= 1
            window = list(range(first, first + kernel))
        return {axis[i] for i in window}

    known = [neighbors(q) for q in range(length)]
    return lambda q, k: k in known[q]


def neighborhood(
    shape: tuple[int, ...],
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    tile: tuple[int, ...] | None = None,
    **where: int,
) -> np.ndarray:
    axes = [neighbor(*x) for x in zip(shape, kernel, dilation, stride, causal, strict=True)]
    return on_grid(shape, tile, lambda axis, q, k: axes[axis](q, k), **where)


def sliding_tiles(shape: tuple[int, ...], window: Sequence[int], tile: tuple[int, ...], **where: int) -> np.ndarray:
    """Sliding tile attention, arXiv 2502.04507: a window of tiles around the query's tile, moved inward at borders."""

    def attends(axis: int, q: int, k: int) -> bool:
        tiles, width = shape[axis] // tile[axis], window[axis] // tile[axis]
        first = min(max(q // tile[axis] - width // 2, 0), tiles - width)
        return first <= k // tile[axis] < first + width

    return on_grid(shape, tile, attends, **where)


def swin(shape: tuple[int, ...], window: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """Shifted windows as Swin computes them, arXiv 2103.14030: roll, cut, and part what the roll has joined."""

    def attends(axis: int, q: int, k: int) -> bool:
        n, w, s = shape[axis], window[axis], shift[axis]
        rolled = [(x - s) % n for x in (q, k)]
        # Regions of the rolled axis, figure 4: what the roll brought from the other end is a region of its own.
        regions = [0 if x < n - w else 1 if x < n - s else 2 for x in rolled]
        return rolled[0] // w == rolled[1] // w and regions[0] == regions[1]

    return on_grid(shape, None, attends)


# ---- intervals ------------------------------------------------------------------------------------------------------


def flashmask(q_len: int, kv_len: int, lts, lte, uts, ute, causal: bool) -> np.ndarray:
    """FlashMask, arXiv 2410.01359, section 4.1: rows in [LTS, LTE) and [UTS, UTE) of a column are masked."""

    def attends(q: int, k: int) -> bool:
        masked = lts[k] <= q < lte[k] or uts[k] <= q < ute[k]
        return not masked and (not causal or k <= q)

    return pairs(q_len, kv_len, attends)


def slices(q_len: int, kv_len: int, q_ranges, kv_ranges, kinds: Sequence[int]) -> np.ndarray:
    """Slices of MagiAttention: full, causal from the bottom right, inverse causal from the top left, or both."""
    dense = np.zeros((q_len, kv_len), bool)
    for (a, b), (c, d), kind in zip(q_ranges, kv_ranges, kinds, strict=True):
        for q, k in itertools.product(range(a, b), range(c, d)):
            causal, inverse = b - q <= d - k, k - c >= q - a
            dense[q, k] |= (True, causal, inverse, causal and inverse)[kind]
    return dense


def block_diagonal(
    q_len: int, kv_len: int, q_lengths, kv_lengths, kv_starts, left: int | None, right: int | None, align: str, prefix
) -> np.ndarray:
    """Sequences one after another, as in the block-diagonal masks of xformers, sequence by sequence."""
    dense = np.zeros((q_len, kv_len), bool)
    first = 0
    for rows, keys, start, seen in zip(q_lengths, kv_lengths, kv_starts, prefix, strict=True):
        for row, key in itertools.product(range(rows), range(keys)):
            own = row + (keys - rows if align == "end" else 0)
            near = (left is None or key >= own - left) and (right is None or key <= own + right)
            if start + key < kv_len:
                dense[first + row, start + key] = near or key < seen
        first += rows
    return dense


def block_diffusion(length: int, block: int) -> np.ndarray:
    """Block diffusion, arXiv 2503.09573, section 3.1: block diagonal, offset block causal and block causal parts."""

    def attends(q: int, k: int) -> bool:
        q_block, k_block = q % length // block, k % length // block
        if q < length:
            return q_block == k_block if k < length else k_block < q_block
        return k >= length and k_block <= q_block

    return pairs(2 * length, 2 * length, attends)


# ---- lines and trees ------------------------------------------------------------------------------------------------


def vertical_slash(q_len: int, kv_len: int, vertical, slash) -> np.ndarray:
    """Vertical lines and slashes below the diagonal, arXiv 2407.02490."""
    columns, distances = {int(x) for x in vertical}, {int(x) for x in slash}
    return pairs(q_len, kv_len, lambda q, k: k <= q and (k in columns or q - k in distances))


def tree(parents, before: int) -> np.ndarray:
    """Tokens see `before` tokens of a context, themselves and their ancestors."""

    def attends(q: int, k: int) -> bool:
        at = q
        while at >= 0 and at != k - before:
            at = int(parents[at])
        return k < before or at >= 0

    return pairs(len(parents), before + len(parents), attends)
