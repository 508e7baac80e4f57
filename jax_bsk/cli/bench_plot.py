"""The picture of `python -m jax_bsk bench --plot`. Matplotlib is imported here only, when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    """Useful FLOP/s against density, a panel a pass and a colour a length; jax_bsk solid, peers dashed.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with `pip install matplotlib`") from error

    unit, factor = ("TFLOP/s", 1e12) if report["devices"][0]["platform"] == "cuda" else ("GFLOP/s", 1e9)
    passes = list(dict.fromkeys(case["pass"] for case in report["cases"]))
    lengths = sorted({case["length"] for case in report["cases"]})
    figure = Figure(figsize=(5.6 * len(passes), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    styles = {"jax_bsk": ("-", "o"), "xla": ("--", "s"), "cudnn": (":", "^"), "cudnn native": ("-.", "v")}
    for ax, which in zip(axes, passes, strict=True):
        for number, length in enumerate(lengths):
            cases = sorted(
                (case for case in report["cases"] if (case["pass"], case["length"]) == (which, length)),
                key=lambda case: case["density"],
            )
            for name, (line, marker) in styles.items():
                points = [(c["density"], c["jax_bsk"] if name == "jax_bsk" else c["peers"].get(name, {})) for c in cases]
                points = [
                    (x, record["useful_flops_per_second"] / factor) for x, record in points if "seconds" in record
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    ax.plot(x, y, line, marker=marker, markersize=4, color=f"C{number}", label=f"{name}, {length} tokens")
        ceiling = report["matrix_product_flops_per_second"] / factor
        ax.axhline(ceiling, color="#999999", linewidth=0.8, label="plain matrix product")
        ax.set_title(which)
        ax.set_xlabel("attended share of all pairs")
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        ax.set_xscale("linear")
        ax.grid(color="#e4e4e0")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel(f"useful {unit}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    options = report["options"]
    figure.suptitle(
        f"{report['devices'][0]['name']}: {options['dtype']}, {options['heads']} heads of {options['head_dim']}",
        fontsize=10,
    )
    figure.savefig(path)
