"""`plan`: an order of the tokens in which the shards of a sequence have equal work."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.context import balance
from jax_bsk.context.visits import Visits
from jax_bsk.core.arrays import as_array
from jax_bsk.masks import BlockMask
from jax_bsk.masks.orders.permutation import permuted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An order of the tokens of a sharded sequence, and the mask in that order. A pytree; `plan` makes it.

    Attributes:
      mask: `BlockMask` of the tokens in the plan's order.
      order: int32 [chunks], number of each chunk in the plan's order; shard i has the i-th part of it.
      chunk: Tokens per chunk.
      shards: Number of shards.
    """

    mask: BlockMask
    order: np.ndarray | jax.Array
    chunk: int = dataclasses.field(metadata={"static": True})
    shards: int = dataclasses.field(metadata={"static": True})

    @property
    def positions(self) -> Any:
        """int32 [T], each token's position in the sequence, in the plan's order: for rotary embeddings."""
        return (self.order[:, None] * self.chunk + np.arange(self.chunk, dtype=np.int32)[None]).reshape(-1)

    def dispatch(self, x: Any, axis: int = 1) -> Any:
        """Puts an array's tokens into the plan's order.

        Args:
          x: Array [.., T, ..] of tokens (ids, labels, segment ids, activations), on the host or not.
          axis: Its axis of tokens.

        Returns:
          An array of the same shape and kind.

        Raises:
          ValueError: The axis has another length than the plan.
        """
        return self._take(x, axis, self.order)

    def undispatch(self, x: Any, axis: int = 1) -> Any:
        """Puts an array's tokens back into the order of the sequence; see `dispatch`."""
        xp = np if isinstance(self.order, np.ndarray) else jnp
        return self._take(x, axis, xp.argsort(self.order))

    def _take(self, x: Any, axis: int, chunks: Any) -> Any:
        x = as_array(x)
        xp: Any = np if isinstance(x, np.ndarray) and isinstance(chunks, np.ndarray) else jnp
        length = self.order.shape[0] * self.chunk
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != length:
            raise ValueError(f"the plan orders {length} tokens, got axis {axis} of an array of shape {x.shape}")
        axis %= x.ndim
        split = x.reshape(*x.shape[:axis], -1, self.chunk, *x.shape[axis + 1 :])
        return xp.take(split, chunks, axis=axis).reshape(x.shape)


def plan(
    mask: BlockMask, shards: SupportsIndex, *, chunk: SupportsIndex | None = None, exchange_cost: float = 8.0
) -> Plan:
    """Orders the tokens of a sequence so that the devices it is sharded over have equal work.

    The work of a query block is the number of key blocks it visits, which differs by orders of magnitude between the
    rows of a block-sparse mask. Chunks of whole blocks are given to the devices, as many to each, so that the visited
    blocks of the busiest come near the mean (a permutation of tokens, as MagiAttention, arXiv 2505.13211, has for dense
    attention). Contiguous parts are kept where they are balanced already: what stays together need not be sent.

    Attention of tokens in the plan's order is exact with `Plan.mask`, whatever the mask: positions are data in its
    lists.

    Args:
      mask: `BlockMask` on the host, of as many queries as keys. `mask.bind(length)` makes one of a lazy mask.
      shards: Number of devices that the sequence is sharded over. They divide the sequence into whole blocks.
      chunk: Tokens per chunk, or None for what is best.
      exchange_cost: Number of visited blocks that a device computes, forward and backward, in the time in which it
        receives one key block. On H200s it is 16 for each key/value head with a query head of its own, at head size
        128, and less by the size of the group for grouped queries.

    Returns:
      A `Plan`. It is kept with the mask, and a second call with the same arguments returns it again.

    Raises:
      ValueError: The mask has other lengths for queries and keys, or they do not divide into whole blocks, or its lists
        overflow or name blocks that there are not (`BlockMask.check`).
      TypeError: The mask is traced or no `BlockMask`.

    Examples:
      >>> import jax, jax_bsk
      >>> from jax_bsk.masks import CausalMask
      >>> plan = jax_bsk.context.plan(CausalMask().bind(1024, block_size=128), 4)
      >>> plan.order.tolist()
      [0, 7, 1, 6, 2, 5, 3, 4]
      >>> plan.dispatch(jax.numpy.arange(1024), axis=0)[128:132].tolist()
      [896, 897, 898, 899]
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"plan takes a BlockMask, got {type(mask).__name__}; a lazy mask has bind(length)")
    visits = Visits.of(mask)
    if visits is None:
        if mask.is_host:
            mask.check()  # names the row whose entries no plan could keep
        raise TypeError("plan takes a mask of host arrays, whose lists are known; this one is traced or on a device")
    shards = positive(shards, "shards")
    blocks = math.lcm(mask.block_q, mask.block_kv)
    if mask.q_len != mask.kv_len or mask.q_len % (shards * blocks):
        raise ValueError(
            f"plan takes as many queries as keys, which {shards} shards divide into whole blocks of {blocks} tokens; "
            f"got {mask.q_len} queries and {mask.kv_len} keys; pad the sequence to a multiple of {shards * blocks}"
        )
    tokens = None if chunk is None else positive(chunk, "chunk")
    if tokens is not None and (tokens % blocks or (mask.q_len // shards) % tokens):
        raise ValueError(
            f"chunk is a multiple of the blocks' {blocks} tokens that divides a shard's {mask.q_len // shards}, got "
            f"{tokens}"
        )
    plans: dict[Any, Plan] = mask.__dict__.setdefault("_plans", {})
    key = shards, tokens, exchange_cost
    if key not in plans:
        rows = None if tokens is None else tokens // mask.block_q
        unit = blocks // mask.block_q
        assigned, size = balance.assign(visits, shards, unit, chunk=rows, exchange_cost=exchange_cost)
        order, size = assigned.reshape(-1).astype(np.int32), size * mask.block_q
        plans[key] = Plan(mask.with_rows(permuted(mask, order, size), planned=True), order, size, shards)
    return plans[key]


def positive(value: SupportsIndex, name: str) -> int:
    """The number; raises ValueError where it is below 1, TypeError where it is none."""
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
