"""The report of a run: what it ran on, its tables, its JSON."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import subprocess
from typing import Any

import jax

from jax_bsk.qa.benchmarking import timing
from jax_bsk.qa.benchmarking.passes import Pass
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.table import table

PACKAGES = (
    *("torch", "triton", "nvidia-cudnn-cu13", "jax-cuda13-plugin", "flash-attn3-jax", "fa4-jax", "tokamax"),
    "nvidia-cutlass-dsl",
)
_ALWAYS = (
    "All contenders of a case run in one process on the same random inputs. Each is first checked: some rows of some "
    "heads against float64, every element finite; the tolerance of a row is {tolerance}. Then all are timed in rounds "
    f"that visit them in turn; a sample is as many queued calls as fill {timing.SAMPLE_SECONDS * 1e3:.0f} ms, waited "
    "for once; a time is the median over the rounds. Where chained_calls > 1 those calls are unrolled in one jit (one "
    "CUDA graph in PyTorch), each {fed}, and the time is a call's. Masks are prebuilt arguments unless the case says "
    "otherwise. {passes}Useful FLOPs: {flops} B H S^2 D x attended share of elements. A ratio is the peer's time / "
    "jax_bsk's. FlexAttention is compiled with its default options; 'unmasked' peers compute everything, without the "
    "mask."
)
_TOLERANCE = "twice the error of the same row with probabilities and output rounded to the type, and one rounding"
_GRADIENT_TOLERANCE = (
    _TOLERANCE + " (gradients: three times the error with probabilities, their gradient, output and result rounded; "
    "the rounding is of the row's largest number, at least of the median over the rows)"
)
_PASSES = {
    Pass.FORWARD: "",
    Pass.BACKWARD: (
        "Timed are the gradients of query, key and value alone: one jit returns what jax.vjp keeps, a second takes it "
        "and a random cotangent; in PyTorch autograd.grad of a graph that is kept. Peers run with their default "
        "options, which need not be deterministic; jax_bsk's gradients are bit-equal from run to run. "
    ),
    Pass.TRAINING: (
        "A call yields the output and the gradients of query, key and value for a random cotangent: jax.vjp in one "
        "jit; in PyTorch a call and autograd.grad. Peers run with their default options, which need not be "
        "deterministic; jax_bsk's gradients are bit-equal from run to run. "
    ),
}
_FED = {
    Pass.FORWARD: "output the next query",
    Pass.BACKWARD: "dquery the next cotangent",
    Pass.TRAINING: "dquery the next query",
}


def method(measured: Pass) -> str:
    """How a pass was measured, for the report."""
    return _ALWAYS.format(
        tolerance=_TOLERANCE if measured is Pass.FORWARD else _GRADIENT_TOLERANCE,
        fed=_FED[measured],
        passes=_PASSES[measured],
        flops=f"{measured.flops_of(1, 1):g}",
    )


def surroundings() -> dict[str, Any]:
    """Versions and devices."""
    versions: dict[str, str | None] = environment.versions()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = environment.devices()
    client = jax.devices()[0].client
    versions["platform"] = client.platform_version.strip().replace("\n", ", ")
    versions["driver"] = _driver() if devices[0]["platform"] == "cuda" else None
    return {"versions": versions, "devices": devices}


def _driver() -> str | None:
    """Version of the NVIDIA driver, from its own tool; None where that is absent."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout.strip() else None


def render(report: dict[str, Any]) -> str:
    """The tables and what is needed to read them."""
    cases = report["cases"]
    device, versions = report["devices"][0], report["versions"]
    unit, factor = unit_of(report)
    stack = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "driver") if versions.get(name))
    ceiling = report["matrix_product_flops_per_second"] / factor
    lines = [
        f"jax_bsk {versions['jax_bsk']} ({report['implementation']}), {environment.describe_device(device)}; {stack}; "
        f"a plain matrix product runs at {ceiling:.0f} {unit}",
        f"{Pass(report.get('pass', 'forward')).title}; ms: median of a call; density: attended share of all pairs",
        "",
        _main_table(cases, unit, factor),
    ]
    if any(case.get("peers") for case in cases):
        peers = _peer_table(cases)
        lines += ["", "Peers: ms, and their time / jax_bsk's (m: given the dense mask)", "", peers] if peers else []
    lines += ["", *_notes(cases)]
    judged = [case["verdict"] for case in cases if case["verdict"]]
    if judged:
        counts = {word: judged.count(word) for word in ("met", "missed", "open")}
        lines.append(f"Goals: {', '.join(f'{n} {word}' for word, n in counts.items() if n)}")
        if counts["open"]:
            lines.append("open: a peer that the goal names was not measured")
    wrong = sum(not case["ok"] for case in cases)
    if wrong:
        lines.append(f"WRONG: in {wrong} of {len(cases)} cases a result is beyond the tolerance, or there is none.")
    return "\n".join(lines).rstrip()


def unit_of(report: dict[str, Any]) -> tuple[str, float]:
    """Unit of FLOP/s for people, and what it stands for."""
    return ("TFLOP/s", 1e12) if report["devices"][0]["platform"] == "cuda" else ("GFLOP/s", 1e9)


def _main_table(cases: list[dict[str, Any]], unit: str, factor: float) -> str:
    rows = []
    for case in cases:
        mine = case["jax_bsk"]
        timed = "seconds" in mine
        rows.append(
            [
                case["name"],
                f"{case['density']:.3f}" if "density" in case else "-",
                _milliseconds(mine["seconds"]) if timed else "-",
                f"{mine['useful_flops_per_second'] / factor:.1f}" if timed else "-",
                case["goal"] or "",
                case["verdict"] or "",
                "ok" if case["ok"] else "WRONG",
            ]
        )
    return table(["case", "density", "ms", unit, "goal", "", "check"], rows)


def _peer_table(cases: list[dict[str, Any]]) -> str:
    """A column a peer that was timed anywhere; cases without any are left out. Empty where there is nothing."""
    names = [n for case in cases for n, r in case.get("peers", {}).items() if "seconds" in r or _wrong(r)]
    names = list(dict.fromkeys(names))
    rows = []
    for case in cases:
        cells = [_peer_cell(case["peers"].get(name, {})) if "peers" in case else "-" for name in names]
        if any(cell != "-" for cell in cells):
            rows.append([case["name"], *cells])
    return table(["case", *names], rows) if rows else ""


def _peer_cell(record: dict[str, Any]) -> str:
    if _wrong(record):
        return "WRONG"
    if "seconds" not in record:
        return "-"
    ratio = f" {record['ratio']:.2f}x" if "ratio" in record else ""
    return f"{_milliseconds(record['seconds'])}{ratio}{' m' if record['variant'].startswith('dense mask') else ''}"


def _wrong(record: dict[str, Any]) -> bool:
    return "check" in record and not record["check"]["ok"]


def _milliseconds(seconds: float) -> str:
    """Four digits that count, never an exponent."""
    value = seconds * 1e3
    digits = max(0, 3 - math.floor(math.log10(value))) if value > 0 else 3
    return f"{value:.{digits}f}"


def _notes(cases: list[dict[str, Any]]) -> list[str]:
    """Why contenders did not run, each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    lines = []
    for case in cases:
        mine = case["jax_bsk"]
        if "failed" in mine:
            lines.append(f"FAILED: jax_bsk, {case['name']}: {mine['failed']}")
        for name, record in {"jax_bsk": mine, **case.get("peers", {})}.items():
            if _wrong(record):
                check = record["check"]
                share = check["share_of_tolerance"]
                what = "is not finite" if not check["finite"] or share is None else f"is {share:.1f} of the tolerance"
                lines.append(f"WRONG: {name}, {case['name']}: the error {what}")
            if "refused" in record:
                reasons.setdefault(record["refused"], {}).setdefault(name, []).append(case["name"])
    for reason, peers in reasons.items():
        where = [f"{name} ({names[0] if len(names) == 1 else f'{len(names)} cases'})" for name, names in peers.items()]
        lines.append(f"Not measured, {reason}: {', '.join(where)}")
    return lines
