"""Pictures of a report: roofline, error histogram, sparsity grid, density and length. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_bsk.qa.benchmarking import plots as tables
from jax_bsk.qa.benchmarking.matmul import plots as product_plots
from jax_bsk.qa.benchmarking.report import unit_of

_COLOURS = {"forward": "#c0392b", "backward": "#2471a3"}
_SETS = {"forward": "forward", "backward": "backward"}


def draw(report: dict[str, Any], folder: Path) -> list[str]:
    """Draws what the report has data for; returns the file names."""
    data = {name: stage["data"] for name, stage in report["stages"].items()}
    written = []
    if data.get("profile", {}).get("points"):
        written.append(_roofline(data["profile"], folder / "roofline.png"))
    if data.get("validate", {}).get("histogram", {}).get("counts"):
        written.append(_errors(data["validate"], folder / "errors.png"))
    if data.get("benchmark", {}).get("cases"):
        written += _benchmark(data["benchmark"], folder)
    if data.get("benchmark", {}).get("matmul", {}).get("cases"):
        written += _products(data["benchmark"], folder / "matmul.png")
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path)
    return path.name


def _roofline(data: dict[str, Any], path: Path) -> str:
    figure, (ax,) = _figure(7, 4.5)
    rate, bandwidth = max(data["matrix_flops_per_second"].values()), data["copy_bytes_per_second"]
    intensities = [point["intensity"] for point in data["points"]]
    x = np.geomspace(min(*intensities, rate / bandwidth) / 2, max(*intensities, rate / bandwidth) * 2, 100)
    ax.plot(x, np.minimum(x * bandwidth, rate) / 1e12, color="#555555", linewidth=1.2, label="copy, matrix product")
    for which, colour in _COLOURS.items():
        points = [p for p in data["points"] if p["pass"] == which]
        if points:
            y = [p["flops_per_second"] / 1e12 for p in points]
            ax.plot([p["intensity"] for p in points], y, "o", color=colour, markersize=5, label=which)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("useful FLOP a byte that must move")
    ax.set_ylabel("useful TFLOP/s")
    ax.grid(color="#e4e4e0")
    ax.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _errors(data: dict[str, Any], path: Path) -> str:
    histogram = data["histogram"]
    figure, (ax,) = _figure(7, 3.6)
    edges = np.linspace(0, 1, histogram["bins"] + 1)
    for name, counts in histogram["counts"].items():
        ax.stairs(counts, edges, label=name, linewidth=1.4)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("largest error of a result as a share of its bound (1: not right)")
    ax.set_ylabel("cases")
    ax.grid(color="#e4e4e0")
    ax.legend(fontsize=8, frameon=False, ncols=3)
    return _save(figure, path)


def _benchmark(data: dict[str, Any], folder: Path) -> list[str]:
    written = []
    for name, which in _SETS.items():
        cases = [case for case in data["cases"] if case["set"] == name and "seconds" in case["jax_bsk"]]
        if cases:
            dtype = cases[0]["dtype"]
            part = {
                "pass": which,
                "devices": data["devices"],
                "options": {"dtype": dtype},
                "matrix_product_flops_per_second": data["matrix_flops_per_second"][dtype],
                "cases": cases,
            }
            written += [path.name for path in tables.plot(part, folder)]
    grids = {w: [c for c in data["cases"] if c["set"] == f"grid, {w}"] for w in ("forward", "backward")}
    if any(grids.values()):
        written.append(_grid(grids, data, folder / "grid.png"))
    return written


def _products(data: dict[str, Any], path: Path) -> list[str]:
    """Y = W X of one size against the stored share, a panel a block: the size with most sparsities."""
    forward = [case for case in data["matmul"]["cases"] if case["operation"] == "forward" and "density" in case]
    groups = {(case["size"], case["dtype"]): [] for case in forward}
    for case in forward:
        groups[case["size"], case["dtype"]].append(case)
    if not groups:
        return []
    (size, dtype), cases = max(groups.items(), key=lambda group: (len(group[1]), group[0]))
    blocks = sorted({case["block"] for case in cases})
    unit, factor = unit_of(data)
    figure, axes = _figure(2 + 4 * len(blocks), 4.2, len(blocks))
    for ax, block in zip(axes, blocks, strict=True):
        here = sorted((case for case in cases if case["block"] == block), key=lambda case: case["density"])
        product_plots.lines(ax, here, factor)
        ax.set_title(f"W X, {size:,}, blocks of {block}, {dtype}", fontsize=10)
        ax.set_xlabel("stored share of the blocks")
        ax.grid(color="#e4e4e0")
    axes[0].set_ylabel(f"useful {unit}")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    return [_save(figure, path)]


def _grid(grids: dict[str, list[dict[str, Any]]], data: dict[str, Any], path: Path) -> str:
    """Useful TFLOP/s against the share of blocks that are skipped, a line a length; dashed: FlexAttention."""
    figure, axes = _figure(10, 4.2, 2)
    for ax, (which, cases) in zip(axes, grids.items(), strict=True):
        for i, length in enumerate(sorted({case["length"] for case in cases})):
            here = sorted((c for c in cases if c["length"] == length), key=lambda case: case["density"])
            for name, style in (("jax_bsk", "-o"), ("flex", "--s")):
                points = []
                for case in here:
                    one = case["jax_bsk"] if name == "jax_bsk" else case["peers"].get(name, {})
                    if "seconds" in one:
                        points.append((1 - case["density"], one["useful_flops_per_second"] / 1e12))
                if points:
                    label = f"{length:,} tokens" if name == "jax_bsk" else None
                    ax.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4, label=label)
        ax.axhline(max(data["matrix_flops_per_second"].values()) / 1e12, color="#999999", linewidth=0.8)
        ax.set_title(f"{which} (dashed: FlexAttention)", fontsize=10)
        ax.set_xlabel("share of blocks skipped")
        ax.grid(color="#e4e4e0")
    axes[0].set_ylabel("useful TFLOP/s")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    return _save(figure, path)
