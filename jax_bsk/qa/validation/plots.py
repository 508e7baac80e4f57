"""Pictures of a report: roofline, error histogram, sparsity grid, density and length. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_bsk.qa.benchmarking import plots as tables
from jax_bsk.qa.benchmarking.report import contenders

_COLOURS = {"forward": "#c0392b", "backward": "#2471a3"}


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


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    return figure, figure.subplots()


def _save(figure: Figure, ax: Any, path: Path, columns: int = 1) -> str:
    ax.grid(color="#e4e4e0")
    ax.legend(fontsize=8, frameon=False, ncols=columns)
    figure.savefig(path)
    return path.name


def _roofline(data: dict[str, Any], path: Path) -> str:
    figure, ax = _figure(7, 4.5)
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
    return _save(figure, ax, path)


def _errors(data: dict[str, Any], path: Path) -> str:
    histogram = data["histogram"]
    figure, ax = _figure(7, 3.6)
    edges = np.linspace(0, 1, histogram["bins"] + 1)
    for name, counts in histogram["counts"].items():
        ax.stairs(counts, edges, label=name, linewidth=1.4)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("largest error of a result as a share of its bound (1: not right)")
    ax.set_ylabel("cases")
    return _save(figure, ax, path, columns=3)


def _benchmark(data: dict[str, Any], folder: Path) -> list[str]:
    written = []
    for which in _COLOURS:
        cases = [case for case in data["cases"] if case["set"] == which and "seconds" in case["jax_bsk"]]
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
    grids = {which: [c for c in data["cases"] if c["set"] == f"grid, {which}"] for which in _COLOURS}
    if any(grids.values()):
        written.append(_grid(grids, data, folder / "grid.png"))
    return written


def _products(data: dict[str, Any], path: Path) -> list[str]:
    """Y = W X of one size against the stored share, a panel a block: the size with most sparsities."""
    forward = [case for case in data["matmul"]["cases"] if case["operation"] == "forward" and "density" in case]
    groups = tables.grouped(forward, lambda case: (case["size"], case["dtype"]))
    if not groups:
        return []
    (size, dtype), cases = max(groups.items(), key=lambda group: (len(group[1]), group[0]))
    blocks = {f"blocks of {n}": some for n, some in sorted(tables.grouped(cases, lambda case: case["block"]).items())}
    tables.stored({"devices": data["devices"]}, blocks, path, f"{dtype}: W X, {size:,}")
    return [path.name]


def _grid(grids: dict[str, list[dict[str, Any]]], data: dict[str, Any], path: Path) -> str:
    """Useful TFLOP/s against the share of blocks that are skipped, a line a length; dashed: FlexAttention."""
    report = {
        "devices": data["devices"],
        "matrix_product_flops_per_second": max(data["matrix_flops_per_second"].values()),
    }
    figure, axes = tables.panels(report, [f"{which} (dashed: FlexAttention)" for which in grids])
    for ax, cases in zip(axes, grids.values(), strict=True):
        for i, length in enumerate(sorted({case["length"] for case in cases})):
            here = sorted((c for c in cases if c["length"] == length), key=lambda case: case["density"])
            for name, style in (("jax_bsk", "-o"), ("flex", "--s")):
                points = [
                    (1 - case["density"], one["useful_flops_per_second"] / tables.unit_of(report)[1])
                    for case in here
                    if "seconds" in (one := contenders(case).get(name, {}))
                ]
                if points:
                    label = f"{length:,} tokens" if name == "jax_bsk" else None
                    ax.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4, label=label)
        ax.set_xlabel("share of blocks skipped")
    tables.save(report, figure, axes, path, "lengths by sparsities")
    return path.name
