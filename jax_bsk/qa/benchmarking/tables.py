"""Which cases a pass is measured on, and its goals."""

from __future__ import annotations

from jax_bsk.qa.benchmarking import cases, gradient_cases
from jax_bsk.qa.benchmarking.cases import Case, Goal
from jax_bsk.qa.benchmarking.passes import Pass

# The forward and backward together have none of their own.
GOALS: dict[Pass, dict[str, Goal]] = {
    Pass.FORWARD: cases.GOALS,
    Pass.BACKWARD: gradient_cases.GOALS,
    Pass.TRAINING: {},
}


def table(measured: Pass, seed: int, on_gpu: bool) -> list[Case]:
    """The cases of a pass on a GPU or a CPU."""
    if measured is Pass.FORWARD:
        return (cases.gpu_cases if on_gpu else cases.cpu_cases)(seed)
    return (gradient_cases.gpu_cases if on_gpu else gradient_cases.cpu_cases)(seed, measured)
