"""Searching and summing short sorted lists on a device in few kernels: no sort, no scan, no loop."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import of_rank

# Elements that are summed against each other at a time by `sums_before`.
_CHUNK = 128


def last_at_most(starts: Any, values: Any, xp: ModuleType) -> Any:
    """int32 of the shape of `values`: the last index of `starts` [n], ascending, whose number is at most the value.

    -1 where there is none. Traced, it is a bisection whose steps are written out: a chain of gathers that XLA fuses
    with what uses it, where `jnp.searchsorted` is a loop or a sort.
    """
    if xp is np:
        return (np.searchsorted(starts, values, side="right") - 1).astype(np.int32)
    size = starts.shape[0]
    levels = size.bit_length()
    padded = jnp.pad(starts, (0, 2**levels - size), constant_values=np.iinfo(np.int32).max)
    found = jnp.zeros_like(values)
    for level in reversed(range(levels)):
        more = found + np.int32(2**level)
        found = jnp.where(padded.at[more - 1].get(mode="promise_in_bounds") <= values, more, found)
    return found - 1


def sums_before(counts: Any) -> Any:
    """int32 [..., n]: the sum of the elements before each, of int32 [..., n].

    Every element is compared with those of its chunk, which is one fused reduction; XLA's prefix sums are a kernel for
    each power of two.
    """
    size = counts.shape[-1]
    chunks = -(-size // _CHUNK)
    if chunks <= 1:
        return (counts[..., None, :] * _before(size, counts.ndim)).sum(-1, dtype=np.int32)
    split = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, chunks * _CHUNK - size)])
    split = split.reshape(*counts.shape[:-1], chunks, _CHUNK)
    within = (split[..., None, :] * _before(_CHUNK, split.ndim)).sum(-1, dtype=np.int32)
    whole = sums_before(split.sum(-1, dtype=np.int32))
    return (within + whole[..., None]).reshape(*counts.shape[:-1], chunks * _CHUNK)[..., :size]


def greatest_before(values: Any) -> Any:
    """int32 [..., n]: the greatest of the elements before each, of int32 [..., n] that are not negative; 0 before all."""
    return (values[..., None, :] * _before(values.shape[-1], values.ndim)).max(-1)


def _before(size: int, rank: int) -> Any:
    """int32 [..., n, n], 1 where the column is before the row; computed by the reduction that reads it."""
    index = jnp.arange(size, dtype=np.int32)
    return of_rank((index[None, :] < index[:, None]).astype(np.int32), rank + 1)
