"""What is done with finished lists: check them, expand them, describe them, and make them of index lists and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import is_array, is_traced, of_rank
from jax_bsk.masks import _runs
from jax_bsk.masks._host import BlockLists, end_kind, inside_words
from jax_bsk.masks._transpose import rows_of_entries
from jax_bsk.masks.algebra import EMPTY, FULL, Grid, Mask, classify, strips

if TYPE_CHECKING:
    from jax_bsk.masks.block_mask import BlockMask


def check(mask: BlockMask) -> None:
    """Raises ValueError for the first row that kernels would answer with NaN, then for the first such column."""
    columns = [x for x in (mask.col_offsets, mask.q_blocks, mask.col_tiles) if x is not None]
    for b in range(mask.kv_blocks.shape[0]):
        for h in range(mask.kv_blocks.shape[1]):
            where, n_tiles = f"batch {b}, head {h}, ", mask.bit_tiles.shape[2]
            rows = mask.row_offsets[b, h], mask.kv_blocks[b, h], mask.tiles[b, h]
            entries = _check_lists(*rows, mask.nk, n_tiles, where + "row {row}: ", "key")
            if len(columns) == 3:
                offsets, ids, tiles = (x[b, h] for x in columns)
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
        where + f"its entries end at {{value}}, past the lists' capacity of {capacity}; give a larger max_blocks",
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


def check_runs(runs: _runs.Runs, capacity: int, blocks: int, n_tiles: int, where: str, visited: str) -> None:
    """`_check_lists` of lists as runs: of the first and of the last entry of each."""
    ends = runs.offsets[1:]
    _raise_first(ends > capacity, where + f"its entries end at {{value}}, past the lists' capacity of {capacity}", ends)
    first = np.searchsorted(runs.starts, runs.offsets).astype(np.int64)
    for ids in (runs.blocks, runs.blocks + np.maximum(_runs.lengths_of(runs), 1) - 1):
        _check_lists(first, ids, runs.tiles, blocks, n_tiles, where, visited)


def check_transposed_runs(rows: _runs.Runs, columns: _runs.Runs, where: str) -> None:
    """`_check_transposed` of lists as runs."""
    ours, theirs = (
        np.stack(_runs.merge(_runs.to_segments(x))) for x in (_runs.transpose(rows, columns.offsets.size - 1), columns)
    )
    for column in np.union1d(ours[0], theirs[0]):
        if not np.array_equal(ours[:, ours[0] == column], theirs[:, theirs[0] == column]):
            raise ValueError(f"invalid BlockMask: {where}column {column}: {_TRANSPOSED_OTHERWISE}")


_TRANSPOSED_OTHERWISE = (
    "its entries are not those of the rows that visit it; leave the key-major lists out, or make them with transpose()"
)


def _raise_first(
    bad: np.ndarray, message: str, values: np.ndarray | None = None, rows: np.ndarray | None = None
) -> None:
    if bad.any():
        n = int(np.argmax(bad))
        row = n if rows is None else int(rows[n])
        raise ValueError(
            "invalid BlockMask: " + message.format(row=row, value=None if values is None else int(values[n]))
        )


def to_dense(mask: BlockMask) -> np.ndarray:
    """bool [B|1, H|1, q_len, kv_len] of checked lists."""
    grid = Grid(mask.q_len, mask.kv_len, mask.block_q, mask.block_kv)
    dense = np.zeros((mask.batch, mask.heads, grid.nq, mask.block_q, grid.nk, mask.block_kv), bool)
    for b in range(mask.batch):
        for h in range(mask.heads):
            rows, columns, tiles = entries(mask, b, h)
            full = tiles < 0
            dense[b, h, rows[full], :, columns[full]] = True
            bits = _of(mask.bit_tiles, b, h)[tiles[~full]]
            booleans = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=-1, bitorder="little")
            # Together, not one after the other: a traced list may visit a block twice.
            np.logical_or.at(dense[b, h].swapaxes(1, 2), (rows[~full], columns[~full]), booleans.astype(bool))
    dense = dense.reshape(mask.batch, mask.heads, grid.nq * mask.block_q, grid.nk * mask.block_kv)
    return dense[..., : mask.q_len, : mask.kv_len].copy()


def _of(array: np.ndarray, b: int, h: int) -> np.ndarray:
    return array[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]


def entries(mask: BlockMask, b: int, h: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and tile of every valid entry."""
    ids, tiles = _of(mask.kv_blocks, b, h), _of(mask.tiles, b, h)
    rows = rows_of_entries(_of(mask.row_offsets, b, h), ids.shape[0])
    listed = np.flatnonzero((rows >= 0) & (ids >= 0) & (ids < mask.nk) & (tiles < mask.bit_tiles.shape[2]))
    return rows[listed], ids[listed], tiles[listed]


def attended_elements(mask: BlockMask) -> int:
    """Attended elements inside the lengths, of all examples and heads together."""
    grid = Grid(mask.q_len, mask.kv_len, mask.block_q, mask.block_kv)
    inside = [inside_words(grid, bool(kind & 1), bool(kind & 2)) for kind in range(4)] if grid.nq and grid.nk else []
    total = 0
    for b in range(mask.batch):
        for h in range(mask.heads):
            rows, columns, tiles, weights = mask._weighted_entries(b, h)
            pairs, which = np.unique(tiles.astype(np.int64) * 4 + end_kind(grid, rows, columns), return_inverse=True)
            counts = np.zeros(pairs.size, np.int64)
            np.add.at(counts, which.ravel(), weights)
            bits = _of(mask.bit_tiles, b, h).reshape(-1, mask.block_q * mask.block_kv // 32)
            for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
                words = inside[pair % 4]
                words = words if pair < 0 else words & bits[pair // 4]
                total += count * int(np.bitwise_count(words).sum())
    return total


def describe(mask: BlockMask, batch: int | None, heads: int | None, head_dim: int | None) -> str:
    """The text of `BlockMask.describe`."""
    visited = mask.row_offsets[..., -1].astype(np.int64)
    full = partial = 0
    for b in range(mask.row_offsets.shape[0]):
        for h in range(mask.row_offsets.shape[1]):
            *_, tiles, weights = mask._weighted_entries(b, h)
            full += int(weights[tiles < 0].sum())
            partial += int(weights[tiles >= 0].sum())
    lists = max(1, visited.size)
    elements = attended_elements(mask)
    lines = [
        f"BlockMask: {mask.q_len} queries x {mask.kv_len} keys in blocks of {mask.block_q} x {mask.block_kv} "
        f"({mask.nq} x {mask.nk} blocks), batch {mask.batch}, heads {mask.heads}",
        f"  visited: {visited.sum() / lists:,.0f} blocks a list, {full / lists:,.0f} full, "
        f"{partial / lists:,.0f} partial",
        f"  density: {mask.density:.2%} of the blocks, {mask.element_density:.2%} of the elements",
        f"  storage: {mask.bit_tiles.shape[2]:,} bit tiles, {mask.nbytes:,} bytes",
    ]
    if head_dim is not None:
        calls = (batch or mask.batch) * (heads or mask.heads)
        flops = 4 * head_dim * elements / (mask.batch * mask.heads) * calls
        lines.append(
            f"  useful work: {flops / 1e9:,.2f} GFLOP forward, {2.5 * flops / 1e9:,.2f} GFLOP backward "
            f"(batch {batch or mask.batch}, heads {heads or mask.heads}, head size {head_dim})"
        )
    return "\n".join(lines)


# ---- index lists ------------------------------------------------------------------------------------------------


def from_indices(kv_blocks: Any, counts: Any, grid: Grid) -> BlockLists:
    """Lists of padded id lists; all blocks full."""
    kv_blocks, counts = _integers(kv_blocks, "kv_blocks"), _integers(counts, "counts")
    if kv_blocks.ndim not in (2, 3, 4) or kv_blocks.shape[-2] != grid.nq:
        raise ValueError(
            f"kv_blocks must be [nq, k], [H|1, nq, k] or [B|1, H|1, nq, k] with nq={grid.nq} (q_len={grid.q_len} in "
            f"blocks of {grid.block_q}), given shape {kv_blocks.shape}"
        )
    if counts.shape != kv_blocks.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of kv_blocks without its last dimension, {kv_blocks.shape[:-1]}, given "
            f"{counts.shape}"
        )
    shape = (1,) * (4 - kv_blocks.ndim) + kv_blocks.shape
    traced = is_traced(kv_blocks) or is_traced(counts)
    if traced:
        return _indices_traced(jnp.reshape(kv_blocks, shape), jnp.reshape(counts, shape[:-1]), grid)
    return _indices_host(np.reshape(np.asarray(kv_blocks), shape), np.reshape(np.asarray(counts), shape[:-1]), grid)


def _integers(x: Any, name: str) -> Any:
    x = x if is_array(x) else np.asarray(x)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, given {x.dtype}{x.shape}")
    return x


def no_tiles(grid: Grid) -> np.ndarray:
    return np.zeros((1, 1, 0, grid.block_q, grid.block_kv // 32), np.uint32)


def _indices_host(kv_blocks: np.ndarray, counts: np.ndarray, grid: Grid) -> BlockLists:
    width = kv_blocks.shape[-1]
    _raise_row((counts < 0) | (counts > width), f"its count is not in [0, {width}]")
    listed = np.arange(width) < counts[..., None]
    _raise_row((listed & ((kv_blocks < 0) | (kv_blocks >= grid.nk))).any(-1), f"it has an id outside [0, {grid.nk})")
    pairs = listed[..., 1:]
    _raise_row((pairs & (kv_blocks[..., 1:] == kv_blocks[..., :-1])).any(-1), "it has an id twice")
    _raise_row((pairs & (kv_blocks[..., 1:] < kv_blocks[..., :-1])).any(-1), "its ids do not ascend; sort them")
    batch, heads = counts.shape[:2]
    row_offsets = np.zeros((batch, heads, grid.nq + 1), np.int32)
    np.cumsum(counts, axis=-1, out=row_offsets[..., 1:])
    ids = np.full((batch, heads, max(1, int(row_offsets[..., -1].max(initial=0)))), -1, np.int32)
    for b in range(batch):
        for h in range(heads):
            chosen = kv_blocks[b, h][listed[b, h]]
            ids[b, h, : chosen.size] = chosen
    return BlockLists(row_offsets, ids, np.full_like(ids, -1), no_tiles(grid))


def _raise_row(bad: np.ndarray, what: str) -> None:
    if bad.any():
        b, h, row = (int(n[0]) for n in np.nonzero(bad))
        raise ValueError(f"from_indices: batch {b}, head {h}, row {row}: {what}")


def _indices_traced(kv_blocks: Any, counts: Any, grid: Grid) -> BlockLists:
    row_offsets, ids = explicit_mesh.call(jax.vmap(jax.vmap(packed_rows)), [kv_blocks, counts], ["bh"] * 2)
    return BlockLists(row_offsets, ids, jnp.full_like(ids, -1), no_tiles(grid))


def packed_rows(kv_blocks: Any, counts: Any) -> tuple[Any, Any]:
    """Offsets [nq + 1] and ids [nq * width] of one table's padded lists [nq, width] without their gaps."""
    width = kv_blocks.shape[-1]
    if width == 0:  # nowhere to put the mark of a bad count
        kv_blocks, width = jnp.full((*kv_blocks.shape[:-1], 1), -1, jnp.int32), 1
        counts = jnp.where(counts == 0, 0, -1)
    # A count that disagrees with the lists poisons its own row only: the row becomes one entry with an id of -1.
    bad = (counts < 0) | (counts > width)
    counts = jnp.where(bad, 1, counts).astype(jnp.int32)
    ids = jnp.where(bad[:, None], -1, kv_blocks).astype(jnp.int32)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    listed = jnp.arange(width, dtype=jnp.int32)[None] < counts[:, None]
    # Stable sort by listed or not: closes the gaps and keeps the order (and needs no scatter).
    _, ids = jax.lax.sort(
        ((~listed).ravel().astype(jnp.int32), jnp.where(listed, ids, -1).ravel()), num_keys=1, is_stable=True
    )
    return offsets, ids if ids.size else jnp.full(1, -1, jnp.int32)


# ---- scores -----------------------------------------------------------------------------------------------------


def top_k(scores: Any, k: int, grid: Grid, mask: Mask | None) -> tuple[Any, int, int]:
    """Boolean [..., nq, nk] of the chosen blocks, and bounds of the blocks and the tiles they need with `mask`."""
    scores = scores if is_array(scores) else np.asarray(scores)
    if not (jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)):
        raise TypeError(f"scores must be real numbers, given {scores.dtype}{scores.shape}")
    if scores.ndim not in (2, 3, 4) or scores.shape[-2:] != (grid.nq, grid.nk):
        raise ValueError(
            f"scores must be [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk] with (nq, nk) = ({grid.nq}, {grid.nk}), "
            f"given shape {scores.shape}"
        )
    if not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an int (it decides shapes), given {type(k).__name__}")
    if not 1 <= k <= max(1, grid.nk):
        raise ValueError(f"k must be in [1, {grid.nk}] (the key blocks), given {k}")
    k = min(int(k), grid.nk)
    possible = np.ones((grid.nq, grid.nk), bool)
    partial = np.zeros((grid.nq, grid.nk), bool)
    if mask is not None:
        mask._validate(grid.q_len, grid.kv_len)
        # Shared by all heads and examples: only what the mask's outline rules out. What one head or a traced part rules
        # out beyond that is dropped after the choice.
        outline = mask._outline(grid)
        codes = np.concatenate([classify(outline, grid, rows) for rows in strips(grid)] or [np.zeros((0, grid.nk))])
        possible, partial = codes != EMPTY, (codes != EMPTY) & (codes != FULL)
    bound = int(np.minimum(possible.sum(1), k).sum())
    tiles = int(np.minimum(partial.sum(1), k).sum())
    if not is_traced(scores):
        return _top_k_host(np.asarray(scores).astype(np.float64), possible, k), max(1, bound), tiles
    low = scores if scores.dtype in (jnp.float32, jnp.float64) else scores.astype(jnp.float32)
    low = jnp.where(jnp.isnan(low) | of_rank(~possible, low.ndim), -jnp.inf, low)
    # Sorted, not `lax.top_k`, which XLA does not partition over examples and heads.
    numbers = jnp.arange(grid.nk, dtype=jnp.int32)
    block = jnp.zeros_like(low, jnp.int32) + of_rank(numbers, low.ndim)
    values, ids = jax.lax.sort((-low, block), num_keys=1, is_stable=True)
    chosen = (ids[..., :k, None] == of_rank(numbers, low.ndim + 1)) & (values < jnp.inf)[..., :k, None]
    return chosen.any(-2), max(1, bound), tiles


def _top_k_host(scores: np.ndarray, possible: np.ndarray, k: int) -> np.ndarray:
    scores = np.where(np.isnan(scores) | ~possible, -np.inf, scores)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen & (scores > -np.inf)
