"""What the attention benchmark measures: patterns, sizes, and the tables of every pass. Data, no measuring.

A pattern says twice what may attend to what: as a `BlockMask`, which jax_bsk gets, and as a predicate of positions,
which the check and every dense mask are made of, so that a wrong block list does not hide in its own reference.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jax_bsk.masks import BlockMask, CausalMask, FullMask, LocalMask, SegmentMask
from jax_bsk.qa.benchmarking.attention.passes import Pass


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What may attend to what.

    Attributes:
      kind: "random", "causal", "window", "dense" or "documents".
      window: tokens to the left (window).
      blocks: bool [n, n] (random).
      block_size: tokens of each of them; 0 for length / n.
      ids: int32 [length], never decreasing (documents, causal inside each).
    """

    kind: str
    window: int = 0
    blocks: np.ndarray | None = None
    ids: np.ndarray | None = None
    block_size: int = 0

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
        size = self.block_size or length // blocks.shape[0]
        return blocks[q // size, kv // size]

    def block_mask(self, length: int, block_size: int) -> BlockMask:
        """The same as block lists, on the host."""
        if self.kind == "random":
            assert self.blocks is not None
            return BlockMask.from_block_mask(self.blocks, q_len=length, block_size=block_size)
        if self.kind == "window":
            return LocalMask((self.window, 0)).bind(length, block_size=block_size)
        if self.kind == "documents":
            assert self.ids is not None
            return (CausalMask() & SegmentMask(self.ids, contiguous=True)).bind(length, block_size=block_size)
        return (CausalMask() if self.kind == "causal" else FullMask()).bind(length, block_size=block_size)


DENSE = Pattern("dense")


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
      columns: whether the mask has its key-major lists beside the others, which a backward else makes in every call.
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
    columns: bool = False

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
        mask = self.pattern.block_mask(self.length, self.block_size)
        return mask.transpose() if self.columns else mask

    @functools.cached_property
    def density(self) -> float:
        """Attended elements / all elements."""
        return self.mask.element_density

    @property
    def useful_flops(self) -> float:
        """Operations that the attended elements need: two products of 2 D each in the forward, five in the backward."""
        pairs = self.batch * self.heads * self.length**2 * self.density
        return self.measured.flops_of(pairs, self.head_dim)

    @property
    def kind(self) -> tuple[Pass, str]:
        """What else cases share whose speed can be compared."""
        return self.measured, self.dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of its case."""
        sizes = ("batch", "heads", "length", "head_dim", "dtype", "block_size", "panel", "series")
        return {name: getattr(self, name) for name in sizes} | {
            "name": self.name,
            "pass": self.measured.value,
            "kv_heads": self.kv_heads or self.heads,
            "pattern": self.pattern.kind,
            "density": self.density,
            "block_density": self.mask.density,
            "chained_calls": self.calls,
            "useful_flops": self.useful_flops,
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
    # Blocks of 64, short sequences in large batches (others of them are among the small calls below), and long ones.
    cases += [
        make.half((64, 12, 384, 64), 64, calls=20),
        make.case((16, 96, 512, 64), "dense", DENSE, 128, calls=20),
        make.exact((4, 32, 8192, 64), 0.2, "random .2 of 64-blocks", 64),
        make.exact((4, 32, 8192, 128), 0.2, "random .2 of 64-blocks", 64),
    ]
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


def gradient_gpu_cases(seed: int, measured: Pass) -> list[Case]:
    """The table of a pass with gradients, cases of one shape beside each other."""
    make = Maker("bfloat16", seed, measured)
    middle, long = (4, 32, 8192, 128), (1, 16, 32768, 128)
    return [
        make.random(middle, ".50", 0.515, panel=panel(middle)),
        make.random(middle, ".22", 0.237, panel=panel(middle)),
        make.random(middle, ".10", 0.118, panel=panel(middle)),
        make.random(middle, ".03", 0.047, panel=panel(middle)),
        make.case(middle, "causal", Pattern("causal"), 128, panel=panel(middle)),
        make.case(middle, "dense", DENSE, 128, panel=panel(middle)),
        make.case(middle, "window 1024", Pattern("window", window=1024), 128, panel=panel(middle)),
        make.random(middle, ".22", 0.237, kv_heads=8),
        make.random(long, ".22", 0.221, panel=panel(long)),
        make.random(long, ".10", 0.103, panel=panel(long)),
        make.random(long, ".03", 0.034, panel=panel(long)),
        make.random((4, 32, 8192, 64), ".22", 0.237),
        make.random((2, 16, 8192, 256), ".22", 0.237),
        # The last: PyTorch's share in it is a captured graph, and a capture that fails may leave its context unusable.
        make.half((1, 8, 2048, 64), 64, calls=20),
    ]


def gradient_cpu_cases(seed: int, measured: Pass) -> list[Case]:
    """The same where there is no GPU: one small case of each sort."""
    make = Maker("float32", seed, measured)
    sizes = (1, 2, 512, 32)
    return [
        *small_patterns(make, sizes),
        make.documents(sizes, 100, 64)[1],
        make.random((2, 4, 256, 32), ".4", 0.5, 64, kv_heads=2),
        make.half((1, 2, 256, 32), 64, calls=3),
    ]


def table(measured: Pass, seed: int, on_gpu: bool) -> list[Case]:
    """The cases of a pass on a GPU or a CPU."""
    if measured is Pass.FORWARD:
        return (gpu_cases if on_gpu else cpu_cases)(seed)
    return (gradient_gpu_cases if on_gpu else gradient_cpu_cases)(seed, measured)


# ---- What the validation tool measures beyond the tables: small calls, lengths by sparsities, time tiers

LENGTHS = (4096, 8192, 16384, 32768)
SPARSITIES = (0.5, 0.7, 0.78, 0.9)  # shares of blocks that are skipped
TOKENS, HEADS, HEAD_DIM = 32768, 32, 128  # of every case of the grid: batch x length is constant
MICRO_HEADS = (8, 16, 32, 64, 128)

# Milliseconds in which the shape of the tiers is to be done, and the densities at which it is measured.
TIER_SHAPE: Sizes = (16, 96, 4096, 128)
TIERS = (14.0, 10.0, 7.0, 5.0)
TIER_DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.22, 0.15, 0.1)


def micro(seed: int) -> list[Case]:
    """Short sequences of many heads, half of their blocks, 20 calls in one jit."""
    make = Maker("bfloat16", seed)
    return [make.half((16, heads, 512, 64), 64, calls=20) for heads in MICRO_HEADS]


def short(seed: int) -> list[Case]:
    """The forward's short sequences and blocks of 64, where a dense call is hard to beat."""
    table = [case for case in gpu_cases(seed) if case.series is None and (case.length <= 2048 or case.block_size == 64)]
    return [*micro(seed), *table]


def grid(seed: int, measured: Pass) -> list[Case]:
    """Every length with every sparsity, as long as a pass takes them."""
    make = Maker("bfloat16", seed, measured)
    return [
        make.exact((TOKENS // length, HEADS, length, HEAD_DIM), 1 - sparsity, f"sparsity {sparsity:g}")
        for length in LENGTHS
        for sparsity in SPARSITIES
    ]


def tiers(seed: int) -> list[Case]:
    """The shape of the tiers in float16, dense and at falling densities."""
    make = Maker("float16", seed)
    random = [make.exact(TIER_SHAPE, density, f"density {density:g}") for density in TIER_DENSITIES]
    return [make.case(TIER_SHAPE, "dense", DENSE, 128), *random]


def met_tiers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each tier the largest density measured within it, and where the line to the next one crosses it.

    Args:
      records: of `tiers`' cases; those without a time are left out.
    """
    points = sorted((r["density"], r["jax_bsk"]["seconds"] * 1e3) for r in records if "seconds" in r["jax_bsk"])
    found = []
    for tier in TIERS:
        within = [point for point in points if point[1] <= tier]
        beyond = [point for point in points if point[1] > tier]
        entry: dict[str, Any] = {"milliseconds": tier, "met_at_density": within[-1][0] if within else None}
        entry["measured_milliseconds"] = within[-1][1] if within else None
        if within and beyond:
            (d0, t0), (d1, t1) = within[-1], beyond[0]
            entry["interpolated_density"] = d0 + (d1 - d0) * (tier - t0) / (t1 - t0)
        found.append(entry)
    return found
