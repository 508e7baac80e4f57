"""Stage benchmark: attention and block-sparse products beside their peers, every result checked before it is timed.

In one process; the products (`products`) have the last part of the stage's time to themselves.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_bsk.qa.benchmarking import ceilings, report, suite
from jax_bsk.qa.benchmarking.attention import cases as tables
from jax_bsk.qa.benchmarking.attention import goals
from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.operation import Attention
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.attention.tables import method
from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.matmul import goals as product_goals
from jax_bsk.qa.benchmarking.matmul import tables as product_tables
from jax_bsk.qa.benchmarking.matmul.operation import Products
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.validation import products, provenance, targets
from jax_bsk.qa.validation.measured import Measured
from jax_bsk.qa.validation.outcome import Check, StageResult, failed, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

ROUNDS = {Level.QUICK: 2, Level.FULL: 5}


def case_sets(level: Level, on_gpu: bool, seed: int) -> dict[str, list[Case]]:
    """What is measured, in groups of the report."""
    forward, backward = (tables.table(which, seed, on_gpu) for which in (Pass.FORWARD, Pass.BACKWARD))
    if level is Level.QUICK:
        chosen = ("random .22", "causal", "S512 D64 half") if on_gpu else ("random .4", "causal")
        pick = [case for case in forward if any(part in case.name for part in chosen) and "length" not in case.name]
        return {
            "forward": pick,
            "backward": [case for case in backward if any(part in case.name for part in chosen[:2])],
        }
    if not on_gpu:
        return {"forward": forward, "backward": backward}
    training = [case for case in tables.table(Pass.TRAINING, seed, on_gpu) if "S8192 D128" in case.name]
    return {
        "forward": forward,
        "backward": backward,
        "forward and backward": training,
        "micro": tables.micro(seed),
        "grid, forward": tables.grid(seed, Pass.FORWARD),
        "grid, backward": tables.grid(seed, Pass.BACKWARD),
        "tiers": tables.tiers(seed),
    }


def run(settings: Settings, clock: Clock) -> StageResult:
    """Measures every set while there is time."""
    implementation = provenance.implementation()
    on_gpu = implementation == "cuda"
    sets = case_sets(settings.level, on_gpu, settings.seed)
    surroundings = report.surroundings()
    device = surroundings["devices"][0]
    # A case has the same name in the sets of each pass.
    named = [(f"{name}: {case.name}", case) for name, cases in sets.items() for case in cases]
    of_products = products.chosen(settings.level, on_gpu)
    kept = Measured(settings, "benchmark")
    reserved = products.SECONDS[settings.level]
    records: list[dict[str, Any]] = []
    with Progress(1 + len(named) + len(of_products), settings.quiet) as progress:
        progress.step("a plain matrix product and a copy")
        rates = {
            dtype: ceilings.matrix_product_rate(dtype, settings.seed)
            for dtype in sorted({case.dtype for cases in sets.values() for case in cases})
        }
        bandwidth = ceilings.copy_bandwidth()
        operation = Attention(implementation, with_peers=settings.peers)
        for (key, case), record in zip(named, _records(settings, kept, operation, named, progress.step), strict=False):
            goals.judge(record, device["name"], case.measured)
            if "useful_flops" in record:
                record["floor"] = targets.floor(record, rates[case.dtype], bandwidth)
            records.append({"set": key.removesuffix(f": {case.name}"), **record})
            if clock.left < reserved:
                break
        by_name = [(case.name, case) for case in of_products]
        matmul = Products(implementation, lambda case: products.contenders(case, peers=settings.peers))
        deadline = time.perf_counter() + max(0.0, min(reserved, clock.left))
        told = lambda name: progress.step(f"products: {name}")  # noqa: E731
        found = list(_records(settings, kept, matmul, by_name, told, deadline))
    not_measured = [record for record in found if isinstance(record, str)]
    measured = [record for record in found if not isinstance(record, str)]
    _write(settings.out / "benchmark.csv", records)
    product_tables.write_csv(measured, settings.out / "matmul.csv")
    data: dict[str, Any] = surroundings | {
        "implementation": implementation,
        "method": {which.value: method(which) for which in Pass},
        "matrix_flops_per_second": rates,
        "copy_bytes_per_second": bandwidth,
        "cases": [report.without_samples(record) for record in records],
        "tiers": tables.met_tiers([record for record in records if record["set"] == "tiers"]),
        "matmul": {
            "method": product_tables.METHOD,
            "cases": [report.without_samples(record) for record in measured],
            "not_measured": not_measured,
            # A quick run measures no case that has one.
            "goals": product_goals.judge(measured, device) if settings.level is Level.FULL else [],
        },
        "taken_up": kept.taken_up,  # cases of an earlier run that was cut short
    }
    data["goals"] = {
        word: [record["name"] for record in records if record.get("verdict") == word]
        for word in ("met", "missed", "open")
    }
    checks = [_results("results of jax_bsk", records, len(named))]
    checks += _goals("goals", [record["verdict"] for record in records if record.get("verdict")])
    timed = {name for record in records for name, peer in record["peers"].items() if "seconds" in peer}
    if timed:
        checks.append(passed("peers", f"in the same run: {', '.join(sorted(timed))}"))
    else:
        checks.append(skipped("peers", "none could be measured", required=False))
    checks.append(_results("results of the products", measured, len(of_products)))
    checks += _goals("goals of the products", [row["verdict"] for row in data["matmul"]["goals"]])
    return StageResult("benchmark", tuple(checks), data)


def _records(
    settings: Settings,
    kept: Measured,
    operation: Any,
    named: Sequence[tuple[str, Any]],
    on_case: Callable[[str], None],
    deadline: float | None = None,
) -> Iterator[Any]:
    """The record of each case, from the run that is resumed where it has one; and why the rest was not begun."""
    missing = [case for key, case in named if key not in kept]
    new = suite.records(
        operation, missing, rounds=ROUNDS[settings.level], seed=settings.seed, deadline=deadline
    )  # fmt: skip
    for key, _ in named:
        on_case(key)
        if key in kept:
            yield kept[key]
            continue
        record = next(new, None)
        if isinstance(record, dict) and "seconds" in report.contenders(record).get(OURS, {}):
            kept.keep(key, record)
        if record is not None:
            yield record


def _results(name: str, records: Sequence[dict[str, Any]], total: int) -> Check:
    wrong = [record["name"] for record in records if "seconds" not in report.contenders(record).get(OURS, {})]
    if wrong:
        return failed(name, f"wrong or none in {len(wrong)} of {len(records)}: {wrong[0]}")
    if len(records) < total:
        return skipped(name, f"the time was over after {len(records)} of {total} cases")
    return passed(name, f"right in all {total} cases, checked before they were timed")


def _goals(name: str, verdicts: Sequence[str]) -> list[Check]:
    judged = passed(f"{name} were judged", f"{report.counts(verdicts)}; see the report's tables")
    return [judged] if verdicts else []


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """A line a contender of a case; the distance to the floor is jax_bsk's."""
    sizes = ("batch", "heads", "kv_heads", "length", "head_dim", "dtype", "block_size")
    fields = ("set", "name", "pass", *sizes, "pattern", "density", "chained_calls", "useful_flops")
    floors = ("times_floor", "seconds_per_head")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        numbers = ("seconds", "least_seconds", "tflops", "peer_over_ours")
        writer.writerow([*fields, "contender", "variant", *numbers, *floors])
        for record in records:
            for name, one in report.contenders(record).items():
                if "seconds" not in one:
                    continue
                row = [*(record.get(field, "") for field in fields), name, one["variant"]]
                row += [f"{one[key]:.4g}" for key in ("seconds", "least_seconds")]
                row += [f"{one['useful_flops_per_second'] / 1e12:.2f}", f"{one['ratio']:.3f}" if "ratio" in one else ""]
                row += [f"{record['floor'][key]:.4g}" if name == OURS else "" for key in floors]
                writer.writerow(row)
