"""Stage report: report.json of everything the stages left, report.md for people, pictures.

report.json (`SCHEMA` counts its changes):

    schema       int
    verdict      "cleared", "cleared (quick)", "not cleared", or `CPU_PASSED` where JAX runs on no NVIDIA GPU
    reasons      [str], why it is not cleared
    provenance   of the code and the machine, see `provenance.collect`
    settings     of the run, without paths
    stages       {name: {verdict, seconds, budget_seconds, checks: [{name, verdict, detail, required}], data}}

Data of stages: analyse {versions, devices, gpu, matrix_flops_per_second, copy_bytes_per_second, implementations};
build {library, kernels: [{name, arch, registers, local_bytes, hopper}]}; validate {first_seed, forward_cases,
backward_cases, shapes, refused_shapes, histogram, by_dtype; matmul, decode, packed: the same of block-sparse
products, of decoding and of packed sequences}; benchmark
{cases: records of `benchmarking.measure` with `floor` (see `targets`), method, tiers, goals; matmul: {cases: records of
`benchmarking.matmul.measure` without samples, method, not_measured: [str], goals: [{case, measure, least, measured,
verdict}]}}; profile {points, counters}; harden {a part's data by its name}. Seconds,
bytes and FLOP/s are plain SI units. `matmul`, `decode` and `packed` are absent from reports of before
they were measured.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from jax_bsk.qa.validation import markdown, provenance, runner
from jax_bsk.qa.validation.analyse import GPU
from jax_bsk.qa.validation.outcome import Check, StageResult, Verdict, finite, judged, passed, skipped
from jax_bsk.qa.validation.settings import STAGES, Clock, Level, Settings

SCHEMA = 1
# Without a GPU every other check passed. No report of a machine without one is ever cleared.
CPU_PASSED = "CPU: passed; CUDA: not looked at"


def run(settings: Settings, clock: Clock) -> StageResult:
    """Puts together what lies in the folder."""
    stages = {name: result for name, result in runner.load(settings).items() if name != "report"}
    report = assemble(settings, stages)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "report.json").write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    checks = [passed("report.json")]
    pictures: list[str] = []
    if importlib.util.find_spec("matplotlib") is None:
        checks.append(skipped("pictures", "matplotlib is not installed", required=False))
    else:
        from jax_bsk.qa.validation import plots

        pictures = plots.draw(report, settings.out)
        checks.append(passed("pictures", ", ".join(pictures)))
    (settings.out / "report.md").write_text(markdown.render(report, pictures))
    checks.append(passed("report.md"))
    checks.append(_one_code(stages))
    return StageResult("report", tuple(checks), {"verdict": report["verdict"], "reasons": report["reasons"]})


def assemble(settings: Settings, stages: dict[str, StageResult]) -> dict[str, Any]:
    """The report; its verdict needs every stage, and every stage of the same code, machine and level.

    The level is the stages' own: a report that is put together later cannot raise it. Where a GPU is all that is
    missing, the verdict is `CPU_PASSED`.
    """
    reasons = [f"stage {name} was not run" for name in STAGES if name not in stages and name != "report"]
    for name, result in stages.items():
        if result.verdict is Verdict.FAILED:
            bad = [check.name for check in result.checks if check.verdict is Verdict.FAILED]
            reasons.append(f"stage {name} failed: {', '.join(bad)}")
        elif result.verdict is Verdict.SKIPPED:
            bad = [c.name for c in result.checks if c.required and c.verdict is Verdict.SKIPPED] or ["everything"]
            reasons.append(f"stage {name} skipped: {', '.join(bad)}")
    if _one_code(stages).verdict is not Verdict.PASSED:
        reasons.append("the stages are of different code or machines")
    levels = {result.provenance.get("level") for result in stages.values()}
    if reasons == [f"stage analyse skipped: {GPU}"]:
        verdict = CPU_PASSED
        reasons = ["the CUDA kernels were not looked at, because JAX runs on no NVIDIA GPU here"]
    elif reasons:
        verdict = "not cleared"
    else:
        verdict = "cleared" if levels == {Level.FULL.value} else "cleared (quick)"
    facts = {name: value for name, value in settings.to_json().items() if name not in ("out", "programs")}
    if len(levels) == 1:
        facts["level"] = levels.pop()
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reasons": reasons,
        "provenance": next((s.provenance for s in stages.values() if s.provenance), provenance.collect()),
        "settings": facts,
        "stages": {
            name: {key: value for key, value in result.to_json().items() if key not in ("stage", "provenance")}
            for name, result in stages.items()
        },
    }


def _one_code(stages: dict[str, StageResult]) -> Check:
    """Stages may be run one by one, days apart: of other code they are another report."""
    found = {
        json.dumps([result.provenance.get(key) for key in provenance.SAME])
        for result in stages.values()
        if result.provenance
    }
    return judged("stages of one code and machine", len(found) <= 1, f"{len(found)} combinations of hashes and devices")
