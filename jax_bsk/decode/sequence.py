"""A contiguous cache whose positions are sharded over mesh axes: what one device attends to, and the merge of all.

Used by `cache`, inside a `shard_map`. Each device numbers its pages as those of the whole cache, so that lengths,
windows and trees mean what they mean without sharding, and lists its own pages as the ones to visit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.core.arrays import of_rank
from jax_bsk.decode.merge import merge_partials


def devices(axis_name: Any) -> int:
    """The number of devices along mesh axes of the `shard_map` around a call.

    Raises:
      ValueError: There is none.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name names mesh axes of a shard_map around the call, got {axis_name!r}; outside of one, leave it out"
        ) from None


def first_of_device(axis_name: Any, held: int) -> jax.Array:
    """The number of the first position (or page) that this device holds, where each holds so many.

    Raises:
      ValueError: There is no `shard_map` around the call.
    """
    devices(axis_name)
    return jax.lax.axis_index(axis_name) * held


def own_pages(axis_name: Any, pages: int, selection: jax.Array | None, lead: tuple[int, int]) -> tuple[Any, Any]:
    """The page table of the whole cache and the pages that this device visits.

    Args:
      axis_name: Mesh axes.
      pages: Pages that this device holds.
      selection: int32 [B, K, count], pages of the whole cache to visit, or None for all.
      lead: B and K.

    Returns:
      int32 [1, pages of all devices], -1 for what is elsewhere; int32 [B, K, count].
    """
    first = first_of_device(axis_name, pages)
    local = jnp.arange(devices(axis_name) * pages, dtype=jnp.int32) - first
    table = jnp.where((local >= 0) & (local < pages), local, -1)[None]
    if selection is None:
        return table, jnp.broadcast_to(of_rank(first + jnp.arange(pages, dtype=jnp.int32), 3), (*lead, pages))
    return table, jnp.where((selection >= first) & (selection < first + pages), selection, -1)


def own_length(axis_name: Any, positions: int, lengths: jax.Array) -> jax.Array:
    """How many of the filled positions this device holds; -1 where the length is that of no cache.

    Args:
      axis_name: Mesh axes.
      positions: Positions that this device holds.
      lengths: int32 [B], filled positions of the whole cache.
    """
    wrong = (lengths < 0) | (lengths > devices(axis_name) * positions)
    return jnp.where(wrong, -1, jnp.clip(lengths - first_of_device(axis_name, positions), 0, positions))


def of_first(axis_name: Any, sinks: jax.Array | None) -> jax.Array | None:
    """Sinks that join the softmax of one device alone."""
    return None if sinks is None else jnp.where(jax.lax.axis_index(axis_name) == 0, sinks, -jnp.inf)


def merge(axis_name: Any, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What all devices attend to, in their order; every device has the same result.

    One array travels: the outputs, in the type of the log-sum-exps, which holds them exactly, and these behind them.
    """
    packed = jnp.concatenate([out.astype(lse.dtype), lse[..., None]], axis=-1)
    parts = list(jax.lax.all_gather(packed, axis_name, to="invarying"))
    return merge_partials([x[..., :-1].astype(out.dtype) for x in parts], [x[..., -1] for x in parts])
