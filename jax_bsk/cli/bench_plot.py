"""The picture of `python -m jax_bsk bench --plot`. Needs matplotlib, so it is imported only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_STYLES = {"jax_bsk": ("-", "o"), "xla": ("--", "s"), "cudnn": (":", "^"), "cudnn native": ("-.", "v")}


def plot(report: dict[str, Any], path: Path) -> None:
    """Useful FLOP/s against density, a panel a pass and a colour a length; jax_bsk solid, peers dashed."""
    on_cuda = report["devices"][0]["platform"] == "cuda"
    unit, factor = ("TFLOP/s", 1e12) if on_cuda else ("GFLOP/s", 1e9)
    passes = list(dict.fromkeys(case["pass"] for case in report["cases"]))
    lengths = sorted({case["length"] for case in report["cases"]})
    figure = Figure(figsize=(2.2 + 4.6 * len(passes), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    ceiling = report["matrix_product_flops_per_second"] / factor
    for ax, which in zip(axes, passes, strict=True):
        for number, length in enumerate(lengths):
            cases = [case for case in report["cases"] if (case["pass"], case["length"]) == (which, length)]
            _draw_length(ax, sorted(cases, key=lambda case: case["density"]), f"C{number}", length, factor)
        ax.axhline(ceiling, color="#999999", linewidth=0.8, label="plain matrix product")
        ax.set_title(which, fontsize=11)
        ax.set_xlabel("attended share of all pairs")
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        ax.grid(color="#e4e4e0")
    axes[0].set_ylim(bottom=0)  # shared, and fixed once set: not before all panels are drawn
    axes[0].set_ylabel(f"useful {unit}")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(list(unique.values()), list(unique), loc="outside right center", fontsize=8, frameon=False)
    options, name = report["options"], report["devices"][0]["name"]
    sizes = f"batch {options['batch']}, {options['heads']} heads of {options['head_dim']}, {options['dtype']}"
    figure.suptitle(f"{name}: {sizes}, blocks of {options['block_size']}", fontsize=10)
    figure.savefig(path)


def _draw_length(ax: Axes, cases: Sequence[dict[str, Any]], colour: str, length: int, factor: float) -> None:
    """A line through the random masks; other patterns are points with their names."""
    for name, (line, marker) in _STYLES.items():
        label = f"{name}, {length} tokens"
        x, y = [], []
        for case in cases:
            record = case["jax_bsk"] if name == "jax_bsk" else case["peers"].get(name, {})
            if "seconds" not in record:
                continue
            at = case["density"], record["useful_flops_per_second"] / factor
            if case["pattern"] == "random":
                x.append(at[0])
                y.append(at[1])
                continue
            ax.plot(*at, marker=marker, markersize=5, fillstyle="none", linestyle="none", color=colour, label=label)
            if name == "jax_bsk":
                ax.annotate(case["pattern"], at, xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
        if x:
            ax.plot(x, y, line, marker=marker, markersize=4, color=colour, label=label)
