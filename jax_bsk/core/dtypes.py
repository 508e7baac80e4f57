"""The type in which numbers are summed that must not lose what a 16-bit type has no room for."""

from __future__ import annotations

from typing import Any

import numpy as np


def statistics_dtype(dtype: Any) -> np.dtype:
    """The statistics type of inputs of a type: float64 for float64, float32 for every other.

    The log-sum-exp, sinks, gates, means and sums have it.
    """
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)
