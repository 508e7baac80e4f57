"""`describe`: what each device of a sharded sequence computes, and what travels between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.context.exchange import exchange_of
from jax_bsk.context.planning import Plan
from jax_bsk.context.visits import Visits
from jax_bsk.masks import BlockMask


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """Work and bytes of one call of `sparse_attention` over a sharded sequence.

    Attributes:
      work: int64 [shards], visited blocks of each device, over the examples and heads that the mask distinguishes.
      received: int64 [shards], bytes of keys and values that each device receives in the forward. The backward receives
        them again, and sends the gradients of as many back.
      gathered: Whether every device is sent all keys and values, because nearly all are wanted or none is known.
      steps: Number of collectives that bring the keys, and as many the values; 1 where all is gathered.
    """

    work: np.ndarray
    received: np.ndarray
    gathered: bool
    steps: int

    @property
    def balance(self) -> float:
        """Work of the busiest device over the mean: 1 is perfect, and efficiency at most its inverse."""
        return float(self.work.max() / self.work.mean()) if self.work.any() else 1.0

    def __str__(self) -> str:
        how = "all keys are gathered" if self.gathered else f"keys come in {self.steps} step" + "s" * (self.steps != 1)
        lines = [f"{self.work.size} shards, busiest at {self.balance:.3f} of the mean, {how}"]
        lines += [
            f"  shard {i}: {work:,} blocks, receives {received / 1e6:,.1f} MB"
            for i, (work, received) in enumerate(zip(self.work, self.received, strict=True))
        ]
        return "\n".join(lines)


def describe(
    mask: BlockMask | Plan,
    shards: int | None = None,
    *,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
) -> Description:
    """Says what each device computes and receives where queries, keys and values are sharded along the sequence.

    Args:
      mask: Mask of the call, or a `Plan`, whose mask and number of shards are taken.
      shards: Number of devices that the sequence is sharded over.
      kv_heads: Key/value heads per device (of one group of devices that share a sequence).
      head_dim: Head size of the keys.
      value_dim: Head size of the values; by default the keys'.
      batch: Examples per device.
      dtype: Type of keys and values.

    Returns:
      A `Description`; `print` shows it as a table.

    Raises:
      TypeError: The mask is traced.
      ValueError: The shards do not divide queries and keys into whole blocks.

    Examples:
      >>> import jax_bsk
      >>> from jax_bsk.masks import CausalMask, LocalMask
      >>> mask = (CausalMask() & LocalMask((255, 0))).bind(2048, block_size=128)
      >>> print(jax_bsk.context.describe(mask, 4, kv_heads=8, head_dim=128))
      4 shards, busiest at 1.067 of the mean, keys come in 1 step
        shard 0: 9 blocks, receives 0.0 MB
        shard 1: 12 blocks, receives 1.0 MB
        shard 2: 12 blocks, receives 1.0 MB
        shard 3: 12 blocks, receives 1.0 MB
    """
    if isinstance(mask, Plan):
        mask, shards = mask.mask, mask.shards
    if shards is None:
        raise TypeError("describe needs the number of shards: describe(mask, shards, ...)")
    visits = Visits.of(mask)
    if visits is None:
        raise TypeError("describe takes a mask of host arrays; of a traced mask, all keys are gathered")
    if mask.q_len % (shards * mask.block_q) or mask.kv_len % (shards * mask.block_kv):
        raise ValueError(
            f"{shards} shards do not divide {mask.q_len} queries and {mask.kv_len} keys into whole blocks of "
            f"{mask.block_q} and {mask.block_kv}: such keys are gathered"
        )
    work = visits.work().reshape(shards, -1).sum(1)
    exchange = exchange_of(visits, shards) if mask.q_len == mask.kv_len else None
    own = mask.nk // shards
    blocks = np.full(shards, (shards - 1) * own) if exchange is None else exchange.received()
    size = batch * kv_heads * mask.block_kv * (head_dim + (value_dim or head_dim)) * jnp.dtype(dtype).itemsize
    return Description(work, blocks * size, exchange is None, 1 if exchange is None else len(exchange.steps))
