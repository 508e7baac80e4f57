"""The pictures: useful FLOP/s against density, a panel a size, a line a contender. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.report import unit_of

# One look a contender, in every panel.
_STYLES = {
    "jax_bsk": ("#c0392b", "o", "-"),
    "jax_bsk-constant": ("#e67e22", "o", "--"),
    "dense": ("#1e8449", "^", "--"),
    "dense-random": ("#7dcea0", "v", "--"),
    "torch-bsr": ("#2471a3", "s", "--"),
    "torch-bsr-tuned": ("#5dade2", "s", "-"),
    "cusparse-csr": ("#8e44ad", "D", ":"),
    "bcoo": ("#909497", "x", ":"),
    "bcsr": ("#566573", "+", ":"),
}


def plot(report: dict[str, Any], directory: Path) -> list[Path]:
    """A picture an operation, type and block; returns the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        if any("seconds" in record for record in case["contenders"].values()):
            groups.setdefault((case["operation"], case["dtype"], case["block"]), []).append(case)
    written = []
    for (operation, dtype, block), cases in groups.items():
        path = directory / f"matmul-{operation}-{dtype}-{block}.png"
        title = f"{Operation(operation).formula}, {dtype}, blocks of {block}"
        _draw(report, cases, title, path)
        written.append(path)
    return written


def _draw(report: dict[str, Any], cases: list[dict[str, Any]], title: str, path: Path) -> None:
    sizes = sorted({case["size"] for case in cases})
    figure = Figure(figsize=(2.4 + 3.4 * len(sizes), 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    axes = list(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0])
    unit, factor = unit_of(report)
    for ax, size in zip(axes, sizes, strict=True):
        lines(ax, sorted((c for c in cases if c["size"] == size), key=lambda c: c["density"]), factor)
        ax.set_title(f"{size:,}", fontsize=10)
        ax.set_xlabel("stored share of the blocks")
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        ax.set_xlim(left=0)
        ax.grid(color="#e4e4e0")
    axes[0].set_ylim(bottom=0)  # shared, and fixed once set: not before all panels are drawn
    axes[0].set_ylabel(f"useful {unit}")
    unique: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(list(unique.values()), list(unique), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{report['devices'][0]['name']}: {title}", fontsize=10)
    figure.savefig(path)


def lines(ax: Axes, cases: list[dict[str, Any]], factor: float) -> None:
    """A line a contender through its rates, over the stored share; cases sorted by it, factor: of the unit."""
    for name in dict.fromkeys(name for case in cases for name in case["contenders"]):
        found = [(case["density"], case["contenders"].get(name, {})) for case in cases]
        points = [(x, record["useful_flops_per_second"] / factor) for x, record in found if "seconds" in record]
        if points:
            colour, marker, style = _STYLES.get(name, ("#aaaaaa", ".", ":"))
            width = 2.2 if name == "jax_bsk" else 1.2
            options: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": style, "linewidth": width}
            ax.plot(*zip(*points, strict=True), markersize=5, label=name, **options)
