"""How products were measured, their tables, and their CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_bsk.qa.benchmarking import timing
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.report import is_wrong, milliseconds, unit_of, where
from jax_bsk.qa.support.table import table

# A call that takes longer is measured once; one that would take longer than the second is left out.
SLOW_SECONDS, MOST_SECONDS = 1.0, 6.0
# A peer whose error is within so many tolerances does compute the product, only with less care. It is reported as wrong
# and timed all the same: so is cuSPARSE's product in bfloat16 (1.7 tolerances at 4,096 on an H200).
INEXACT = 8.0
METHOD = (
    "All contenders of a case run in one process on the same random numbers. Each is first checked: a row and a column "
    "of each of 256 strips against float64, every number finite; the tolerance of a row is twice the error of the "
    "exact row rounded to the type, and one rounding of its largest number (64 in float32). A peer within "
    f"{INEXACT:g} tolerances is wrong and timed all the same, no other wrong result is. Then all are timed in "
    "rounds that visit them in turn; a sample is as many queued calls as fill "
    f"{timing.SAMPLE_SECONDS * 1e3:.0f} ms, waited for once; a time is the median over the rounds. A call of more than "
    f"{SLOW_SECONDS:g} s is measured once, one that would take more than {MOST_SECONDS:g} s at the best rate of the "
    "cases before is left out. Where chained_calls > 1 those calls are unrolled in one jit (one CUDA graph in "
    "PyTorch), each fed by the one before, and the time is a call's. No cache is emptied between calls: from 8,192 on "
    "an operand of 16-bit numbers is larger than any of them. Gradients are measured alone, given what jax.vjp keeps. "
    "Useful FLOPs: 2 size^3 x stored share of the blocks, the same for the dense product, which computes everything, "
    "also where it is a gradient of the data. ratio_to_dense is the dense product's time / the contender's. PyTorch is "
    "given W^T, transposed beforehand, where it needs it; JAX's contenders are not."
)
COLUMNS = (
    *("operation", "size", "sparsity", "block", "dtype", "density", "contender", "variant", "seconds"),
    *("useful_flops_per_second", "ratio_to_dense", "chained_calls", "samples"),
    *("largest_error", "share_of_tolerance", "ok", "reason", "notes"),
)


def of_report(report: dict[str, Any]) -> list[str]:
    """A title, and a table an operation."""
    unit, factor = unit_of(report)
    lines = [
        f"Block-sparse matrix products: {where(report)}",
        f"ms: median of a call; then useful {unit}, and the dense product's time / the contender's",
    ]
    for operation in Operation:
        chosen = [case for case in report["cases"] if case["operation"] == operation.value]
        if chosen:
            lines += ["", f"{operation.value}: {operation.formula}", "", _table(chosen, factor)]
    return lines


def _table(cases: list[dict[str, Any]], factor: float) -> str:
    """A column a contender that was timed, or is wrong, anywhere."""
    records = [(name, record) for case in cases for name, record in case["contenders"].items()]
    names = list(dict.fromkeys(name for name, record in records if "seconds" in record or "check" in record))
    rows = []
    for case in cases:
        row = [str(case["size"]), f"{case['sparsity']:g}", str(case["block"]), case["dtype"]]
        row += [_cell(case["contenders"].get(name, {}), factor) for name in names]
        rows.append([*row, "ok" if case["ok"] else "WRONG"])
    return table(["size", "sparsity", "block", "type", *names, "check"], rows)


def _cell(record: dict[str, Any], factor: float) -> str:
    wrong = is_wrong(record)
    if "seconds" not in record:
        return "WRONG" if wrong else "-"
    ratio = f" {record['ratio_to_dense']:.2f}x" if "ratio_to_dense" in record else ""
    ratio += " INEXACT" if wrong else ""
    return f"{milliseconds(record['seconds'])} ({record['useful_flops_per_second'] / factor:.4g}){ratio}"


def write_csv(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """A line a contender of a case; replaced in one step."""
    draft = path.with_suffix(".part")
    with draft.open("w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        lines.writeheader()
        lines.writerows(_lines(cases))
    draft.replace(path)


def _lines(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for case in cases:
        for name, record in case["contenders"].items():
            check = record.get("check", {})
            measured = record | {"samples": len(record.get("samples", ()))}
            reason = record.get("failed", record.get("refused", ""))
            measured["notes"] = "; ".join(record.get("notes", ()))
            lines.append(case | measured | check | {"contender": name, "reason": reason, "ok": check.get("ok", "")})
    return lines
