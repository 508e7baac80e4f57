"""How attention was measured, and its tables."""

from __future__ import annotations

from typing import Any

from jax_bsk.qa.benchmarking import timing
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.report import is_wrong, milliseconds, unit_of, where
from jax_bsk.qa.support.table import table

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


def of_report(report: dict[str, Any]) -> list[str]:
    """A title and the tables: jax_bsk with its goals, then the peers."""
    unit, factor = unit_of(report)
    ceiling = report["matrix_product_flops_per_second"] / factor
    lines = [
        f"{where(report)}; a plain matrix product runs at {ceiling:.0f} {unit}",
        f"{Pass(report.get('pass', 'forward')).title}; ms: median of a call; density: attended share of all pairs",
        "",
        _main_table(report["cases"], unit, factor),
    ]
    peers = _peer_table(report["cases"])
    return lines + (["", "Peers: ms, and their time / jax_bsk's (m: given the dense mask)", "", peers] if peers else [])


def _main_table(cases: list[dict[str, Any]], unit: str, factor: float) -> str:
    rows = []
    for case in cases:
        mine = case[OURS]
        rate = f"{mine['useful_flops_per_second'] / factor:.1f}" if "seconds" in mine else "-"
        cells = [f"{case['density']:.3f}" if "density" in case else "-", time_of(mine), rate]
        goal = [case.get("goal") or "", case.get("verdict") or ""]
        rows.append([case["name"], *cells, *goal, "ok" if case["ok"] else "WRONG"])
    return table(["case", "density", "ms", unit, "goal", "", "check"], rows)


def time_of(record: dict[str, Any]) -> str:
    """Milliseconds of a contender that was timed."""
    return milliseconds(record["seconds"]) if "seconds" in record else "-"


def _peer_table(cases: list[dict[str, Any]]) -> str:
    """A column a peer that was timed anywhere; cases without any are left out. Empty where there is nothing."""
    names = dict.fromkeys(n for case in cases for n, r in case["peers"].items() if "seconds" in r or is_wrong(r))
    rows = [[case["name"], *(_peer_cell(case["peers"].get(name, {})) for name in names)] for case in cases]
    rows = [row for row in rows if set(row[1:]) - {"-"}]
    return table(["case", *names], rows) if rows else ""


def _peer_cell(record: dict[str, Any]) -> str:
    if is_wrong(record):
        return "WRONG"
    ratio = f" {record['ratio']:.2f}x" if "ratio" in record else ""
    masked = "seconds" in record and record["variant"].startswith("dense mask")
    return f"{time_of(record)}{ratio}{' m' if masked else ''}"
