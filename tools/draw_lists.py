"""Draws the pictures of docs/design/from-mask-to-lists.md. Usage: python tools/draw_lists.py

All of them are of one mask, `CausalMask() & (LocalMask((128, 0)) | GlobalMask(8))` of 320 tokens in blocks of 64. What
they show is read from the mask and its lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from jax_bsk.masks import BlockMask, CausalMask, GlobalMask, LocalMask

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LENGTH, BLOCK = 320, 64
EMPTY, PARTIAL, FULL = "#f4f4f1", "#f2b56b", "#24557a"  # as in `BlockMask.plot`
ROW_COLOURS = ["#dbe7c9", "#f7d9c4", "#cfe0ef", "#e4d3ec", "#f5ecc0"]
BITS = ListedColormap(["#f4f4f1", "#444444"])


def example() -> BlockMask:
    return (CausalMask() & (LocalMask((128, 0)) | GlobalMask(8))).bind(LENGTH, block_size=BLOCK)


def entries(mask: BlockMask) -> list[tuple[int, int, int]]:
    """Row, key block and tile of each entry, in the order of the lists."""
    offsets = mask.row_offsets[0, 0]
    rows = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    return list(zip(rows.tolist(), mask.kv_blocks[0, 0].tolist(), mask.tiles[0, 0].tolist(), strict=False))


def grid(axis: Axes, title: str) -> None:
    ticks = np.arange(0, LENGTH + 1, BLOCK)
    axis.set(xticks=ticks, yticks=ticks, xlabel="key position", title=title, aspect="equal")
    axis.grid(color="#888888", linewidth=0.8)
    axis.set_axisbelow(False)


def draw_blocks(mask: BlockMask, path: Path) -> None:
    """Pairs that attend, and the class of each block with its tile."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    left.imshow(mask.to_dense()[0, 0], cmap=BITS, extent=(0, LENGTH, LENGTH, 0), interpolation="nearest")
    grid(left, "1  pairs that attend")
    left.set_ylabel("query position")

    classes = np.zeros((mask.nq, mask.nk), int)
    for row, column, tile in entries(mask):
        classes[row, column] = 2 if tile < 0 else 1
        text = "full" if tile < 0 else f"partial\ntile {tile}"
        at = (column + 0.5) * BLOCK, (row + 0.5) * BLOCK
        right.text(*at, text, ha="center", va="center", color="white" if tile < 0 else "black", fontsize=9)
    colours = ListedColormap([EMPTY, PARTIAL, FULL])
    right.imshow(classes, cmap=colours, vmin=0, vmax=2, extent=(0, LENGTH, LENGTH, 0), interpolation="nearest")
    grid(right, "2  classes of blocks")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cells(axis: Axes, y: float, name: str, values: Sequence[int], colours: Sequence[str]) -> None:
    axis.text(-0.3, y + 0.5, name, ha="right", va="center", family="monospace", fontsize=11)
    for n, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axis.add_patch(Rectangle((n, y), 1, 1, facecolor=colour, edgecolor="#555555", linewidth=0.8))
        axis.text(n + 0.5, y + 0.5, str(value), ha="center", va="center", fontsize=11)


def draw_lists(mask: BlockMask, path: Path) -> None:
    """The query-major lists as cells, and the same entries key-major."""
    turned = mask.transpose()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.2), layout="constrained")
    rows = {"row_offsets": mask.row_offsets, "kv_blocks": mask.kv_blocks, "tiles": mask.tiles}
    draw_order(above, "4  query-major: what the forward reads", "row", rows)
    columns = {"col_offsets": turned.col_offsets, "q_blocks": turned.q_blocks, "col_tiles": turned.col_tiles}
    draw_order(below, "5  key-major: what the gradients of keys and values read", "column", columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_order(axis: Axes, title: str, owner: str, lists: dict[str, Any]) -> None:
    """Offsets above, blocks and tiles of the entries below, in the colours of their rows or columns."""
    (offset_name, bounds), *of_entries = ((name, np.asarray(x)[0, 0].tolist()) for name, x in lists.items())
    colours = np.repeat(ROW_COLOURS, np.diff(bounds)).tolist()
    cells(axis, 3.4, offset_name, bounds, [*ROW_COLOURS, "white"])
    for y, (name, values) in zip((1.2, 0.0), of_entries, strict=True):
        cells(axis, y, name, values, colours)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        axis.annotate("", (begin + 0.5, 2.25), (n + 0.5, 3.35), arrowprops={"arrowstyle": "->", "color": "#777777"})
        axis.text((begin + end) / 2, -0.5, f"{owner} {n}", ha="center", va="center", fontsize=9, color="#555555")
    axis.set(xlim=(-3, len(colours) + 0.5), ylim=(-0.9, 4.6))
    axis.set_title(title, fontsize=11)
    axis.set_axis_off()


def draw_tiles(mask: BlockMask, path: Path) -> None:
    """The bit tiles, one square per pair."""
    tiles = np.asarray(mask.bit_tiles)[0, 0]
    figure, axes = plt.subplots(1, len(tiles), figsize=(2 * len(tiles), 2.4), layout="constrained")
    figure.suptitle("3  bit tiles: queries downwards, keys to the right", fontsize=11)
    for n, (axis, words) in enumerate(zip(axes, tiles, strict=True)):
        bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
        used = [f"({row}, {column})" for row, column, tile in entries(mask) if tile == n]
        axis.imshow(bits, cmap=BITS, vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"tile {n}", fontsize=10)
        axis.set_xlabel("\n".join([", ".join(used[k : k + 2]) for k in range(0, len(used), 2)]), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    mask = example()
    for name, draw in {"blocks": draw_blocks, "lists": draw_lists, "tiles": draw_tiles}.items():
        path = IMAGES / f"from-mask-to-lists-{name}.png"
        draw(mask, path)
        print(path)


if __name__ == "__main__":
    main()
