"""Which block-sparse products the stage benchmark measures, and how a report shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.matmul import cases
from jax_bsk.qa.benchmarking.matmul.cases import Case, Config, Grid, Operation
from jax_bsk.qa.benchmarking.matmul.operation import CUSPARSE, DENSE, DENSE_RANDOM, TORCH_BSR
from jax_bsk.qa.validation.settings import Level

# Of the stage's time; on an H200 compiling and checking take most of it.
SECONDS = {Level.QUICK: 30.0, Level.FULL: 90.0}
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
