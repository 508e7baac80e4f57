"""What the sharding rules of all native calls share."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import Mesh


def factor_name(i: int) -> str:
    """Factor names are letters only."""
    return chr(97 + i // 26) + chr(97 + i % 26)


def axis_size(mesh: Mesh, axis: Any) -> int:
    names = (axis,) if isinstance(axis, str) else (axis or ())
    return math.prod(mesh.shape[name] for name in names)
