"""Stage benchmark: attention and block-sparse products beside their peers, every result checked before it is timed.

In one process; the products (`products`) have the last part of the stage's time to themselves.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from jax_bsk.qa.benchmarking import ceilings, gradient_cases, grid, measure, report, runs, tables
from jax_bsk.qa.benchmarking.cases import Case
from jax_bsk.qa.benchmarking.passes import Pass
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
    training = [case for case in gradient_cases.gpu_cases(seed, Pass.TRAINING) if "S8192 D128" in case.name]
    return {
        "forward": forward,
        "backward": backward,
        "forward and backward": training,
        "micro": grid.micro(seed),
        "grid, forward": grid.grid(seed, Pass.FORWARD),
        "grid, backward": grid.grid(seed, Pass.BACKWARD),
        "tiers": grid.tiers(seed),
    }


def run(settings: Settings, clock: Clock) -> StageResult:
    """Measures every set while there is time."""
    implementation = provenance.implementation()
    on_gpu = implementation == "cuda"
    sets = case_sets(settings.level, on_gpu, settings.seed)
    rates = {
        dtype: ceilings.matrix_product_rate(dtype, settings.seed)
        for dtype in sorted({case.dtype for cases in sets.values() for case in cases})
    }
    bandwidth = ceilings.copy_bandwidth()
    surroundings = report.surroundings()
    records: list[dict[str, Any]] = []
    options = {"with_peers": settings.peers, "rounds": ROUNDS[settings.level], "seed": settings.seed}
    named = [(name, case) for name, cases in sets.items() for case in cases]
    kept = Measured(settings)
    # A case has the same name in the sets of each pass.
    missing = [case for name, case in named if f"{name}: {case.name}" not in kept]
    new = runs.records(missing, implementation=implementation, **options)
    reserved = products.SECONDS[settings.level]
    with Progress(len(named) + len(products.chosen(settings.level, on_gpu)), settings.quiet) as progress:
        for name, case in named:
            key = f"{name}: {case.name}"
            progress.step(key)
            if key not in kept:
                record = next(new)
                if "seconds" in record["jax_bsk"]:
                    kept.keep(key, record)
            else:
                record = kept[key]
            measure.judge(record, surroundings["devices"][0]["name"], case.measured)
            if "useful_flops" in record:
                record["floor"] = targets.floor(record, rates[case.dtype], bandwidth)
            records.append({"set": name, **record})
            if clock.left < reserved:
                break
        device = surroundings["devices"][0]
        found, of_products = products.measure(settings, clock, implementation, device, kept, progress.step)
    _write(settings.out / "benchmark.csv", records)
    data: dict[str, Any] = surroundings | {
        "implementation": implementation,
        "method": {which.value: report.method(which) for which in Pass},
        "matrix_flops_per_second": rates,
        "copy_bytes_per_second": bandwidth,
        "cases": [_without_samples(record) for record in records],
        "tiers": grid.met_tiers([record for record in records if record["set"] == "tiers"]),
        "matmul": of_products,
        "taken_up": kept.taken_up,  # cases of an earlier run that was cut short
    }
    return StageResult("benchmark", (*_judge(records, len(named), data), *found), data)


def _judge(records: list[dict[str, Any]], total: int, data: dict[str, Any]) -> list[Check]:
    checks = []
    wrong = [r["name"] for r in records if "seconds" not in r["jax_bsk"]]
    if wrong:
        checks.append(failed("results of jax_bsk", f"wrong or none in {len(wrong)} of {len(records)}: {wrong[0]}"))
    elif len(records) < total:
        checks.append(skipped("results of jax_bsk", f"the time was over after {len(records)} of {total} cases"))
    else:
        checks.append(passed("results of jax_bsk", f"right in all {total} cases, checked before they were timed"))
    goals = {word: [r["name"] for r in records if r.get("verdict") == word] for word in ("met", "missed", "open")}
    data["goals"] = goals
    if any(goals.values()):
        text = ", ".join(f"{len(names)} {word}" for word, names in goals.items() if names)
        checks.append(passed("goals were judged", f"{text}; see the report's tables"))
    timed = {name for r in records for name, peer in r["peers"].items() if "seconds" in peer}
    if timed:
        checks.append(passed("peers", f"in the same run: {', '.join(sorted(timed))}"))
    else:
        checks.append(skipped("peers", "none could be measured", required=False))
    return checks


def _without_samples(record: dict[str, Any]) -> dict[str, Any]:
    def bare(one: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in one.items() if key not in ("samples", "check", "calls_per_sample")}

    peers = {name: bare(peer) for name, peer in record["peers"].items()}
    return record | {"jax_bsk": bare(record["jax_bsk"]), "peers": peers}


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
            for name, one in {"jax_bsk": record["jax_bsk"], **record["peers"]}.items():
                if "seconds" not in one:
                    continue
                row = [*(record.get(field, "") for field in fields), name, one["variant"]]
                row += [f"{one[key]:.4g}" for key in ("seconds", "least_seconds")]
                row += [f"{one['useful_flops_per_second'] / 1e12:.2f}", f"{one['ratio']:.3f}" if "ratio" in one else ""]
                row += [f"{record['floor'][key]:.4g}" if name == "jax_bsk" else "" for key in floors]
                writer.writerow(row)
