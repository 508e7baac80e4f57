"""report.md: the report for people, to be read in two minutes. Tables of Markdown, nothing measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax_bsk.qa.support import environment
from jax_bsk.qa.validation import products
from jax_bsk.qa.validation.settings import STAGES

PEERS = {"flex": "FlexAttention", "cudnn": "cuDNN (jax.nn)", "sdpa-cudnn": "cuDNN (torch)"}


def render(report: dict[str, Any], pictures: Sequence[str]) -> str:
    """The whole page."""
    stages = report["stages"]
    parts = [_head(report), _stages(stages)]
    sections: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("validate", _numerics),
        ("benchmark", _benchmark),
        ("profile", _profile),
        ("harden", _harden),
    ]
    parts += [section(stages[name]["data"]) for name, section in sections if stages.get(name, {}).get("data")]
    if pictures:
        parts.append("## Pictures\n\n" + "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def case_rows(cases: Sequence[dict[str, Any]], peers: Sequence[str] = tuple(PEERS)) -> list[list[str]]:
    """Case, density, ms, TFLOP/s, times the floor, and each peer's time over ours (m: given the dense mask)."""
    rows = []
    for case in cases:
        mine = case["jax_bsk"]
        if "seconds" not in mine:
            rows.append([case["name"], *["-"] * (4 + len(peers))])
            continue
        rate = mine["useful_flops_per_second"] / 1e12
        cells = [case["name"], share(case["density"]), milliseconds(mine["seconds"]), f"{rate:.0f}"]
        cells.append(f"{case['floor']['times_floor']:.2f}")
        rows.append(cells + [ratio(case["peers"].get(name, {})) for name in peers])
    return rows


def ratio(peer: dict[str, Any]) -> str:
    if "ratio" not in peer:
        return "-"
    return f"{peer['ratio']:.2f}x" + (" m" if peer["variant"].startswith("dense mask") else "")


def share(density: float) -> str:
    return f"{density:.1%}".replace("%", " %")


def milliseconds(seconds: float) -> str:
    """Three digits that count."""
    if seconds < 1e-4:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.3g} ms"


# ---- Sections


def _head(report: dict[str, Any]) -> str:
    facts = report["provenance"]
    gpu = report["stages"].get("analyse", {}).get("data", {}).get("gpu") or {}
    more = ", ".join(f"{key} {gpu[key]}" for key in ("driver_version", "power.limit", "clocks.max.sm") if key in gpu)
    versions = report["stages"].get("analyse", {}).get("data", {}).get("versions") or facts["versions"]
    names = ("jax_bsk", "python", "jax", "jaxlib", "torch", "nvidia-cudnn-cu13")
    rows = [
        ["device", environment.describe_device(facts["device"]) + (f"; {more}" if more else "")],
        ["versions", ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))],
        ["`csrc/` (git tree)", f"`{facts['csrc_tree']}`"],
        ["`jax_bsk/` (git tree)", f"`{facts['package_tree']}`"],
        ["library built from", f"`{facts['library_tree']}`"],
    ]
    verdict = f"**{report['verdict']}**" + "".join(f"\n- {reason}" for reason in report["reasons"])
    return f"# Validation of jax_bsk\n\n{verdict}\n\n{table(['', ''], rows)}"


def _stages(stages: dict[str, Any]) -> str:
    rows = []
    for name, stage in stages.items():
        for i, check in enumerate(stage["checks"]):
            first = [f"{name}: {STAGES[name].title}", f"{stage['seconds']:.0f} s"] if i == 0 else ["", ""]
            verdict = check["verdict"] if check["required"] else f"{check['verdict']} (not required)"
            detail = check["detail"].replace("\n", " ")[:400]
            rows.append([*first, check["name"], verdict, detail])
    more = "\n\nRegisters and local memory of every kernel: `kernels.csv`." if "build" in stages else ""
    return "## Stages\n\n" + table(["stage", "took", "check", "verdict", ""], rows) + more


def _numerics(data: dict[str, Any]) -> str:
    parts = ["## Numbers", _numbers(data), "A line a case: `numerics.csv`."]
    if "matmul" in data:
        parts += ["Block-sparse products:", _numbers(data["matmul"]), "A line a case: `numerics-matmul.csv`."]
    if "decode" in data:
        parts += ["Decoding:", _numbers(data["decode"]), "A line a case: `numerics-decode.csv`."]
    if "packed" in data:
        parts += ["Packed sequences:", _numbers(data["packed"]), "A line a case: `numerics-packed.csv`."]
    return "\n\n".join(parts)


def _numbers(data: dict[str, Any]) -> str:
    rows = [
        [dtype, str(entry["cases"]), f"{entry['max_share']:.2f}", f"{entry['mean_share']:.2f}"]
        for dtype, entry in sorted(data["by_dtype"].items())
    ]
    text = (
        f"{data['forward_cases']} random cases from seed {data['first_seed']}, {data['backward_cases']} of them with "
        f"gradients, of {data['shapes']} shapes; {data['refused_shapes']} more shapes were refused with a reason. "
        "Errors against float64 as shares of their bounds (`jax_bsk/qa/testing/tolerance.py`):"
    )
    header = ["type", "cases", "largest share of a largest error's bound", "of a mean error's"]
    return f"{text}\n\n{table(header, rows)}"


def _benchmark(data: dict[str, Any]) -> str:
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f}" for dtype, rate in data["matrix_flops_per_second"].items())
    parts = [
        "## Speed",
        f"Useful TFLOP/s count attended elements; a plain matrix product runs at {rates} TFLOP/s, a copy at "
        f"{data['copy_bytes_per_second'] / 1e12:.2f} TB/s. Floor: the larger of bytes over that bandwidth and useful "
        "operations over that rate. Peers: their time over ours, in the same run (m: given the dense mask). Every "
        "contender: `benchmark.csv`.",
    ]
    header = ["case", "density", "time", "TFLOP/s", "x floor", *PEERS.values()]
    for name in dict.fromkeys(case["set"] for case in data["cases"]):
        cases = [case for case in data["cases"] if case["set"] == name]
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n{table(header, case_rows(cases))}")
        if name == "tiers":
            parts.append(_tiers(data["tiers"], cases))
    goals = [case for case in data["cases"] if case.get("verdict")]
    if goals:
        rows = [[case["pass"], case["name"], case["goal"], case["verdict"], _got(case)] for case in goals]
        parts.append("### Goals\n\n" + table(["pass", "case", "goal", "", "measured"], rows))
    return "\n\n".join(parts + _products(data.get("matmul")))


def _products(data: dict[str, Any] | None) -> list[str]:
    """Of the products; reports of before them have none."""
    if data is None or not data["cases"]:
        return []
    text = (
        "Useful TFLOP/s count stored blocks; times of others over ours. `dense` is `jnp.dot` with the same matrix, "
        "zeros and all; a GPU under its power limit runs that faster than the random numbers of `dense, random`. Every "
        "contender: `matmul.csv`."
    )
    header = [*products.COLUMNS, *products.PEERS.values()]
    parts = ["### Block-sparse products", text, table(header, products.rows(data["cases"], milliseconds))]
    parts += [f"Not measured: {reason}." for reason in data["not_measured"]]
    if data["goals"]:
        parts.append(table(["case", "goal", "", "measured"], products.goal_rows(data["goals"])))
    return parts


def _got(case: dict[str, Any]) -> str:
    mine = case["jax_bsk"]
    if "seconds" not in mine:
        return "-"
    flex = case["peers"].get("flex", {})
    rate = f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s"
    return f"{milliseconds(mine['seconds'])}, {rate}" + (f", {flex['ratio']:.2f}x flex" if "ratio" in flex else "")


def _tiers(tiers: list[dict[str, Any]], cases: list[dict[str, Any]]) -> str:
    dense = next((case for case in cases if case["pattern"] == "dense" and "seconds" in case["jax_bsk"]), None)
    rows = []
    for tier in tiers:
        if tier["met_at_density"] is None:
            met = "at no measured density"
        else:
            met = f"{share(tier['met_at_density'])} ({tier['measured_milliseconds']:.2f} ms)"
        line = tier.get("interpolated_density")
        rows.append([f"{tier['milliseconds']:g} ms", met, "-" if line is None else share(line)])
    text = table(["tier", "met at density, measured", "density on the line between measurements"], rows)
    if dense is None:
        return text
    seconds = dense["jax_bsk"]["seconds"]
    heads = dense["batch"] * dense["heads"]
    return f"Dense: {milliseconds(seconds)}, {seconds / heads * 1e6:.2f} us a head of one example.\n\n{text}"


def _profile(data: dict[str, Any]) -> str:
    rows = [
        [
            point["pass"],
            point["name"],
            f"{point['intensity']:.0f}",
            f"{point['flops_per_second'] / 1e12:.0f}",
            f"{point['flops_per_second'] / data['matrix_flops_per_second'][point['dtype']]:.0%}".replace("%", " %"),
            f"{point['times_floor']:.2f}",
            f"{point['seconds_per_head'] * 1e6:.2f} us",
        ]
        for point in data["points"]
    ]
    header = ["pass", "case", "FLOP a byte", "TFLOP/s", "of a matrix product", "x floor", "a head"]
    parts = ["## Against the ceilings", table(header, rows)]
    if data["counters"]:
        names = [name for name in data["counters"][0] if name not in ("case", "kernel")]
        rows = [[c["case"], c["kernel"], *(f"{c[name]:.1f}" for name in names)] for c in data["counters"]]
        parts.append("Nsight Compute, per cent of the hardware's peak:\n\n" + table(["case", "kernel", *names], rows))
    elif data["counters_note"]:
        parts.append(f"No hardware counters: {data['counters_note']}.")
    return "\n\n".join(parts)


def _harden(data: dict[str, Any]) -> str:
    parts = ["## Hardening"]
    if data.get("faults"):
        rows = [[r["name"], r["fault"], r["expected"], "as defined" if r["passed"] else "NOT"] for r in data["faults"]]
        parts.append(table(["scenario", "fault", "what must happen", "happened"], rows))
    if data.get("sanitizers"):
        rows = [[tool, str(len(r["cases"])), str(len(r["failed"]))] for tool, r in data["sanitizers"].items()]
        parts.append(table(["compute-sanitizer", "cases", "failed"], rows))
    if data.get("seeded bugs"):
        rows = [
            [r["name"], r["what"], f"`{r['file']}`", f"{r['by']} ({r['how']})" if r["caught"] else "NOT CAUGHT"]
            for r in data["seeded bugs"]
        ]
        parts.append("Kernels with a bug seeded:\n\n" + table(["mutant", "bug", "file", "caught by"], rows))
    return "\n\n".join(parts) if len(parts) > 1 else ""
