"""`python -m jax_bsk bench` over a fuller grid, written to `results/`; options of the command may be added."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jax_bsk.__main__ import main

RESULTS = Path(__file__).parent / "results"
GRIDS = {
    "cpu": ("--lengths", "512", "1024", "2048", "4096"),
    "gpu": ("--lengths", "1024", "2048", "4096", "8192", "16384"),
}
COMMON = (
    *("--densities", "0.05", "0.1", "0.15", "0.23", "0.35", "0.5", "0.75", "1"),
    *("--patterns", "random", "causal", "window", "dense"),
)


def run(extra: Sequence[str]) -> int:
    """Runs the grid of this machine; an option in `extra` replaces the grid's."""
    device = jax.devices()[0]
    name = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    grid = GRIDS.get(device.platform, GRIDS["cpu"])
    return main(["bench", *grid, *COMMON, "--output", str(RESULTS / f"attention-{name}.json"), *extra])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
