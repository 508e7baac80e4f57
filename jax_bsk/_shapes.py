"""Ranks said aloud: what broadcasting would add implicitly, and `jax.numpy_rank_promotion("raise")` refuses.

Below everything else on the path of a call.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def of_rank(x: Any, rank: int) -> Any:
    """A host or JAX array with dimensions of 1 before its own, `rank` in all."""
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.expand_dims(x, tuple(range(rank - x.ndim)))
