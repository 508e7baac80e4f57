"""`describe`: what each device of a sharded sequence computes, and what travels between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.context.exchange import exchange_of
from jax_bsk.context.planning import Plan, positive
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
      by_heads: Bytes that each device would receive in the forward if heads were exchanged for the sequence (DeepSpeed
        Ulysses, arXiv 2309.14509), which balances the work; the backward moves as many. None where `heads` was not
        given, or the devices do not divide the heads.
    """

    work: np.ndarray
    received: np.ndarray
    gathered: bool
    steps: int
    by_heads: int | None = None

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
        if self.by_heads is not None:
            lines.append(f"  heads exchanged for the sequence instead: each receives {self.by_heads / 1e6:,.1f} MB")
        return "\n".join(lines)


def describe(
    mask: BlockMask | Plan,
    shards: int | None = None,
    *,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    heads: int | None = None,
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
      heads: Query heads per device, where exchanging heads for the sequence is to be compared.
      batch: Examples per device.
      dtype: Type of keys and values.

    Returns:
      A `Description`; `print` shows it as a table.

    Raises:
      TypeError: The mask is traced.
      ValueError: The shards do not divide queries and keys into whole blocks, are not those of the plan, or the lists
        are not sound (`BlockMask.check`).

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
        if shards not in (None, mask.shards):
            raise ValueError(f"the plan is one for {mask.shards} shards, got {shards}; leave the number out")
        mask, shards = mask.mask, mask.shards
    if shards is None:
        raise TypeError("describe needs the number of shards: describe(mask, shards, ...)")
    shards = positive(shards, "shards")
    visits = Visits.of(mask)
    if visits is None:
        if mask.is_host:
            mask.check()
        raise TypeError("describe takes a mask of host arrays; of a traced mask, all keys are gathered")
    if mask.q_len % (shards * mask.block_q) or mask.kv_len % (shards * mask.block_kv):
        raise ValueError(
            f"{shards} shards do not divide {mask.q_len} queries and {mask.kv_len} keys into whole blocks of "
            f"{mask.block_q} and {mask.block_kv}: such calls gather"
        )
    work = visits.work().reshape(shards, -1).sum(1)
    exchange = exchange_of(visits, shards) if mask.q_len == mask.kv_len else None
    own = mask.nk // shards
    blocks = np.full(shards, (shards - 1) * own) if exchange is None else exchange.received()
    per_token = batch * (head_dim + (value_dim or head_dim)) * jnp.dtype(dtype).itemsize  # and per head
    by_heads = None
    if heads is not None and heads % shards == 0 and kv_heads % shards == 0:
        tokens = heads * mask.q_len + kv_heads * mask.kv_len  # of query and output, of key and value
        by_heads = per_token * tokens * (shards - 1) // shards**2
    steps = 1 if exchange is None else len(exchange.steps)
    return Description(work, blocks * per_token * kv_heads * mask.block_kv, exchange is None, steps, by_heads)
