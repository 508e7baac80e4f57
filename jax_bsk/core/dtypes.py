"""Types that arrays are computed in, by the type of what is given."""

from __future__ import annotations

from typing import Any

import numpy as np


def statistics_dtype(*dtypes: Any) -> np.dtype:
    """The statistics type: that of log-sum-exps, sums of products, scores and gates.

    Args:
      dtypes: types of the inputs, of which there is at least one.

    Returns:
      float64 where one of them is float64, else float32.
    """
    return np.dtype(np.float64 if np.dtype(np.float64) in map(np.dtype, dtypes) else np.float32)
