"""Draws the README's picture of masks, docs/images/masks.png. Usage: python tools/draw_masks.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jax_bsk.masks import CausalMask, ChunkedMask, GlobalMask, LocalMask, PrefixLMMask, SegmentMask

LENGTH = 2048
DOCUMENTS = np.searchsorted([500, 640, 1300, 1700], np.arange(LENGTH), side="right")
MASKS = {
    "CausalMask()": CausalMask(),
    "CausalMask() & LocalMask((400, 0))": CausalMask() & LocalMask((400, 0)),
    "CausalMask() & (LocalMask((256, 0)) | GlobalMask(64))": CausalMask() & (LocalMask((256, 0)) | GlobalMask(64)),
    "CausalMask() & SegmentMask(documents)": CausalMask() & SegmentMask(DOCUMENTS),
    "PrefixLMMask(600)": PrefixLMMask(600),
    "ChunkedMask(512)": ChunkedMask(512),
}


def main() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(12, 8.4), constrained_layout=True)
    for axis, (title, mask) in zip(axes.flat, MASKS.items(), strict=True):
        mask.bind(LENGTH, block_size=64).plot(axis)
        axis.set_title(title, fontsize=9)
    path = Path(__file__).parents[1] / "docs" / "images" / "masks.png"
    figure.savefig(path, dpi=80)
    print(path)


if __name__ == "__main__":
    main()
