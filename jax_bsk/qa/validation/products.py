"""The block-sparse products' part of the stage benchmark, and how a report shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking.matmul import cases, goals, report, suite
from jax_bsk.qa.benchmarking.matmul.cases import Case, Config, Grid, Operation
from jax_bsk.qa.benchmarking.matmul.contenders import CUSPARSE, DENSE, DENSE_RANDOM, OURS, TORCH_BSR
from jax_bsk.qa.validation.measured import Measured
from jax_bsk.qa.validation.outcome import Check, failed, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

# Of the stage's time; on an H200 compiling and checking take most of it.
SECONDS = {Level.QUICK: 30.0, Level.FULL: 90.0}
ROUNDS = {Level.QUICK: 2, Level.FULL: 5}
SIZE, SPARSITY, BLOCKS = 8192, 0.78, (128, 64)  # of the goals


def chosen(level: Level, on_gpu: bool) -> list[Case]:
    """What is measured; the goals' cases first, so that none of them is missed for want of time."""
    if level is Level.QUICK:
        size, block, dtype = (2048, 128, "bfloat16") if on_gpu else (256, 32, "float32")
        return Grid((size,), (SPARSITY,), (block,), (dtype,), (Operation.FORWARD, Operation.DATA_GRADIENT)).cases()
    if not on_gpu:
        return cases.CPU.cases()
    common: dict[str, Any] = {"blocks": BLOCKS, "dtypes": ("bfloat16",), "chained": True}
    forward = (Operation.FORWARD,)
    return [
        *Grid(sizes=(SIZE,), sparsities=(SPARSITY,), operations=tuple(Operation), **common).cases(),
        *Grid(sizes=(SIZE,), sparsities=(0.5, 0.9), operations=forward, **common).cases(),
    ]


def contenders(case: Case, *, peers: bool) -> tuple[str, ...]:
    """Who takes part: the slow ones where the goals are, cuSPARSE in the forward alone."""
    config = case.config
    names = [OURS, DENSE, DENSE_RANDOM]
    if peers and (config.size, config.sparsity) == (SIZE, SPARSITY):
        names.append(TORCH_BSR)
        if case.operation is Operation.FORWARD and config.block == BLOCKS[0]:
            names.append(CUSPARSE)
    return tuple(names)


def measure(
    settings: Settings,
    clock: Clock,
    implementation: Implementation,
    device: dict[str, Any],
    kept: Measured,
    on_case: Callable[[str], None],
) -> tuple[list[Check], dict[str, Any]]:
    """Measures while there is time; the checks, and what the report has of them."""
    wanted = chosen(settings.level, implementation == "cuda")
    seconds = max(0.0, min(SECONDS[settings.level], clock.left))
    records: list[dict[str, Any]] = []
    not_measured: list[str] = []
    new = suite.records(
        [case for case in wanted if case.name not in kept],
        lambda case: contenders(case, peers=settings.peers),
        implementation,
        rounds=ROUNDS[settings.level],
        seed=settings.seed,
        deadline=time.perf_counter() + seconds,
    )
    for case in wanted:
        on_case(f"products: {case.name}")
        record = kept[case.name] if case.name in kept else next(new, None)
        if isinstance(record, dict):
            if case.name not in kept and "seconds" in record["contenders"].get(OURS, {}):
                kept.keep(case.name, record)
            records.append(record)
        elif record is not None:  # why this one and those after it were not begun
            not_measured.append(record)
    report.write_csv(records, settings.out / "matmul.csv")
    # A quick run measures no case that has one.
    rows = goals.judge(records, device) if settings.level is Level.FULL else []
    data = {
        "method": report.METHOD,
        "cases": [_without_samples(record) for record in records],
        "not_measured": not_measured,
        "goals": rows,
    }
    return _judge(records, len(wanted), rows), data


def _judge(records: Sequence[dict[str, Any]], total: int, rows: Sequence[dict[str, Any]]) -> list[Check]:
    name = "results of the products"
    wrong = [record["name"] for record in records if "seconds" not in record["contenders"].get(OURS, {})]
    if wrong:
        checks = [failed(name, f"wrong or none in {len(wrong)} of {len(records)}: {wrong[0]}")]
    elif len(records) < total:
        checks = [skipped(name, f"the time was over after {len(records)} of {total} cases")]
    else:
        checks = [passed(name, f"right in all {total} cases, checked before they were timed")]
    if rows:
        verdicts = [row["verdict"] for row in rows]
        counts = {word: verdicts.count(word) for word in ("met", "missed", "open")}
        text = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
        checks.append(passed("goals of the products were judged", f"{text}; see the report's tables"))
    return checks


def _without_samples(record: dict[str, Any]) -> dict[str, Any]:
    left_out = ("samples", "check", "calls_per_sample")
    bare = {
        name: {key: value for key, value in one.items() if key not in left_out}
        for name, one in record["contenders"].items()
    }
    return record | {"contenders": bare}


# ---- For people

COLUMNS = ("product", "size", "sparsity", "block", "type", "time", "TFLOP/s", "of dense's rate")
PEERS = {DENSE: "dense", DENSE_RANDOM: "dense, random", TORCH_BSR: "torch BSR", CUSPARSE: "cuSPARSE CSR"}


def rows(found: Sequence[dict[str, Any]], milliseconds: Callable[[float], str]) -> list[list[str]]:
    """A row a case: `COLUMNS`, then the times of `PEERS` as multiples of jax_bsk's."""
    lines = []
    for case in found:
        config = Config(case["size"], case["sparsity"], case["block"], case["dtype"])
        head = [Operation(case["operation"]).formula, f"{config.size:,}", f"{config.sparsity:.0%}".replace("%", " %")]
        head += [str(config.block), config.dtype]
        mine = case["contenders"].get(OURS, {})
        if "seconds" not in mine:
            lines.append([*head, *["-"] * (3 + len(PEERS))])
            continue
        peers = [case["contenders"].get(name, {}) for name in PEERS]
        of_dense = f"{peers[0]['seconds'] / mine['seconds'] * config.density:.2f}" if "seconds" in peers[0] else "-"
        cells = [milliseconds(mine["seconds"]), f"{mine['useful_flops_per_second'] / 1e12:.3g}", of_dense]
        lines.append([*head, *cells, *(_multiple(peer, mine) for peer in peers)])
    return lines


def _multiple(peer: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """A peer's time as a multiple of jax_bsk's."""
    if "seconds" not in peer:
        return "-"
    ratio = peer["seconds"] / mine["seconds"]
    return f"{ratio:.{2 if ratio < 10 else 0}f}x" + (" (inexact)" if "inexact" in peer else "")


def goal_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a goal: case, goal, verdict, measured."""
    return [
        [
            row["case"],
            f"{row['measure']} >= {row['least']:g}",
            row["verdict"],
            "-" if row["measured"] is None else f"{row['measured']:.3g}",
        ]
        for row in found
    ]
