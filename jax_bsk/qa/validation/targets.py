"""How far a measured call is from what the machine allows."""

from __future__ import annotations

from typing import Any

import numpy as np

# Tensors of [B, S, H, D] that a pass must read or write at least once, of queries' and of keys' heads, and numbers of
# four bytes a query (lse; lse and delta).
_TENSORS = {"forward": (2, 2, 1), "backward": (3, 4, 2), "training": (4, 4, 2)}


def floor(record: dict[str, Any], flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """The physical floor of a benchmark's record and the distance to it.

    The floor is the larger of the bytes that must move over the copy bandwidth and of the useful operations over the
    rate of a plain matrix product, both measured on this card. Blocks that are attended in part count by elements.

    Returns:
      bytes, intensity (useful FLOP a byte), floor_seconds, times_floor, seconds_per_head (of one head of one example).
    """
    itemsize = 4 if record["dtype"] == "float32" else 2
    of_queries, of_keys, statistics = _TENSORS[record["pass"]]
    rows = record["batch"] * record["length"]
    elements = rows * record["head_dim"] * (of_queries * record["heads"] + of_keys * record["kv_heads"])
    moved = float(elements * itemsize + 4 * statistics * rows * record["heads"])
    seconds = max(moved / bytes_per_second, record["useful_flops"] / flops_per_second)
    measured = record["jax_bsk"].get("seconds", np.nan)
    return {
        "bytes": moved,
        "intensity": record["useful_flops"] / moved,
        "floor_seconds": seconds,
        "times_floor": measured / seconds,
        "seconds_per_head": measured / (record["batch"] * record["heads"]),
    }
