"""Pictures of useful FLOP/s against density or length, a panel a group of cases. Needs matplotlib: imported on demand.

A line joins a contender's random masks, or all its products; its other patterns are points with their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.report import contenders, unit_of

Records = Sequence[dict[str, Any]]
# One look a contender, in every panel; what is not named here gets grey.
_STYLES = {
    OURS: ("#c0392b", "o", "-"),
    "jax_bsk-constant": ("#e67e22", "o", "--"),
    "flex": ("#2471a3", "s", "--"),
    "cudnn": ("#1e8449", "^", "--"),
    "cudnn native": ("#145a32", "v", "-."),
    "sdpa-cudnn": ("#7dcea0", "v", ":"),
    "sdpa-flash": ("#b9770e", "v", ":"),
    "fa3-jax": ("#8e44ad", "D", ":"),
    "fa4-jax": ("#d68910", "P", ":"),
    "tokamax": ("#566573", "X", ":"),
    "xla": ("#909497", "x", ":"),
    "dense": ("#1e8449", "^", "--"),
    "dense-random": ("#7dcea0", "v", "--"),
    "torch-bsr": ("#2471a3", "s", "--"),
    "torch-bsr-tuned": ("#5dade2", "s", "-"),
    "cusparse-csr": ("#8e44ad", "D", ":"),
    "bcoo": ("#909497", "x", ":"),
    "bcsr": ("#566573", "+", ":"),
}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what a report has cases for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = report["cases"]
    if any("contenders" in case for case in cases):
        return _products(report, folder)
    which = Pass(report.get("pass", "forward"))  # older reports are of the forward and do not say so
    written = []
    for key, x, draw in (("panel", "density", density), ("series", "length", _length)):
        groups = grouped(cases, lambda case, key=key: case.get(key))
        if groups:
            path = folder / f"{which.value}-{x}.png"
            title = f"{report['options']['dtype']}: {which.title}, useful FLOP/s against {x}"
            draw(report, groups, path, title)
            written.append(path)
    return written


def grouped(cases: Records, key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Cases that jax_bsk has a time of, by what they share; those that share None are left out."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for case in cases:
        if key(case) is not None and any("seconds" in record for record in contenders(case).values()):
            groups.setdefault(key(case), []).append(case)
    return groups


def density(report: dict[str, Any], groups: Mapping[str, Records], path: Path, title: str) -> None:
    """A panel a group of attention's cases: lines through the random masks, points for the other patterns."""
    figure, axes = panels(report, groups)
    for ax, cases in zip(axes, groups.values(), strict=True):
        cases = sorted(cases, key=lambda case: case["density"])
        others = [case for case in cases if case["pattern"] != "random"]
        lines(ax, report, [case for case in cases if case["pattern"] == "random"], "density")
        lines(ax, report, others, "density", joined=False)
        for case in others:
            if "seconds" in case[OURS]:
                at = case["density"], case[OURS]["useful_flops_per_second"] / unit_of(report)[1]
                ax.annotate(case["pattern"], at, xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        ax.set_xscale("log")
        least, most = cases[0]["density"] / 1.4, min(cases[-1]["density"] * 1.4, 1.2)
        ax.set_xticks([x for x in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if least <= x <= most])
        ax.set_xlim(least, most)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        ax.set_xlabel("attended share of all pairs")
    save(report, figure, axes, path, title)


def _length(report: dict[str, Any], groups: Mapping[str, Records], path: Path, title: str) -> None:
    """A panel a pattern."""
    figure, axes = panels(report, groups)
    for ax, cases in zip(axes, groups.values(), strict=True):
        lines(ax, report, sorted(cases, key=lambda case: case["length"]), "length")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({case["length"] for case in cases}))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.set_xlabel("tokens (batch x tokens constant)")
    save(report, figure, axes, path, title)


def _products(report: dict[str, Any], folder: Path) -> list[Path]:
    """A picture an operation, type and block, a panel a size."""
    written = []
    for (operation, dtype, block), cases in grouped(
        report["cases"], lambda case: (case["operation"], case["dtype"], case["block"])
    ).items():
        path = folder / f"matmul-{operation}-{dtype}-{block}.png"
        sizes = {f"{size:,}": some for size, some in sorted(grouped(cases, lambda case: case["size"]).items())}
        stored(report, sizes, path, f"{Operation(operation).formula}, {dtype}, blocks of {block}")
        written.append(path)
    return written


def stored(report: dict[str, Any], groups: Mapping[str, Records], path: Path, title: str) -> None:
    """A panel a group of products: a line a contender, over the stored share of the blocks."""
    figure, axes = panels(report, groups)
    for ax, cases in zip(axes, groups.values(), strict=True):
        lines(ax, report, sorted(cases, key=lambda case: case["density"]), "density")
        ax.set_xlabel("stored share of the blocks")
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        ax.set_xlim(left=0)
    save(report, figure, axes, path, title)


def panels(report: dict[str, Any], titles: Mapping[str, Any] | Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a title, beside each other, and the rate of a plain product where the report has it."""
    figure = Figure(figsize=(2.2 + 3.8 * len(titles), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    axes = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    unit, factor = unit_of(report)
    for ax, title in zip(axes, titles, strict=True):
        if "matrix_product_flops_per_second" in report:
            ceiling = report["matrix_product_flops_per_second"] / factor
            ax.axhline(ceiling, color="#999999", linewidth=0.8, label="matmul")
        ax.set_title(title, fontsize=10)
        ax.grid(color="#e4e4e0")
    axes[0].set_ylabel(f"useful {unit}")
    return figure, axes


def lines(ax: Axes, report: dict[str, Any], cases: Records, x: str, *, joined: bool = True) -> None:
    """The rates of each contender over a number of the cases, which are sorted by it; without lines if not joined."""
    factor = unit_of(report)[1]
    for name in dict.fromkeys(name for case in cases for name in contenders(case)):
        points = []
        for case in cases:
            record = contenders(case).get(name, {})
            if "seconds" in record and record.get("variant") != "unmasked":
                points.append((case[x], record["useful_flops_per_second"] / factor))
        if not points:
            continue
        colour, marker, style = _STYLES.get(name, ("#aaaaaa", ".", ":"))
        options: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
        options |= {"linestyle": style if joined else "none", "fillstyle": "full" if joined else "none"}
        ax.plot(*zip(*points, strict=True), linewidth=2.2 if name == OURS else 1.2, **options)


def save(report: dict[str, Any], figure: Figure, axes: Sequence[Axes], path: Path, title: str) -> None:
    """One legend for all panels, the device above them, and the file."""
    axes[0].set_ylim(bottom=0)  # shared, and fixed once set: not before all panels are drawn
    unique: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(list(unique.values()), list(unique), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{report['devices'][0]['name']}, {title}", fontsize=10)
    figure.savefig(path)
