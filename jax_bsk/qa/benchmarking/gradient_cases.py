"""The cases of the passes with gradients, and the goals of the backward."""

from __future__ import annotations

from jax_bsk.qa.benchmarking.cases import DENSE, Case, Goal, Maker, Pattern, panel, small_patterns
from jax_bsk.qa.benchmarking.passes import Pass

# The goals of the Hopper backward, which is deterministic.
GOALS: dict[str, Goal] = {
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


def gpu_cases(seed: int, measured: Pass) -> list[Case]:
    """The table of an H200, cases of one shape beside each other."""
    make = Maker("bfloat16", seed, measured)
    middle, long = (4, 32, 8192, 128), (1, 16, 32768, 128)
    return [
        make.random(middle, ".50", 0.515, panel=panel(middle)),
        make.random(middle, ".22", 0.237, panel=panel(middle)),
        make.random(middle, ".10", 0.118, panel=panel(middle)),
        make.random(middle, ".03", 0.047, panel=panel(middle)),
        make.case(middle, "causal", Pattern("causal"), 128, panel=panel(middle)),
        make.case(middle, "dense", DENSE, 128, panel=panel(middle)),
        make.case(middle, "window 1024", Pattern("window", window=1024), 128, panel=panel(middle)),
        make.random(middle, ".22", 0.237, kv_heads=8),
        make.random(long, ".22", 0.221, panel=panel(long)),
        make.random(long, ".10", 0.103, panel=panel(long)),
        make.random(long, ".03", 0.034, panel=panel(long)),
        make.random((4, 32, 8192, 64), ".22", 0.237),
        make.random((2, 16, 8192, 256), ".22", 0.237),
        # The last: PyTorch's share in it is a captured graph, and a capture that fails may leave its context unusable.
        make.half((1, 8, 2048, 64), 64, calls=20),
    ]


def cpu_cases(seed: int, measured: Pass) -> list[Case]:
    """One small case of each sort: shows that everything runs where there is no GPU."""
    make = Maker("float32", seed, measured)
    sizes = (1, 2, 512, 32)
    return [
        *small_patterns(make, sizes),
        make.documents(sizes, 100, 64)[1],
        make.random((2, 4, 256, 32), ".4", 0.5, 64, kv_heads=2),
        make.half((1, 2, 256, 32), 64, calls=3),
    ]
