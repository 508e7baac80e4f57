"""Pictures of a BlockMask. Matplotlib is imported here only, when one is asked for."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from jax_bsk.masks.block_lists import BlockLists

_COLOURS = {"empty": "#f4f4f1", "partial": "#f2b56b", "full": "#24557a"}


def plot(mask: BlockLists, path_or_ax: Any, batch: int, head: int, title: str) -> Any:
    """See `BlockMask.plot`."""
    try:
        from matplotlib import colors
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("BlockMask.plot needs matplotlib; install it with `pip install matplotlib`") from error

    if not (0 <= batch < mask.batch and 0 <= head < mask.heads):
        raise ValueError(f"batch={batch}, head={head}: the mask has batch {mask.batch} and heads {mask.heads}")
    rows, columns, tiles, _ = mask._entries(batch, head)
    picture = np.zeros((mask.nq, mask.nk), np.int8)
    picture[rows, columns] = np.where(tiles < 0, 2, 1)

    is_path = isinstance(path_or_ax, str | os.PathLike)
    if path_or_ax is None or is_path:
        # A figure of its own, not pyplot's: no global state, and no display needed.
        figure = Figure(figsize=(5.6, 6.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    else:
        ax = path_or_ax
        figure = None

    if picture.size:
        extent = (0, mask.nk * mask.block_kv, mask.nq * mask.block_q, 0)
        cmap = colors.ListedColormap(list(_COLOURS.values()))
        ax.imshow(picture, cmap=cmap, vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="equal")
        ax.set_xlim(0, mask.kv_len)
        ax.set_ylim(mask.q_len, 0)
        if max(mask.nq, mask.nk) <= 64:  # beyond, the lines would be all there is to see
            ax.set_xticks(np.arange(1, mask.nk) * mask.block_kv, minor=True)
            ax.set_yticks(np.arange(1, mask.nq) * mask.block_q, minor=True)
            ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="minor", length=0)
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    counts = np.bincount(picture.ravel(), minlength=3)
    total = max(1, picture.size)
    ax.set_title(
        title or f"{mask.q_len} x {mask.kv_len} tokens: {1 - counts[0] / total:.1%} of the blocks", fontsize=11
    )
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", label=f"{name} {count:,}")
        for (name, colour), count in zip(_COLOURS.items(), counts, strict=True)
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False, fontsize=9)
    if is_path and figure is not None:
        figure.savefig(path_or_ax)
    return ax
