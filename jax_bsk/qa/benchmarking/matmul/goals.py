"""What the products are to reach on an H200 (bfloat16, 8192^3, 78 % of the blocks not stored) and on two CPU cores.

A dense product that stores W's zeros toggles fewer bits than one of random numbers, and a GPU under its power limit
runs it faster: goals against the dense product are judged against both.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.matmul.cases import Config, Operation
from jax_bsk.qa.benchmarking.matmul.operation import CUSPARSE, DENSE, DENSE_RANDOM, TORCH_BSR

H200 = "NVIDIA H200"


class Measure(enum.Enum):
    """What is compared; the value names it in a report, with the contender for "{}"."""

    RATE = "useful TFLOP/s"
    RATE_SHARE = "useful rate / the full rate of {}"
    SPEEDUP = "times faster than {}"
    FORWARD_SHARE = "rate / the forward's"


@dataclasses.dataclass(frozen=True)
class Goal:
    """One number to reach.

    Attributes:
      device: that it is for: part of a GPU's name, or "2 cores" of a CPU.
      config, operation: the case.
      measure: what is compared.
      least: of it; TFLOP/s or a ratio.
      against: the contender that it is compared with.
    """

    device: str
    config: Config
    operation: Operation
    measure: Measure
    least: float
    against: str | None = None


_128, _64 = (Config(8192, 0.78, block, "bfloat16") for block in (128, 64))
_CPU = Config(2048, 0.78, 64, "float32")
_FORWARD, _DATA = Operation.FORWARD, Operation.DATA_GRADIENT
GOALS = (
    Goal(H200, _128, _FORWARD, Measure.RATE, 650),
    *(Goal(H200, _128, _FORWARD, Measure.RATE_SHARE, 0.85, name) for name in (DENSE, DENSE_RANDOM)),
    *(Goal(H200, _128, _FORWARD, Measure.SPEEDUP, 3.8, name) for name in (DENSE, DENSE_RANDOM)),
    Goal(H200, _128, _FORWARD, Measure.SPEEDUP, 2, TORCH_BSR),
    Goal(H200, _128, _FORWARD, Measure.SPEEDUP, 100, CUSPARSE),
    Goal(H200, _64, _FORWARD, Measure.RATE, 400),
    *(Goal(H200, config, _DATA, Measure.FORWARD_SHARE, 0.7) for config in (_128, _64)),
    Goal("2 cores", _CPU, _FORWARD, Measure.SPEEDUP, 3, DENSE),
)


def judge(cases: Sequence[dict[str, Any]], device: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a goal for this device: {"case", "measure", "least", "measured", "verdict"}.

    Verdicts are "met", "missed" (also where jax_bsk has no time) and "open" where the case or what it is compared with
    was not measured.

    Args:
      cases: records of `measure`.
      device: of `environment.devices()`.
    """
    here = f"{device['cores']} cores" if "cores" in device else device["name"]
    return [_judge(goal, cases) for goal in GOALS if goal.device in here]


def _judge(goal: Goal, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    config = goal.config
    name = f"{goal.operation.value} {config.size} sparsity {config.sparsity:g} block {config.block} {config.dtype}"
    case, forward = (_find(cases, config, operation) for operation in (goal.operation, Operation.FORWARD))
    contenders = {} if case is None else case["contenders"]
    mine, peer = contenders.get(OURS, {}), contenders.get(goal.against, {})
    if goal.measure is Measure.FORWARD_SHARE:
        peer = {} if forward is None else forward["contenders"].get(OURS, {})
    measured = None
    if "seconds" in mine and goal.measure is Measure.RATE:
        measured = mine["useful_flops_per_second"] / 1e12
    elif "seconds" in mine and "seconds" in peer:
        measured = peer["seconds"] / mine["seconds"]  # of the same useful operations, the ratio of rates
        if goal.measure is Measure.RATE_SHARE:
            measured *= config.density
    if measured is not None:
        verdict = "met" if measured >= goal.least else "missed"
    else:
        verdict = "missed" if case is not None and "seconds" not in mine else "open"
    text = goal.measure.value.format(goal.against)
    return {"case": name, "measure": text, "least": goal.least, "measured": measured, "verdict": verdict}


def _find(cases: Sequence[dict[str, Any]], config: Config, operation: Operation) -> dict[str, Any] | None:
    wanted = {"operation": operation.value, "size": config.size, "sparsity": config.sparsity}
    wanted |= {"block": config.block, "dtype": config.dtype}
    return next((case for case in cases if all(case[key] == value for key, value in wanted.items())), None)
