"""Questions to host and JAX arrays that every operation asks: their rank, whether they have values, and which."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# A host array, or one of JAX, which may be traced.
Array = np.ndarray | jax.Array


def of_rank(x: Any, rank: int) -> Any:
    """A host or JAX array with dimensions of 1 before its own, `rank` in all.

    What broadcasting would add implicitly is said aloud: `jax.numpy_rank_promotion("raise")` refuses the former.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.expand_dims(x, tuple(range(rank - x.ndim)))


def is_array(x: Any) -> bool:
    """Whether `x` is a host or JAX array (a tracer is one)."""
    return isinstance(x, np.ndarray | np.generic | jax.Array)


def as_array(x: Any) -> Array:
    """`x` as it is where it is a host or JAX array, else as a host array."""
    return x if is_array(x) else np.asarray(x)


def is_traced(x: Any) -> bool:
    """Whether `x` has no value yet: it is an argument of the function being traced."""
    return isinstance(x, Tracer)


def known(x: Any) -> np.ndarray | None:
    """The values of an array, or None where it has none yet or they are spread over processes."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)
