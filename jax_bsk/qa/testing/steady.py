"""Gradients taken again and again: every bit must be the same, whatever else the machine does meanwhile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask


@dataclasses.dataclass(frozen=True)
class Steady:
    """A call whose gradients are repeated: more tiles than multiprocessors, few enough for a thousand repeats.

    Attributes:
      density: of random whole blocks, a mask a head; None: causal, a window and global tokens.
      partial: random elements in nearly every block instead.
      options: further arguments of `sparse_attention`.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 128
    density: float | None = 0.5
    partial: bool = False
    dtype: str = "bfloat16"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def inputs(self) -> list[jax.Array]:
        """Query, key, value and the output's cotangent."""
        rng = np.random.default_rng(0)
        lengths_and_heads = (self.q_len, self.heads), (self.kv_len, self.kv_heads)
        shapes = [(self.batch, *lengths_and_heads[i], self.head_dim) for i in (0, 1, 1, 0)]
        return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(self.dtype) for shape in shapes]

    def mask(self) -> BlockMask:
        lengths, rng = (self.q_len, self.kv_len), np.random.default_rng(0)
        if self.partial:
            return BlockMask.from_dense(rng.random((self.heads, *lengths)) < 0.3, block_size=self.block_size)
        if self.density is None:
            mask = CausalMask() & (LocalMask((700, 0)) | GlobalMask(20))
            return mask.bind(*lengths, block_size=self.block_size)
        shape = [-(-n // self.block_size) for n in lengths]
        blocks = rng.random((self.heads, *shape)) < self.density
        return BlockMask.from_block_mask(blocks, q_len=self.q_len, kv_len=self.kv_len, block_size=self.block_size)


STEADY = {
    "d128": Steady(2, 2048, 2048, 16, 16, 128),  # 512 tiles of 128 keys
    "d128-gqa": Steady(2, 1500, 1900, 16, 4, 128),
    "d128-partial": Steady(1, 1000, 1100, 8, 8, 128, partial=True),
    "d64-blocks-64": Steady(2, 2048, 2048, 16, 16, 64, 64, density=0.3),
    "d64-mqa": Steady(3, 1500, 1500, 16, 1, 64),
    "d96": Steady(2, 1024, 1024, 16, 16, 96),
    "d256": Steady(1, 1500, 1500, 16, 8, 256, density=0.4),
    "causal-lengths-sinks": Steady(
        4,
        1900,
        1900,
        16,
        8,
        128,
        density=None,
        options={
            "key_value_seq_lengths": np.array([1900, 777, 128, 1]),
            "sinks": np.linspace(-1, 1, 16, dtype=np.float32),
        },
    ),
    "f16-soft-cap": Steady(2, 1500, 1500, 16, 16, 128, dtype="float16", options={"logits_soft_cap": 20.0}),
    "float32": Steady(1, 600, 600, 8, 8, 64, dtype="float32"),
}


def repeats_are_equal(case: Steady, implementation: str, repeats: int) -> bool:
    """Whether output and gradients of `repeats` calls have the bits of the first, which must be finite.

    Raises:
      FloatingPointError: they are not finite.
    """
    mask, options = case.mask(), case.options

    @jax.jit
    def step(query, key, value, dout):
        def attend(*inputs):
            return sparse_attention(*inputs, mask=mask, implementation=implementation, **options)  # type: ignore[arg-type]

        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(dout)

    inputs = case.inputs()
    first = step(*inputs)
    if not all(jnp.isfinite(x).all() for x in first):
        raise FloatingPointError("a result is not finite")
    same = jnp.array(True)
    for _ in range(repeats):
        same = still_same(same, step(*inputs), first)
    return bool(same)


@jax.jit
def still_same(same, actual, expected):
    """`same`, and whether all bits are. Stays on the device, so that a thousand steps need not wait for the host."""
    for a, e in zip(actual, expected, strict=True):
        bits = jnp.uint32 if a.dtype == jnp.float32 else jnp.uint16
        same &= (jax.lax.bitcast_convert_type(a, bits) == jax.lax.bitcast_convert_type(e, bits)).all()
    return same
