"""What attention is to reach on an H200, and whether a measured case does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.contender import OURS


@dataclasses.dataclass(frozen=True)
class Goal:
    """What jax_bsk must reach in a case on one H200; every part that is given counts.

    Attributes:
      flops_per_second: at least so many useful ones.
      seconds: at most so long a call.
      ratios: peer -> at least so many times its time.
    """

    flops_per_second: float | None = None
    seconds: float | None = None
    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)


# The goals of the Hopper forward, and the peer's time of 5.9 ms that the documents are held against (10 times faster).
FORWARD: dict[str, Goal] = {
    "B4 H32 S8192 D128 random .22": Goal(flops_per_second=620e12, ratios={"flex": 1.55}),
    "B4 H32 S8192 D128 random .10": Goal(flops_per_second=570e12),
    "B4 H32 S8192 D128 random .03": Goal(flops_per_second=480e12),
    "B4 H32 S8192 D128 causal": Goal(flops_per_second=600e12),
    "B4 H32 S8192 D128 dense": Goal(flops_per_second=660e12),
    "B4 H32 S8192 D128 window 1024": Goal(ratios={"flex": 1.5}),
    "B1 H16 S32768 D128 random .22": Goal(flops_per_second=650e12),
    "B1 H16 S32768 D128 random .10": Goal(flops_per_second=630e12),
    "B1 H16 S32768 D128 random .03": Goal(flops_per_second=570e12),
    "B16 H96 S4096 D128 random .23": Goal(seconds=5.8e-3),
    "B16 H96 S4096 D128 random .10": Goal(seconds=3.3e-3),
    "B4 H32 S8192 D64 random .22": Goal(flops_per_second=440e12, ratios={"flex": 1.2}),
    "B1 H8 S512 D64 half of 64-blocks": Goal(seconds=5e-6),
    "B1 H8 S512 D64 half of 128-blocks": Goal(seconds=5e-6),
    "B1 H16 S1024 D64 half of 64-blocks": Goal(seconds=10e-6),
    "B1 H16 S1024 D64 half of 128-blocks": Goal(seconds=10e-6),
    "B1 H32 S2048 D64 half of 64-blocks": Goal(seconds=35e-6),
    "B1 H32 S2048 D64 half of 128-blocks": Goal(seconds=35e-6),
    "B1 H8 S512 D128 half of 64-blocks": Goal(seconds=8e-6),
    "B1 H8 S512 D128 half of 128-blocks": Goal(seconds=8e-6),
    "B64 H12 S384 D64 half of 64-blocks": Goal(ratios={"flex": 1.1, "cudnn unmasked": 1.5}),
    "B16 H96 S512 D64 dense": Goal(ratios={"cudnn": 1.0}),
    "B4 H32 S8192 D128 documents, mask in jit": Goal(seconds=0.59e-3, ratios={"fa4-jax": 10}),
}
# The goals of the Hopper backward, which is deterministic.
BACKWARD: dict[str, Goal] = {
    "B4 H32 S8192 D128 random .50": Goal(flops_per_second=530e12),
    "B4 H32 S8192 D128 random .22": Goal(flops_per_second=520e12),
    "B4 H32 S8192 D128 random .10": Goal(flops_per_second=455e12),
    "B4 H32 S8192 D128 random .03": Goal(flops_per_second=350e12),
    "B4 H32 S8192 D128 causal": Goal(flops_per_second=520e12),
    "B1 H16 S32768 D128 random .22": Goal(flops_per_second=560e12),
    "B1 H16 S32768 D128 random .10": Goal(flops_per_second=530e12),
    "B1 H16 S32768 D128 random .03": Goal(flops_per_second=470e12),
    "B4 H32 S8192 D64 random .22": Goal(ratios={"flex": 1.2}),
}
# The forward and backward together have none of their own.
GOALS: dict[Pass, dict[str, Goal]] = {Pass.FORWARD: FORWARD, Pass.BACKWARD: BACKWARD, Pass.TRAINING: {}}


def judge(record: dict[str, Any], device: str, measured: Pass = Pass.FORWARD) -> None:
    """Adds the case's goal in that pass and whether it is "met", "missed", or "open" where a peer was not timed.

    Goals are for an H200; other devices get none.
    """
    goal = GOALS[measured].get(record["name"])
    if goal is None or "H200" not in device:
        record |= {"goal": None, "verdict": None}
        return
    mine = record[OURS]
    parts: list[bool | None] = []
    if "seconds" not in mine:
        parts.append(False)
    else:
        if goal.flops_per_second is not None:
            parts.append(mine["useful_flops_per_second"] >= goal.flops_per_second)
        if goal.seconds is not None:
            parts.append(mine["seconds"] <= goal.seconds)
        for peer, least in goal.ratios.items():
            ratio = record["peers"].get(peer, {}).get("ratio")
            parts.append(None if ratio is None else ratio >= least)
    verdict = "missed" if False in parts else "open" if None in parts else "met"
    record |= {"goal": describe(goal), "verdict": verdict}


def describe(goal: Goal) -> str:
    """A goal in a few words."""
    parts = []
    if goal.flops_per_second is not None:
        parts.append(f">= {goal.flops_per_second / 1e12:g} TFLOP/s")
    if goal.seconds is not None:
        parts.append(f"<= {goal.seconds * 1e3:g} ms")
    parts += [f">= {least:g}x {peer}" for peer, least in goal.ratios.items()]
    return ", ".join(parts)
