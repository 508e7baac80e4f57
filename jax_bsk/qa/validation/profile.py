"""Stage profile: each shape against the machine's ceilings, and the hardware's own counters where they can be read."""

from __future__ import annotations

import csv
import io
import subprocess
from typing import Any

from jax_bsk.qa.benchmarking import ceilings, suite
from jax_bsk.qa.benchmarking.attention.cases import Case, table
from jax_bsk.qa.benchmarking.attention.operation import Attention
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.support.cuda_tools import find_tool
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.validation import programs, provenance, runner, targets
from jax_bsk.qa.validation.outcome import Check, StageResult, failed, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

# Nsight Compute's name -> ours, all in per cent of what the hardware could do.
COUNTERS = {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_pipe",  # where a GPU has it
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
# Cases of cuda_check, and their kernels.
ATTENTION, MATMUL = ("ForwardKernel", "BackwardKernel"), ("ProductKernel", "SampledKernel")
COUNTED = {
    "time-d128-random": ATTENTION,
    "time-d128-causal": ATTENTION,
    "time-matmul-128": MATMUL,
    "time-matmul-64": MATMUL,
}


def run(settings: Settings, clock: Clock) -> StageResult:
    """Rooflines first, which need nothing but jax_bsk, then counters."""
    on_gpu = provenance.implementation() == "cuda"
    with Progress(2, settings.quiet) as progress:
        progress.step("rooflines")
        measured = _benchmarked(settings) or _measure(settings, on_gpu, progress)
        progress.step("hardware counters")
        counters, note = _counters(settings, clock, progress) if on_gpu else ([], "they are an NVIDIA GPU's")
    records, rates = measured["cases"], measured["matrix_flops_per_second"]
    checks = [_roofline(records, rates)]
    if counters:
        checks.append(passed("hardware counters", f"of {len(counters)} kernels"))
    else:
        checks.append(skipped("hardware counters", note, required=False))
    data = {
        "matrix_flops_per_second": rates,
        "copy_bytes_per_second": measured["copy_bytes_per_second"],
        "points": [_point(record) for record in records if "floor" in record],
        "counters": counters,
        "counters_note": note,
    }
    return StageResult("profile", tuple(checks), data)


def _benchmarked(settings: Settings) -> dict[str, Any] | None:
    """What the stage benchmark measured of this code, if it ran: single calls of its tables, both passes."""
    result = runner.load(settings).get("benchmark")
    if result is None or result.provenance != provenance.collect() | {"level": settings.level.value}:
        return None
    cases = [c for c in result.data.get("cases", ()) if c["set"] in ("forward", "backward")]
    single = [c for c in cases if c.get("chained_calls") == 1 and "length," not in c["name"]]
    return result.data | {"cases": single} if single else None


def _measure(settings: Settings, on_gpu: bool, progress: Progress) -> dict[str, Any]:
    """The same where it did not."""
    cases = chosen(settings, on_gpu)
    rates = {dtype: ceilings.matrix_product_rate(dtype, settings.seed) for dtype in {case.dtype for case in cases}}
    bandwidth = ceilings.copy_bandwidth()
    alone = Attention(provenance.implementation(), with_peers=False)
    records = []
    told = lambda case: progress.note(case.name)  # noqa: E731
    for record in suite.records(alone, cases, rounds=3, seed=settings.seed, on_case=told):
        assert isinstance(record, dict)  # there is no deadline
        if "useful_flops" in record:
            record["floor"] = targets.floor(record, rates[record["dtype"]], bandwidth)
        records.append(record)
    return {"cases": records, "matrix_flops_per_second": rates, "copy_bytes_per_second": bandwidth}


def chosen(settings: Settings, on_gpu: bool) -> list[Case]:
    """Cases of both passes: all that are single calls, or some in a quick run."""
    cases = [
        case
        for which in (Pass.FORWARD, Pass.BACKWARD)
        for case in table(which, settings.seed, on_gpu)
        if case.calls == 1 and not case.traced
    ]
    return cases if settings.level is Level.FULL else cases[:2] + [c for c in cases if c.measured is Pass.BACKWARD][:1]


def _roofline(records: list[dict[str, Any]], rates: dict[str, float]) -> Check:
    name = "roofline"
    wrong = [r["name"] for r in records if "seconds" not in r["jax_bsk"]]
    if wrong:
        return failed(name, f"no time of {wrong[0]}: its result was wrong, or there was none")
    best = max(records, key=lambda r: r["jax_bsk"]["useful_flops_per_second"])
    rate = best["jax_bsk"]["useful_flops_per_second"]
    share = rate / rates[best["dtype"]]
    return passed(name, f"{len(records)} shapes; most: {rate / 1e12:.4g} TFLOP/s, {share:.0%} of a matrix product's")


def _point(record: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "pass", "dtype", "density", "pattern", "head_dim", "length")
    mine = record["jax_bsk"]
    return (
        {key: record[key] for key in keys}
        | record["floor"]
        | {"seconds": mine["seconds"], "flops_per_second": mine["useful_flops_per_second"]}
    )


# ---- Nsight Compute


def _counters(settings: Settings, clock: Clock, progress: Progress) -> tuple[list[dict[str, Any]], str]:
    """A record a kernel, and why there is none. Of the check program: under ncu a JAX process takes minutes."""
    ncu, program = find_tool("ncu"), programs.find(settings, "cuda_check")
    if ncu is None:
        return [], "ncu is not installed"
    if program is None:
        return [], "there is no cuda_check: see the stage build"
    records, problem = [], ""
    names = list(COUNTERS)
    for case, kernels in COUNTED.items():
        for kernel in kernels:
            progress.note(f"{kernel} in {case}")
            # The clocks are the user's; the first launches warm up.
            command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", kernel]
            command += ["--launch-skip", "3", "--launch-count", "1", "--metrics"]
            try:
                result = _ncu([*command, ",".join(names), str(program), case], clock)
                if not parse(result.stdout) and len(names) == len(COUNTERS):  # ncu refuses all for one that is unknown
                    names = names[1:]
                    result = _ncu([*command, ",".join(names), str(program), case], clock)
            except subprocess.TimeoutExpired:
                return records, "ncu was not done in a minute"
            records += [{"case": case, **record} for record in parse(result.stdout)]
            lines = (result.stdout + result.stderr).splitlines()
            problem = problem or next((line.strip() for line in lines if "ERR" in line), "")
    return records, "" if records else f"ncu gave none: {problem[:200] or 'no message'}"


def _ncu(command: list[str], clock: Clock) -> subprocess.CompletedProcess[str]:
    limit = min(60, max(10, clock.left))
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)


def parse(text: str) -> list[dict[str, Any]]:
    """Kernels and their counters from ncu's raw CSV page, whose second row is units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    header, _, *rows = csv.reader(io.StringIO("\n".join(lines)))
    found = []
    for row in rows:
        cells = dict(zip(header, row, strict=False))
        values = {ours: float(cells[name].replace(",", "")) for name, ours in COUNTERS.items() if cells.get(name)}
        if values:
            found.append({"kernel": cells.get("Kernel Name", "")[:120], **values})
    return found
