"""Sizes of a run, its masks, and what each of them lets attend to what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_bsk import BlockMask
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, SegmentMask

Attends = Callable[[int, np.ndarray], np.ndarray]  # a query and all keys (their positions) to booleans


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the problems.

    Attributes:
      lengths: Tokens of a sequence; attention at all of them, the training step at the first.
      batch: Sequences at the first length; None for as many as there are devices. Longer ones come alone.
      heads: Heads at the first length, key/value heads as many. The model has them, too.
      long_heads: Heads at the other lengths.
      layers: Layers of the model, whose width is heads times head_dim.
      loss_chunk: Tokens whose logits a device has at a time.
      cache: Positions of the cache that decoding reads, of one sequence.
      query_heads: Query heads of decoding.
      cache_heads: Key/value heads of decoding.
      memory: Bytes of a device; None for what the device says.
    """

    lengths: tuple[int, ...] = (131072,)
    batch: int | None = None
    heads: int = 8
    long_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    window: int = 4096
    global_tokens: int = 256
    dtype: str = "bfloat16"
    implementation: Any = None
    layers: int = 6
    vocabulary: int = 32768
    loss_chunk: int = 16384
    cache: int = 1 << 20
    query_heads: int = 32
    cache_heads: int = 8
    memory: float | None = None


QUICK = Sizes(
    lengths=(512,),
    heads=4,
    head_dim=16,
    block_size=32,
    window=64,
    global_tokens=16,
    dtype="float32",
    layers=1,
    vocabulary=64,
    loss_chunk=64,
    cache=256,
    query_heads=8,
    cache_heads=4,
)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How often things are measured.

    Attributes:
      rounds: Samples of each time; the median counts.
      milliseconds: Time of a sample at least, by calls that are queued and waited for once.
      repeats: Repeated calls whose bits are compared.
      repeat_seconds: Time after which no more of them are begun.
      compile_threads: Programs that are compiled at a time; None for as many as there are cores.
    """

    rounds: int = 3
    milliseconds: float = 100.0
    repeats: int = 20
    repeat_seconds: float = 10.0
    compile_threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask and the shape of a call.

    Attributes:
      name: Name of the mask.
      mask: The mask, bound.
      attends: The same without the library, for the check.
      batch: Examples.
      heads: Query heads.
      kv_heads: Key/value heads.
    """

    name: str
    mask: BlockMask
    attends: Attends
    batch: int
    heads: int
    kv_heads: int

    @property
    def length(self) -> int:
        return self.mask.q_len


GROUPED = "causal, grouped heads"  # twice the heads on a quarter of the key/value heads
MASKS = ("causal", "documents", "window", "window and global", "random 10 %", GROUPED)
DEFAULT_MASKS = MASKS[:5]


def case(name: str, length: int, batch: int, heads: int, sizes: Sizes) -> Case:
    """The case of one of `MASKS`."""
    kv_heads = heads
    if name == GROUPED:
        heads, kv_heads = 2 * heads, max(1, heads // 4)
    mask, attends = _mask(name, length, sizes)
    return Case(name, mask, attends, batch, heads, kv_heads)


def _mask(name: str, length: int, sizes: Sizes) -> tuple[BlockMask, Attends]:
    rng, block, window, first = np.random.default_rng(0), sizes.block_size, sizes.window, sizes.global_tokens
    if name == "random 10 %":
        blocks = rng.random((length // block, length // block)) < 0.1
        mask = BlockMask.from_block_mask(blocks, q_len=length, block_size=block)
        return mask, lambda query, keys: blocks[query // block, keys // block]
    causal, near = CausalMask(), LocalMask((window, 0))
    if name == "documents":
        ids = np.sort(rng.integers(0, 10, length)).astype(np.int32)
        lazy: Any = causal & SegmentMask(ids)
        return lazy.bind(length, block_size=block), lambda query, keys: (keys <= query) & (ids[keys] == ids[query])
    if name == "window":
        lazy = causal & near
        return lazy.bind(length, block_size=block), lambda query, keys: (keys <= query) & (keys >= query - window)
    if name == "window and global":
        lazy = causal & (near | GlobalMask(first))
        return lazy.bind(
            length, block_size=block
        ), lambda query, keys: (keys <= query) & ((keys >= query - window) | (keys < first) | (query < first))
    return causal.bind(length, block_size=block), lambda query, keys: keys <= query
