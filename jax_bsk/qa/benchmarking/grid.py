"""What the validation tool measures beyond the tables: small calls, lengths by sparsities, time tiers."""

from __future__ import annotations

from typing import Any

from jax_bsk.qa.benchmarking.cases import DENSE, Case, Maker, Sizes
from jax_bsk.qa.benchmarking.passes import Pass

LENGTHS = (4096, 8192, 16384, 32768)
SPARSITIES = (0.5, 0.7, 0.78, 0.9)  # shares of blocks that are skipped
TOKENS, HEADS, HEAD_DIM = 32768, 32, 128  # of every case of the grid: batch x length is constant
MICRO_HEADS = (8, 16, 32, 64, 128)

# Milliseconds in which the shape of the tiers is to be done, and the densities at which it is measured.
TIER_SHAPE: Sizes = (16, 96, 4096, 128)
TIERS = (14.0, 10.0, 7.0, 5.0)
TIER_DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.22, 0.15, 0.1)


def micro(seed: int) -> list[Case]:
    """Short sequences of many heads, half of their blocks, 20 calls in one jit."""
    make = Maker("bfloat16", seed)
    return [make.half((16, heads, 512, 64), 64, calls=20) for heads in MICRO_HEADS]


def grid(seed: int, measured: Pass) -> list[Case]:
    """Every length with every sparsity, as long as a pass takes them."""
    make = Maker("bfloat16", seed, measured)
    return [
        make.exact((TOKENS // length, HEADS, length, HEAD_DIM), 1 - sparsity, f"sparsity {sparsity:g}")
        for length in LENGTHS
        for sparsity in SPARSITIES
    ]


def tiers(seed: int) -> list[Case]:
    """The shape of the tiers in float16, dense and at falling densities."""
    make = Maker("float16", seed)
    random = [make.exact(TIER_SHAPE, density, f"density {density:g}") for density in TIER_DENSITIES]
    return [make.case(TIER_SHAPE, "dense", DENSE, 128), *random]


def met_tiers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each tier the largest density measured within it, and where the line to the next one crosses it.

    Args:
      records: of `tiers`' cases; those without a time are left out.
    """
    points = sorted((r["density"], r["jax_bsk"]["seconds"] * 1e3) for r in records if "seconds" in r["jax_bsk"])
    found = []
    for tier in TIERS:
        within = [point for point in points if point[1] <= tier]
        beyond = [point for point in points if point[1] > tier]
        entry: dict[str, Any] = {"milliseconds": tier, "met_at_density": within[-1][0] if within else None}
        entry["measured_milliseconds"] = within[-1][1] if within else None
        if within and beyond:
            (d0, t0), (d1, t1) = within[-1], beyond[0]
            entry["interpolated_density"] = d0 + (d1 - d0) * (tier - t0) / (t1 - t0)
        found.append(entry)
    return found
