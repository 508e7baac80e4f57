"""The two pictures: useful FLOP/s against density and against length. Needs matplotlib: imported on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from jax_bsk.qa.benchmarking.passes import Pass
from jax_bsk.qa.benchmarking.report import unit_of

# One look a peer, in every panel; what is not named here gets grey.
_STYLES = {
    "jax_bsk": ("#c0392b", "o", "-"),
    "flex": ("#2471a3", "s", "--"),
    "cudnn": ("#1e8449", "^", "--"),
    "sdpa-cudnn": ("#7dcea0", "v", ":"),
    "sdpa-flash": ("#b9770e", "v", ":"),
    "fa3-jax": ("#8e44ad", "D", ":"),
    "fa4-jax": ("#d68910", "P", ":"),
    "tokamax": ("#566573", "X", ":"),
    "xla": ("#909497", "x", ":"),
}


def plot(report: dict[str, Any], directory: Path) -> list[Path]:
    """Draws what the report has cases for; returns the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    which = _pass_of(report).value
    for key, name, draw in (("panel", f"{which}-density.png", _density), ("series", f"{which}-length.png", _length)):
        groups: dict[str, list[dict[str, Any]]] = {}
        for case in report["cases"]:
            if case.get(key) is not None and "seconds" in case["jax_bsk"]:
                groups.setdefault(case[key], []).append(case)
        if groups:
            draw(report, groups, directory / name)
            written.append(directory / name)
    return written


def _pass_of(report: dict[str, Any]) -> Pass:
    return Pass(report.get("pass", "forward"))  # older reports are of the forward and do not say so


def _density(report: dict[str, Any], groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel a shape: lines through the random masks, points for the other patterns."""
    figure, axes = _panels(report, len(groups))
    for ax, (title, cases) in zip(axes, groups.items(), strict=True):
        cases = sorted(cases, key=lambda case: case["density"])
        random = [case for case in cases if case["pattern"] == "random"]
        others = [case for case in cases if case["pattern"] != "random"]
        _lines(ax, report, random, "density", line=True)
        _lines(ax, report, others, "density", line=False)
        factor = unit_of(report)[1]
        for case in others:
            at = case["density"], case["jax_bsk"]["useful_flops_per_second"] / factor
            ax.annotate(case["pattern"], at, xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        ax.set_xscale("log")
        least, most = cases[0]["density"] / 1.4, min(cases[-1]["density"] * 1.4, 1.2)
        ax.set_xticks([x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if least <= x <= most])
        ax.set_xlim(least, most)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        ax.set_xlabel("attended share of all pairs")
        ax.set_title(title, fontsize=10)
    _finish(report, figure, axes, path, f"{_pass_of(report).title}, useful FLOP/s against density")


def _length(report: dict[str, Any], groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel a pattern."""
    figure, axes = _panels(report, len(groups))
    for ax, (title, cases) in zip(axes, groups.items(), strict=True):
        cases = sorted(cases, key=lambda case: case["length"])
        _lines(ax, report, cases, "length", line=True)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({case["length"] for case in cases}))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.set_xlabel("tokens (batch x tokens constant)")
        ax.set_title(title, fontsize=10)
    _finish(report, figure, axes, path, f"{_pass_of(report).title}, useful FLOP/s against length")


def _panels(report: dict[str, Any], count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(2.0 + 3.9 * count, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    unit, factor = unit_of(report)
    for ax in axes:
        ax.axhline(report["matrix_product_flops_per_second"] / factor, color="#999999", linewidth=0.8, label="matmul")
        ax.grid(color="#e4e4e0")
    axes[0].set_ylabel(f"useful {unit}")
    return figure, axes


def _lines(ax: Axes, report: dict[str, Any], cases: list[dict[str, Any]], key: str, line: bool) -> None:
    names = ["jax_bsk", *dict.fromkeys(name for case in cases for name in case["peers"])]
    factor = unit_of(report)[1]
    for name in names:
        points = []
        for case in cases:
            record = case["jax_bsk"] if name == "jax_bsk" else case["peers"].get(name, {})
            if "seconds" in record and record["variant"] != "unmasked":
                points.append((case[key], record["useful_flops_per_second"] / factor))
        if not points:
            continue
        colour, marker, style = _STYLES.get(name, ("#aaaaaa", ".", ":"))
        options: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
        options |= {"linestyle": style if line else "none", "fillstyle": "full" if line else "none"}
        ax.plot(*zip(*points, strict=True), linewidth=2.2 if name == "jax_bsk" else 1.2, **options)


def _finish(report: dict[str, Any], figure: Figure, axes: list[Axes], path: Path, title: str) -> None:
    axes[0].set_ylim(bottom=0)  # shared, and fixed once set: not before all panels are drawn
    unique: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(list(unique.values()), list(unique), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{report['devices'][0]['name']}, {report['options']['dtype']}: {title}", fontsize=10)
    figure.savefig(path)
