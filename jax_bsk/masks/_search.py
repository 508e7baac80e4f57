"""Searching and summing short sorted lists on a device in few kernels: no sort, no scan, no loop.

On a CPU, where kernels cost nothing but comparisons do, the same numbers come from bisections and prefix sums: lists of
65,536 tokens took 7 to 11 times as long by comparisons (two CPU cores).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import of_rank

# Elements that are compared with each other at a time.
_CHUNK = 128


def last_at_most(starts: Any, values: Any, xp: ModuleType) -> Any:
    """int32 of the shape of `values`: the last index of `starts` [n], ascending, whose number is at most the value.

    -1 where there is none. Traced, each value is compared with every start, or of many starts with every 128th and then
    with 128 of them: a fused reduction or two, where `jnp.searchsorted` is a loop or a sort, and a bisection that is
    written out is as many kernels as it has steps.
    """
    if xp is np:
        return (np.searchsorted(starts, values, side="right") - 1).astype(np.int32)
    return jax.lax.platform_dependent(starts, values, cpu=_last_by_bisection, default=last_by_comparison)


def _last_by_bisection(starts: Any, values: Any) -> Any:
    return jnp.searchsorted(starts, values, side="right", method="scan").astype(np.int32) - 1


def last_by_comparison(starts: Any, values: Any) -> Any:
    """`last_at_most` of accelerators."""
    size = starts.shape[0]
    if size <= 2 * _CHUNK:
        return (of_rank(starts, values.ndim + 1) <= values[..., None]).sum(-1, dtype=np.int32) - 1
    padded = jnp.pad(starts, (0, -size % _CHUNK), constant_values=np.iinfo(starts.dtype).max).reshape(-1, _CHUNK)
    chunk = jnp.maximum(last_by_comparison(padded[:, 0], values), 0)
    near = padded.at[chunk].get(mode="promise_in_bounds")
    return chunk * np.int32(_CHUNK) + (near <= values[..., None]).sum(-1, dtype=np.int32) - 1


def sums_before(counts: Any) -> Any:
    """int32 [..., n]: the sum of the elements before each, of int32 [..., n].

    Every element is compared with those of its chunk, which is one fused reduction; XLA's prefix sums are a kernel for
    each power of two.
    """
    return jax.lax.platform_dependent(counts, cpu=_sums_by_prefixes, default=sums_by_comparison)


def _sums_by_prefixes(counts: Any) -> Any:
    return jnp.cumsum(counts, -1, dtype=np.int32) - counts


def sums_by_comparison(counts: Any) -> Any:
    """`sums_before` of accelerators."""
    size = counts.shape[-1]
    chunks = -(-size // _CHUNK)
    if chunks <= 1:
        return (counts[..., None, :] * _before(size, counts.ndim)).sum(-1, dtype=np.int32)
    split = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, chunks * _CHUNK - size)])
    split = split.reshape(*counts.shape[:-1], chunks, _CHUNK)
    within = (split[..., None, :] * _before(_CHUNK, split.ndim)).sum(-1, dtype=np.int32)
    whole = sums_by_comparison(split.sum(-1, dtype=np.int32))
    return (within + whole[..., None]).reshape(*counts.shape[:-1], chunks * _CHUNK)[..., :size]


def greatest_before(values: Any) -> Any:
    """int32 [..., n]: the greatest element before each, of int32 [..., n] that are not negative; 0 for the first."""
    return jax.lax.platform_dependent(values, cpu=_greatest_by_prefixes, default=greatest_by_comparison)


def _greatest_by_prefixes(values: Any) -> Any:
    moved = jnp.pad(values[..., :-1], [(0, 0)] * (values.ndim - 1) + [(1, 0)])
    return jax.lax.cummax(moved, axis=values.ndim - 1)


def greatest_by_comparison(values: Any) -> Any:
    """`greatest_before` of accelerators."""
    return (values[..., None, :] * _before(values.shape[-1], values.ndim)).max(-1)


def _before(size: int, rank: int) -> Any:
    """int32 [..., n, n], 1 where the column is before the row; computed by the reduction that reads it."""
    index = jnp.arange(size, dtype=np.int32)
    return of_rank((index[None, :] < index[:, None]).astype(np.int32), rank + 1)
