"""Calls that are made again and again: every bit must be the same, whatever else the machine does meanwhile.

And the process must not grow.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BSR, BlockMask, decode, sampled_matmul, sparse_attention, sparse_matmul
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask

Step = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Attention:
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

    def operands(self) -> tuple[Any, ...]:
        return tuple(self.inputs())

    def step(self, implementation: Any) -> Step:
        """(query, key, value, dout) -> output and gradients."""
        mask = self.mask()

        @jax.jit
        def step(query, key, value, dout):
            def attend(*inputs):
                return sparse_attention(*inputs, mask=mask, implementation=implementation, **self.options)

            out, pullback = jax.vjp(attend, query, key, value)
            return out, *pullback(dout)

        return step


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight whose rows of blocks have uneven densities; `size` is M, K less a tail, `width` the tokens."""

    size: int
    width: int
    block: int
    density: float
    dtype: str = "bfloat16"
    empty_rows: int = 0  # every so many rows of blocks have none; 0 for no such row

    def operands(self) -> tuple[BSR, jax.Array, jax.Array, jax.Array]:
        """The matrix [M, K], x [K, N], dy [M, N] and tokens [N, M]."""
        rng = np.random.default_rng(0)
        shape = self.size, self.size - self.block // 2
        rows, columns = (-(-n // self.block) for n in shape)
        # From next to nothing to twice the density, the longest rows in no order.
        keep = rng.random((rows, columns)) < rng.permutation(np.linspace(0, 2 * self.density, rows))[:, None]
        if self.empty_rows:
            keep[:: self.empty_rows] = False
        indptr = np.concatenate([[0], keep.sum(1).cumsum()]).astype(np.int32)
        indices = np.nonzero(keep)[1].astype(np.int32)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(self.dtype)

        matrix = BSR(normal(indices.size, self.block, self.block), jnp.asarray(indptr), jnp.asarray(indices), shape)
        return matrix, normal(shape[1], self.width), normal(shape[0], self.width), normal(self.width, shape[0])

    def step(self, implementation: Any) -> Step:
        """(matrix, x, dy, tokens) -> W x, its gradients, tokens W, W^T dy, and the sampled product, all at once."""

        @jax.jit
        def step(matrix: BSR, x: jax.Array, dy: jax.Array, tokens: jax.Array):
            def multiply(data: Any, x: Any) -> jax.Array:
                return sparse_matmul(matrix.with_data(data), x, implementation=implementation)

            out, pullback = jax.vjp(multiply, matrix.data, x)
            left = sparse_matmul(tokens, matrix, implementation=implementation)
            back = sparse_matmul(matrix, dy, transpose=True, implementation=implementation)
            blocks = sampled_matmul(dy, x.T, matrix, implementation=implementation).data
            return out, *pullback(dy), left, back, blocks

        return step


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A serving batch: prompts among sequences of one to four tokens, their pages in random order.

    Attributes:
      prompts: tokens of each prompt, which come first.
      few: sequences of few tokens.
      longest: positions of a sequence; shorter ones are drawn.
    """

    prompts: tuple[int, ...] = (200, 70)
    few: int = 40
    longest: int = 3000
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    part: int | None = None  # keys of a part
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def operands(self) -> tuple[jax.Array, ...]:
        """q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs."""
        rng = np.random.default_rng(0)
        q_lens = np.array([*self.prompts, *rng.integers(1, 5, self.few)])
        lengths = rng.integers(q_lens, self.longest + 1)
        pages = -(-lengths // self.page_size)
        order, table = rng.permutation(pages.sum()), np.zeros((len(q_lens), -(-self.longest // self.page_size)))
        for row, count, last in zip(table, pages, np.cumsum(pages), strict=True):
            row[:count] = order[last - count : last]

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(self.dtype)

        integers = (lengths, table, np.cumsum([0, *q_lens]), [len(q_lens)])
        return (
            normal(q_lens.sum(), self.heads, self.head_dim),
            normal(pages.sum(), self.page_size, 2 * self.kv_heads, self.head_dim),
            *(jnp.asarray(np.asarray(x, np.int32)) for x in integers),
        )

    def step(self, implementation: Any) -> Step:
        """The operands -> output and log-sum-exp."""

        @jax.jit
        def step(*operands: jax.Array):
            return decode.ragged_paged_attention(
                *operands,
                sm_scale=self.head_dim**-0.5,
                keys_per_part=self.part,
                implementation=implementation,
                return_residual=True,
                **self.options,
            )

        return step


Case = Attention | Product | Decoding
ATTENTION = {
    "d128": Attention(2, 2048, 2048, 16, 16, 128),  # 512 tiles of 128 keys
    "d128-gqa": Attention(2, 1500, 1900, 16, 4, 128),
    "d128-partial": Attention(1, 1000, 1100, 8, 8, 128, partial=True),
    "d64-blocks-64": Attention(2, 2048, 2048, 16, 16, 64, 64, density=0.3),
    "d64-mqa": Attention(3, 1500, 1500, 16, 1, 64),
    "d96": Attention(2, 1024, 1024, 16, 16, 96),
    "d256": Attention(1, 1500, 1500, 16, 8, 256, density=0.4),
    "causal-lengths-sinks": Attention(
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
    "f16-soft-cap": Attention(2, 1500, 1500, 16, 16, 128, dtype="float16", options={"logits_soft_cap": 20.0}),
    "float32": Attention(1, 600, 600, 8, 8, 64, dtype="float32"),
}
# Few tiles, fewer than clusters, one row that is longest by far: what makes a cluster's two halves wait for each other.
PRODUCTS = {
    "cuda": {
        "128": Product(4096, 2048, 128, 0.22),
        "64": Product(4096, 2048, 64, 0.22),
        "128-empty-rows": Product(4096, 1024, 128, 0.05, empty_rows=3),
        "64-empty-rows": Product(2048, 520, 64, 0.05, "float16", empty_rows=3),
        "128-one-tile": Product(256, 64, 128, 0.5),
    },
    "cpu": {
        "64-float32": Product(512, 200, 64, 0.3, "float32"),
        "32-empty-rows": Product(384, 100, 32, 0.05, empty_rows=3),
    },
}
DECODING = {
    "cuda": {
        "d128": Decoding(),
        "d64-short-parts": Decoding(head_dim=64, part=64),
        "d256-window": Decoding(head_dim=256, options={"sliding_window": 700, "sink_tokens": 20}),
        "f16-mqa-pages-256": Decoding(kv_heads=1, page_size=256, dtype="float16"),
        "float32": Decoding(head_dim=64, few=8, longest=700, dtype="float32"),
    },
    "cpu": {"float32-short-parts": Decoding((40,), 6, 400, head_dim=64, dtype="float32", part=64)},
}
# By the names that workers know: of attention as above, of products and decoding with their prefixes, and those whose
# growth is watched.
STEADY: dict[str, Case] = {
    **ATTENTION,
    **{f"matmul:{name}": case for cases in PRODUCTS.values() for name, case in cases.items()},
    "small": Attention(1, 256, 256, 2, 2, 64, density=None, dtype="float32"),
    "matmul:small": Product(256, 128, 64, 0.5),
    **{f"decode:{name}": case for cases in DECODING.values() for name, case in cases.items()},
    "decode:small": Decoding((20,), 3, 200, head_dim=64, dtype="float32"),
}


def repeats_are_equal(case: Case, implementation: str, repeats: int) -> bool:
    """Whether all results of so many calls have the bits of the first, which must be finite.

    Raises:
      FloatingPointError: they are not finite.
    """
    step, operands = case.step(implementation), case.operands()
    first = step(*operands)
    if not all(jnp.isfinite(x).all() for x in first):
        raise FloatingPointError("a result is not finite")
    same = jnp.array(True)
    for _ in range(repeats):
        same = still_same(same, step(*operands), first)
    return bool(same)


def growth(case: Case, implementation: str, calls: int) -> tuple[int, int]:
    """KiB of the process and bytes of the device that so many calls add, after as many that may: at most 1,000."""
    step, operands = case.step(implementation), case.operands()

    def run(count: int) -> tuple[int, int]:
        for _ in range(count):
            results = step(*operands)
        jax.block_until_ready(results)
        del results
        stats = jax.devices()[0].memory_stats() or {}
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, stats.get("bytes_in_use", 0)

    before, after = run(min(calls, 1000)), run(calls)
    return after[0] - before[0], after[1] - before[1]


@jax.jit
def still_same(same, actual, expected):
    """`same`, and whether all bits are. Stays on the device, so that a thousand steps need not wait for the host."""
    for a, e in zip(actual, expected, strict=True):
        bits = jnp.uint32 if a.dtype == jnp.float32 else jnp.uint16
        same &= (jax.lax.bitcast_convert_type(a, bits) == jax.lax.bitcast_convert_type(e, bits)).all()
    return same
