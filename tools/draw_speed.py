"""Draws the picture of the README and of the documentation's home, and copies the report's own pictures beside it.

    python tools/draw_speed.py

The picture shows the time of a call against the share of blocks it visits, beside peers, from reports/h200/report.json.
There is one for light pages and one for dark ones: docs/images/speed-light.png and speed-dark.png.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "reports" / "h200"
IMAGES = ROOT / "docs" / "images"
# The site shows only what lies in docs/, so that these pictures of the report are there once more.
COPIES = {
    "forward-density.png": "attention_h200_forward.png",
    "grid.png": "attention_h200_grid.png",
}
SHAPE = {"batch": 4, "heads": 32, "kv_heads": 32, "length": 8192, "head_dim": 128}
# A panel's title, and the sets of cases that it is drawn from.
PANELS = {
    "Forward": {"forward", "grid, forward"},
    "Forward and backward": {"forward and backward"},
}
INKS = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#484f58")}
# Lines: label, colour on light and on dark pages, marker.
LINES = {
    "cudnn": ("cuDNN with a dense mask", {"light": "#1a7f37", "dark": "#56d364"}, "^"),
    "flex": ("FlexAttention (PyTorch)", {"light": "#0969da", "dark": "#79c0ff"}, "s"),
    "jax_bsk": ("jax_bsk", {"light": "#cf222e", "dark": "#ff7b72"}, "o"),
}
DENSE_PEERS = ("cudnn", "sdpa-cudnn")  # of jax.nn, of PyTorch


def times(cases: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Per cent of the blocks and milliseconds of one contender, sorted; cuDNN without a mask is a line of its own."""
    points = []
    for case in cases:
        one = case["jax_bsk"] if name == "jax_bsk" else case["peers"].get(name, {})
        unmasked = name == "cudnn" and one.get("variant") == "native"
        if "seconds" in one and not unmasked:
            points.append((case["density"] * 100, one["seconds"] * 1e3))
    return sorted(points)


def draw(cases: list[dict[str, Any]], page: str, path: Path) -> None:
    ink, faint = INKS[page]
    figure = Figure(figsize=(7.6, 4.0), dpi=150, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS))
    for ax, (title, sets) in zip(axes, PANELS.items(), strict=True):
        here = [
            case
            for case in cases
            if case["set"] in sets
            and case["pattern"] in ("random", "dense")
            and all(case[key] == value for key, value in SHAPE.items())
            and "length," not in case["name"]
        ]
        (everything,) = (case for case in here if case["pattern"] == "dense")
        dense = min(everything["peers"][name]["seconds"] for name in DENSE_PEERS) * 1e3
        for name, (label, colours, marker) in LINES.items():
            ax.plot(
                *zip(*times(here, name), strict=True),
                marker=marker,
                color=colours[page],
                label=label,
                linewidth=2.4 if name == "jax_bsk" else 1.6,
                markersize=5,
            )
        ax.axhline(dense, color=ink, linewidth=1, linestyle="--", label="fastest dense attention (cuDNN, no mask)")
        ax.set_title(title, color=ink)
        ax.set_xlim(0, 102)
        ax.set_ylim(0)
        ax.set_xlabel("blocks visited, %", color=ink)
        ax.grid(color=faint, linewidth=0.6)
        ax.set_facecolor("none")
        ax.tick_params(colors=ink)
        for side in ax.spines.values():
            side.set_color(faint)
    axes[0].set_ylabel("time of a call, ms", color=ink)
    handles, labels = axes[0].get_legend_handles_labels()
    order = [labels.index(label) for label in ("jax_bsk", *[label for label in labels if label != "jax_bsk"])]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=2,
        fontsize=10,
        frameon=False,
        labelcolor=ink,
    )
    figure.savefig(path, transparent=True)
    print(path.relative_to(ROOT))


def main() -> None:
    cases = json.loads((REPORT / "report.json").read_text())["stages"]["benchmark"]["data"]["cases"]
    cases = [case for case in cases if "seconds" in case["jax_bsk"]]
    for page in INKS:
        draw(cases, page, IMAGES / f"speed-{page}.png")
    for name, copy in COPIES.items():
        shutil.copyfile(REPORT / name, IMAGES / copy)


if __name__ == "__main__":
    main()
