"""Readings of finished lists on the host: as a boolean array, as a number of attended elements, as a text."""

from __future__ import annotations

import numpy as np

from jax_bsk.masks._tiles import inside_words, past_end
from jax_bsk.masks.block_lists import BlockLists, of_table


def to_dense(mask: BlockLists) -> np.ndarray:
    """bool [B|1, H|1, q_len, kv_len] of checked lists."""
    grid = mask._grid
    dense = np.zeros((mask.batch, mask.heads, grid.nq, mask.block_q, grid.nk, mask.block_kv), bool)
    for b in range(mask.batch):
        for h in range(mask.heads):
            rows, columns, tiles, _ = mask._entries(b, h)
            full = tiles < 0
            dense[b, h, rows[full], :, columns[full]] = True
            bits = of_table(mask.bit_tiles, b, h)[tiles[~full]]
            booleans = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=-1, bitorder="little")
            # Together, not one after the other: a traced list may visit a block twice.
            np.logical_or.at(dense[b, h].swapaxes(1, 2), (rows[~full], columns[~full]), booleans.astype(bool))
    dense = dense.reshape(mask.batch, mask.heads, grid.nq * mask.block_q, grid.nk * mask.block_kv)
    return dense[..., : mask.q_len, : mask.kv_len].copy()


def attended_elements(mask: BlockLists) -> int:
    """Attended elements inside the lengths, of all examples and heads together."""
    grid = mask._grid
    inside = [inside_words(grid, bool(ends & 1), bool(ends & 2)) for ends in range(4)] if grid.nq and grid.nk else []
    total = 0
    for b in range(mask.batch):
        for h in range(mask.heads):
            rows, columns, tiles, weights = mask._weighted_entries(b, h)
            pairs, which = np.unique(tiles.astype(np.int64) * 4 + past_end(grid, rows, columns), return_inverse=True)
            counts = np.zeros(pairs.size, np.int64)
            np.add.at(counts, which.ravel(), weights)
            bits = of_table(mask.bit_tiles, b, h).reshape(-1, mask.block_q * mask.block_kv // 32)
            for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
                words = inside[pair % 4]
                words = words if pair < 0 else words & bits[pair // 4]
                total += count * int(np.bitwise_count(words).sum())
    return total


def density(mask: BlockLists) -> float:
    """Visited blocks / all blocks."""
    blocks = mask.nq * mask.nk
    return float(np.mean(mask.row_offsets[..., -1]) / blocks) if blocks else 0.0


def element_density(mask: BlockLists) -> float:
    """Attended elements / all elements."""
    return attended_elements(mask) / (mask.batch * mask.heads * mask.q_len * mask.kv_len or 1)


def describe(mask: BlockLists, batch: int | None, heads: int | None, head_dim: int | None) -> str:
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
        f"  visited: {visited.sum() / lists:,.0f} blocks per list, {full / lists:,.0f} full, "
        f"{partial / lists:,.0f} partial",
        f"  density: {density(mask):.2%} of the blocks, {element_density(mask):.2%} of the elements",
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
