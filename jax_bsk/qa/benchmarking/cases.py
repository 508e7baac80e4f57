"""What the benchmark measures: patterns, sizes, goals, and the cases of the forward. Data, no measuring.

A pattern says twice what may attend to what: as a `BlockMask`, which jax_bsk gets, and as a predicate of positions,
which the check and every dense mask are made of, so that a wrong block list does not hide in its own reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_bsk.masks import BlockMask, CausalMask, FullMask, LocalMask, SegmentMask
from jax_bsk.qa.benchmarking.passes import Pass


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What may attend to what.

    Attributes:
      kind: "random", "causal", "window", "dense" or "documents".
      window: tokens to the left (window).
      blocks: bool [n, n] (random).
      ids: int32 [length], never decreasing (documents, causal inside each).
    """

    kind: str
    window: int = 0
    blocks: np.ndarray | None = None
    ids: np.ndarray | None = None

    def attends(self, q: Any, kv: Any, length: int, xp: Any = np) -> Any:
        """Whether positions q attend to positions kv, broadcast; `xp` is numpy or jax.numpy."""
        if self.kind == "causal":
            return kv <= q
        if self.kind == "window":
            return (kv <= q) & (q - kv <= self.window)
        if self.kind == "dense":
            return (q >= 0) & (kv >= 0)
        if self.kind == "documents":
            ids = xp.asarray(self.ids)
            return (kv <= q) & (ids[q] == ids[kv])
        blocks = xp.asarray(self.blocks)
        size = length // blocks.shape[0]
        return blocks[q // size, kv // size]

    def block_mask(self, length: int, block_size: int) -> BlockMask:
        """The same as block lists, on the host."""
        if self.kind == "random":
            return BlockMask.from_block_mask(self.blocks, q_len=length, block_size=block_size)
        if self.kind == "window":
            return LocalMask((self.window, 0)).bind(length, block_size=block_size)
        if self.kind == "documents":
            return (CausalMask() & SegmentMask(self.ids, contiguous=True)).bind(length, block_size=block_size)
        return (CausalMask() if self.kind == "causal" else FullMask()).bind(length, block_size=block_size)


DENSE = Pattern("dense")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What jax_bsk must reach in a case on one H200; every part that is given counts.

    Attributes:
      flops_per_second: at least so many useful ones.
      seconds: at most so long a call.
      ratios: peer -> at least so many times its time.
    """

    flops_per_second: float | None = None
    seconds: float | None = None
    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      name: as `--only` and `GOALS` know it.
      batch, heads, length, head_dim, dtype, block_size: sizes of the call.
      pattern: its mask.
      calls: how many calls one jit chains, each output the next query; 1 measures single calls.
      traced: whether the mask is built inside the jit from traced segment ids, in every call.
      panel: its picture against density, None for none.
      series: its line in the picture against length, None for none.
      kv_heads: of key and value; None for as many as heads.
      measured: the pass.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: str
    block_size: int
    pattern: Pattern
    calls: int = 1
    traced: bool = False
    panel: str | None = None
    series: str | None = None
    kv_heads: int | None = None
    measured: Pass = Pass.FORWARD

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, length, heads, head size) of the query, as JAX lays it out."""
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """The same of key and value."""
        return self.batch, self.length, self.kv_heads or self.heads, self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share a head of key and value."""
        return self.heads // (self.kv_heads or self.heads)

    @functools.cached_property
    def mask(self) -> BlockMask:
        return self.pattern.block_mask(self.length, self.block_size)

    @functools.cached_property
    def density(self) -> float:
        """Attended elements / all elements."""
        return self.mask.element_density

    @property
    def useful_flops(self) -> float:
        """Operations that the attended elements need: two products of 2 D each in the forward, five in the backward."""
        pairs = self.batch * self.heads * self.length**2 * self.density
        return self.measured.flops_of(pairs, self.head_dim)


# The goals of the Hopper forward, and the peer's time of 5.9 ms that the documents are held against (10 times faster).
GOALS: dict[str, Goal] = {
    "B4 H32 S8192 D128 random .22": Goal(flops_per_second=620e12, ratios={"flex": 1.55}),
    "B4 H32 S8192 D128 random .10": Goal(flops_per_second=570e12),
    "B4 H32 S8192 D128 random .03": Goal(flops_per_second=480e12),
    "B4 H32 S8192 D128 causal": Goal(flops_per_second=600e12),
    "B4 H32 S8192 D128 dense": Goal(flops_per_second=660e12),
    "B4 H32 S8192 D128 window 1024": Goal(ratios={"flex": 1.5}),
    "B1 H16 S32768 D128 random .22": Goal(flops_per_second=650e12),
    "B1 H16 S32768 D128 random .10": Goal(flops_per_second=630e12),
    "B1 H16 S32768 D128 random .03": Goal(flops_per_second=570e12),
    "B16 H96 S4096 D128 random .23": Goal(seconds=5.8e-3),
    "B16 H96 S4096 D128 random .10": Goal(seconds=3.3e-3),
    "B4 H32 S8192 D64 random .22": Goal(flops_per_second=440e12, ratios={"flex": 1.2}),
    "B1 H8 S512 D64 half of 64-blocks": Goal(seconds=5e-6),
    "B1 H8 S512 D64 half of 128-blocks": Goal(seconds=5e-6),
    "B1 H16 S1024 D64 half of 64-blocks": Goal(seconds=10e-6),
    "B1 H16 S1024 D64 half of 128-blocks": Goal(seconds=10e-6),
    "B1 H32 S2048 D64 half of 64-blocks": Goal(seconds=35e-6),
    "B1 H32 S2048 D64 half of 128-blocks": Goal(seconds=35e-6),
    "B1 H8 S512 D128 half of 64-blocks": Goal(seconds=8e-6),
    "B1 H8 S512 D128 half of 128-blocks": Goal(seconds=8e-6),
    "B4 H32 S8192 D128 documents, mask in jit": Goal(seconds=0.59e-3, ratios={"fa4-jax": 10}),
}


def drawn_blocks(count: int, chance: float, density: float, rng: np.random.Generator) -> np.ndarray:
    """Each block with that chance, and the diagonal, bool [count, count]: the draw of 64 closest to that density.

    Goals in milliseconds were set at a density, which scatters by a tenth between draws of few blocks.
    """
    draws = ((rng.uniform(size=(count, count)) < chance) | np.eye(count, dtype=bool) for _ in range(64))
    return min(draws, key=lambda blocks: abs(blocks.mean() - density))


def exact_blocks(count: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """The diagonal and others at random, bool [count, count], as many as give that density to half a block."""
    blocks = np.eye(count, dtype=bool)
    others = np.flatnonzero(~blocks)
    blocks.flat[rng.choice(others, max(0, round(density * count**2) - count), replace=False)] = True
    return blocks


Sizes = tuple[int, int, int, int]  # batch, heads, length, head size
RANDOM, CAUSAL = "random blocks", "causal"  # the series of the picture against length


class Maker:
    """Makes cases of one type and pass; each random mask has a generator of its own, so a filter changes no other."""

    def __init__(self, dtype: str, seed: int, measured: Pass = Pass.FORWARD):
        self._dtype, self._seed, self._measured = dtype, seed, measured

    def case(self, sizes: Sizes, label: str, pattern: Pattern, block: int, **options: Any) -> Case:
        batch, heads, length, head_dim = sizes
        kv_heads = options.get("kv_heads")
        name = f"B{batch} H{heads}{f'/{kv_heads}' if kv_heads else ''} S{length} D{head_dim} {label}"
        options["measured"] = self._measured
        return Case(name, batch, heads, length, head_dim, self._dtype, block, pattern, **options)

    def _rng(self, sizes: tuple[int, ...], *more: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *sizes, *more])

    def random(self, sizes: Sizes, chance: str, density: float, block: int = 128, **options: Any) -> Case:
        """Random blocks of that chance and about that density."""
        rng = self._rng(sizes, block, round(float(chance) * 1000))
        blocks = drawn_blocks(sizes[2] // block, float(chance), density, rng)
        return self.case(sizes, f"random {chance}", Pattern("random", blocks=blocks), block, **options)

    def half(self, sizes: Sizes, block: int, calls: int, **options: Any) -> Case:
        """Half of the blocks, in calls chained in one jit."""
        return self.exact(sizes, 0.5, f"half of {block}-blocks", block, calls=calls, **options)

    def documents(self, sizes: Sizes, tokens: int, block: int = 128) -> list[Case]:
        pattern = Pattern("documents", ids=np.arange(sizes[2], dtype=np.int32) // tokens)
        return [
            self.case(sizes, "documents, mask in jit", pattern, block, traced=True),
            self.case(sizes, "documents, mask prebuilt", pattern, block),
        ]

    def exact(self, sizes: Sizes, density: float, label: str, block: int = 128, **options: Any) -> Case:
        """Random blocks of that density, to half a block."""
        blocks = exact_blocks(sizes[2] // block, density, self._rng(sizes, block))
        return self.case(sizes, label, Pattern("random", blocks=blocks), block, **options)

    def lengths(self, all_sizes: list[Sizes], density: float, block: int = 128) -> list[Case]:
        """Random blocks of that density, and causal, at every length."""
        cases = []
        for sizes in all_sizes:
            cases += [
                self.exact(sizes, density, f"length, random {density:g}".replace("0.", "."), block, series=RANDOM),
                self.case(sizes, "length, causal", Pattern("causal"), block, series=CAUSAL),
            ]
        return cases


def panel(sizes: Sizes) -> str:
    """Title of the picture of those sizes."""
    return "B {}, H {}, S {:,}, D {}".format(*sizes)


def gpu_cases(seed: int) -> list[Case]:
    """The whole table, cases of one shape beside each other."""
    make = Maker("bfloat16", seed)
    middle, long, wide = (4, 32, 8192, 128), (1, 16, 32768, 128), (16, 96, 4096, 128)
    cases = [
        make.random(middle, ".22", 0.237, panel=panel(middle), series=RANDOM),
        make.random(middle, ".10", 0.118, panel=panel(middle)),
        make.random(middle, ".03", 0.047, panel=panel(middle)),
        make.case(middle, "causal", Pattern("causal"), 128, panel=panel(middle), series=CAUSAL),
        make.case(middle, "dense", DENSE, 128, panel=panel(middle)),
        make.case(middle, "window 1024", Pattern("window", window=1024), 128, panel=panel(middle)),
        *make.documents(middle, 1024),
        make.random(long, ".22", 0.221, panel=panel(long)),
        make.random(long, ".10", 0.103, panel=panel(long)),
        make.random(long, ".03", 0.034, panel=panel(long)),
        make.random(wide, ".23", 0.257, panel=panel(wide)),
        make.random(wide, ".10", 0.129, panel=panel(wide)),
        make.random((4, 32, 8192, 64), ".22", 0.237),
    ]
    small: list[Sizes] = [(1, 8, 512, 64), (1, 16, 1024, 64), (1, 32, 2048, 64), (1, 8, 512, 128)]
    cases += [make.half(sizes, block, calls=50) for sizes in small for block in (64, 128)]
    # The same number of tokens as in the table's case of 8,192.
    return cases + make.lengths([(32768 // s, 32, s, 128) for s in (2048, 4096, 16384, 32768)], 0.237)


def small_patterns(make: Maker, sizes: Sizes) -> list[Case]:
    """One of each pattern that takes no array, 64-blocks."""
    return [
        make.random(sizes, ".4", 0.5, 64, panel=panel(sizes)),
        make.random(sizes, ".1", 0.2, 64, panel=panel(sizes)),
        make.case(sizes, "causal", Pattern("causal"), 64, panel=panel(sizes)),
        make.case(sizes, "dense", DENSE, 64),
        make.case(sizes, "window 100", Pattern("window", window=100), 64),
    ]


def cpu_cases(seed: int) -> list[Case]:
    """One small case of each sort: shows that everything runs where there is no GPU."""
    make = Maker("float32", seed)
    sizes = (1, 2, 512, 32)
    return [
        *small_patterns(make, sizes),
        *make.documents(sizes, 100, 64),
        make.half((1, 2, 256, 32), 64, calls=3),
        *make.lengths([(2, 2, 256, 32), sizes], 0.4, 64),
    ]
