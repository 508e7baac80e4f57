"""Numbers that travel to the kernels, as Python gives them; `attention` and `selection` check theirs here.

They are float32 there, but for float64 operands on the CPU, for which they are float64. What is accepted does not
depend on the type of the operands: it is what float32 carries, whose smallest (subnormal) numbers count as 0.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

_LEAST = float(np.finfo(np.float32).tiny)
MAX_SCALE = 2e38  # times log2(e), in which kernels count, it is below float32's greatest number, 3.4e38
# With a soft cap kernels take products of queries and keys times scale / cap, whose elements must be normal numbers: at
# the greatest cap what is lost, cap * 2^-126, is 1e-8 for each unit of a product. At the least cap products up to 1e8
# (with a scale of 1) are no infinities yet, the sum of two of which may be NaN.
MIN_SOFT_CAP, MAX_SOFT_CAP = 1e-30, 1e30


def number(x: Any, name: str) -> float:
    """A number that is known when tracing.

    Raises:
      TypeError: it is traced, or no number.
    """
    if isinstance(x, Tracer):
        raise TypeError(
            f"{name} is a number known when tracing, got {x}; pass a Python number, e.g. by jax.jit's static_argnames"
        )
    if isinstance(x, bool) or not isinstance(x, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} is a number, got {x!r}; pass a Python number")
    shape = getattr(x, "shape", ())
    if shape != ():
        raise TypeError(f"{name} is one number, got an array of shape {shape}; multiply the query by an array")
    value: Any = x
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf if value > 0 else -math.inf


def logits_scale(scale: Any, head_dim: int, name: str = "scale", of: str = "query") -> float:
    """The factor of the logits, 1 / sqrt(H) where None is given; `name` is what the caller calls it.

    `of` is what the caller can multiply instead.

    Raises:
      TypeError: as `number`.
      ValueError: it is NaN, or beyond what kernels compute with.
    """
    if scale is None:
        return 1 / math.sqrt(max(head_dim, 1))
    value = number(scale, name)
    if not abs(value) <= MAX_SCALE:  # nor NaN
        raise ValueError(
            f"{name} is in [{-MAX_SCALE:g}, {MAX_SCALE:g}], as it is used in float32, got {value:g}; multiply the "
            f"{of} by a part of it"
        )
    return value


def soft_cap(cap: Any, scale: float, name: str = "logits_soft_cap") -> float | None:
    """The soft cap of logits that are products of queries and keys times `scale`, or None.

    Messages call it `name`.

    Raises:
      TypeError: as `number`.
      ValueError: float32 cannot carry it, or its quotient with the scale.
    """
    if cap is None:
        return None
    value = number(cap, name)
    if not MIN_SOFT_CAP <= value <= MAX_SOFT_CAP:
        raise ValueError(
            f"{name} is in [{MIN_SOFT_CAP:g}, {MAX_SOFT_CAP:g}], as it is used in float32, got {value:g}; "
            "pass None for no cap"
        )
    if scale != 0 and not _LEAST <= abs(scale / value) <= MAX_SCALE:
        raise ValueError(
            f"scale / {name} is 0 or has a magnitude in [{_LEAST:.3g}, {MAX_SCALE:g}], as it is used in "
            f"float32, got {scale:g} / {value:g}; multiply the query by a part of the scale, or leave the cap out"
        )
    return value
