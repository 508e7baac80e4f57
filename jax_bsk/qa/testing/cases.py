"""Test cases of sparse attention as data: named corners, performance sizes, and random ones from a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_bsk.masks import BlockMask, Mask
from jax_bsk.qa.testing import mask_draws
from jax_bsk.qa.testing.judgement import NamedCase

Tag = Literal["regular", "corner", "performance"]


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One call of sparse attention."""

    batch: int = 1
    q_len: int = 128
    kv_len: int = 128
    heads: int = 2
    kv_heads: int = 2
    head_size: int = 64
    value_size: int = 64
    dtype: str = "float32"
    block_q: int = 128
    block_kv: int = 128
    pattern: str = "random"
    density: float = 0.3
    mask_per_batch: bool = False
    mask_per_head: bool = False
    lengths: bool = False
    soft_cap: float | None = None
    sinks: bool = False
    gates: bool = False
    bias: bool = False  # of all pairs
    distances: bool = False  # a bias per distance
    tiles: bool = False  # a bias by tiles of the visited blocks
    dropout: int = 0  # share of probabilities that are dropped, in 256ths
    scale: float | None = None
    amplitude: float = 1.0  # of queries: large ones make peaked softmaxes and lse far from 0
    seed: int = 0
    tag: Tag = "regular"


BIAS_TILES = 3  # of a case with tiles


class PairNumbers(NamedTuple):
    """What each pair of a case belongs to, int32 [B|1, N|1, T, S]; negative where to nothing, None where nobody asks.

    Attributes:
      gates: Entry, whose gate the pair has.
      tiles: Bias tile.
    """

    gates: np.ndarray | None
    tiles: np.ndarray | None


class Inputs(NamedTuple):
    """Arrays of a case (NumPy; the operands in its dtype), its mask in both forms, and cotangents."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    dense: np.ndarray
    mask: BlockMask
    bias: np.ndarray | None
    lengths: np.ndarray | None
    sinks: np.ndarray | None
    scale: float
    soft_cap: float | None
    dout: np.ndarray
    dlse: np.ndarray
    gates: np.ndarray | None
    entries: np.ndarray | None  # which gate each pair has, see `pair_entries`
    distances: np.ndarray | None  # [1, N|1, T + S - 1]
    tiles: np.ndarray | None  # [B|1, N|1, BIAS_TILES, block_q, block_kv]
    numbers: np.ndarray | None  # of the shape of the lists, the bias tile of each entry, or negative
    dropout: int
    rng: np.ndarray | None  # key of jax.random, as numbers

    @property
    def operands(self) -> tuple[Any, ...]:
        """What has a gradient: query, key, value, bias, sinks, gates, and the other two terms of the bias."""
        return self.query, self.key, self.value, self.bias, self.sinks, self.gates, self.distances, self.tiles

    @property
    def pairs(self) -> PairNumbers:
        """Which gate and which bias tile each pair has."""
        entries = pair_entries(self.mask) if self.tiles is not None else self.entries
        if self.numbers is None or entries is None:
            return PairNumbers(self.entries, None)
        lead = np.ogrid[tuple(slice(n) for n in entries.shape[:2])]
        capacity = max(self.numbers.shape[2], 1)
        padded = np.full((*self.numbers.shape[:2], capacity), -1, np.int32)
        padded[..., : self.numbers.shape[2]] = self.numbers
        found = padded[lead[0][..., None, None], lead[1][..., None, None], np.maximum(entries, 0)]
        return PairNumbers(self.entries, np.where(entries < 0, -1, found))


def make_inputs(case: Case) -> Inputs:
    """Builds the arrays of ``case``; the same on every machine."""
    rng = np.random.default_rng(case.seed)
    dtype = jnp.dtype(case.dtype)

    def normal(*shape, amplitude=1.0):
        return (amplitude * rng.standard_normal(shape)).astype(dtype)

    query = normal(case.batch, case.q_len, case.heads, case.head_size, amplitude=case.amplitude)
    key = normal(case.batch, case.kv_len, case.kv_heads, case.head_size)
    value = normal(case.batch, case.kv_len, case.kv_heads, case.value_size)
    dout = normal(case.batch, case.q_len, case.heads, case.value_size)
    stats_dtype = np.promote_types(np.float32, np.float64) if case.dtype == "float64" else np.dtype(np.float32)
    dlse = rng.standard_normal((case.batch, case.heads, case.q_len)).astype(stats_dtype)
    sinks = rng.standard_normal(case.heads).astype(stats_dtype) if case.sinks else None
    lengths = None
    if case.lengths:
        lengths = np.stack([rng.integers(0, n + 1, case.batch) for n in (case.q_len, case.kv_len)], 1).astype(np.int32)
    bias = None
    if case.bias:
        shape = (rng.choice([1, case.batch]), rng.choice([1, case.heads]), case.q_len, case.kv_len)
        bias = rng.standard_normal(shape).astype(stats_dtype)

    lists = (case.batch if case.mask_per_batch else 1, case.heads if case.mask_per_head else 1)
    draws = [_draw(rng, case) for _ in range(lists[0] * lists[1])]
    dense = np.stack([dense for _, dense in draws]).reshape((*lists, case.q_len, case.kv_len))
    lazy = draws[0][0]
    if lazy is not None and lists == (1, 1):
        mask = lazy.bind(case.q_len, case.kv_len, block_size=(case.block_q, case.block_kv))
    elif case.pattern == "empty_tile":
        mask = list_blocks(dense, case.block_q, case.block_kv, visit_also=_some_blocks(rng, case, 0.7))
    else:
        mask = BlockMask.from_dense(dense, block_size=(case.block_q, case.block_kv))
    gates = entries = None
    if case.gates:  # of both signs, some 0; last, so that cases without them keep their numbers
        gates = rng.standard_normal((case.batch, case.heads, mask.kv_blocks.shape[-1])).astype(stats_dtype)
        gates[rng.random(gates.shape) < 0.1] = 0
        entries = pair_entries(mask)
    distances = tiles = numbers = rng_key = None
    more = np.random.default_rng([case.seed, 23])  # of their own, for the same reason
    if case.distances:
        shape = (1, more.choice([1, case.heads]), case.q_len + case.kv_len - 1)
        distances = more.standard_normal(shape).astype(stats_dtype)
    if case.tiles:
        shape = (more.choice([1, case.batch]), more.choice([1, case.heads]), BIAS_TILES, case.block_q, case.block_kv)
        tiles = more.standard_normal(shape).astype(stats_dtype)
        numbers = more.integers(-1, BIAS_TILES, mask.kv_blocks.shape).astype(np.int32)
    if case.dropout:
        rng_key = more.integers(0, 2**32, 2, np.uint32)
    scale = 1 / math.sqrt(case.head_size) if case.scale is None else case.scale
    return Inputs(
        query,
        key,
        value,
        dense,
        mask,
        bias,
        lengths,
        sinks,
        scale,
        case.soft_cap,
        dout,
        dlse,
        gates,
        entries,
        distances,
        tiles,
        numbers,
        case.dropout,
        rng_key,
    )


def list_blocks(dense: np.ndarray, block_q: int, block_kv: int, visit_also: np.ndarray | None = None) -> BlockMask:
    """A BlockMask spelled out from its layout, one tile for every partial block, none shared.

    Independent of the constructors, which it is a check on. ``visit_also`` (bool ``[nq, nk]``) lists blocks that no
    pair attends in, as partial ones without a set bit.
    """
    lead, (q_len, kv_len) = dense.shape[:2], dense.shape[2:]
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    padded = np.zeros((*lead, nq * block_q, nk * block_kv), bool)
    padded[..., :q_len, :kv_len] = dense
    blocks = padded.reshape((*lead, nq, block_q, nk, block_kv)).swapaxes(-2, -3)
    rows, bit_tiles = {}, []
    for b, h in np.ndindex(*lead):
        for r in range(nq):
            partial, full = [], []
            for c in range(nk):
                block = blocks[b, h, r, c]
                inside = block[: q_len - r * block_q, : kv_len - c * block_kv]
                if inside.all():
                    full.append((c, -1))
                elif block.any() or (visit_also is not None and visit_also[r, c]):
                    bit_tiles.append(np.packbits(block, axis=1, bitorder="little").view("<u4"))
                    partial.append((c, len(bit_tiles) - 1))
            rows[b, h, r] = partial + full
    counts = np.array([len(rows[i]) for i in np.ndindex(*lead, nq)], np.int32).reshape((*lead, nq))
    row_offsets = np.concatenate([np.zeros((*lead, 1), np.int32), counts.cumsum(-1, dtype=np.int32)], -1)
    entries = np.full((*lead, int(row_offsets.max(initial=0)), 2), -1, np.int32)
    for b, h in np.ndindex(*lead):
        flat = [entry for r in range(nq) for entry in rows[b, h, r]]
        entries[b, h, : len(flat)] = np.array(flat, np.int32).reshape(-1, 2)
    words = np.stack(bit_tiles) if bit_tiles else np.zeros((0, block_q, block_kv // 32))
    return BlockMask(
        row_offsets=row_offsets,
        kv_blocks=np.ascontiguousarray(entries[..., 0]),
        tiles=np.ascontiguousarray(entries[..., 1]),
        bit_tiles=words[None, None].astype(np.uint32),
        col_offsets=None,
        q_blocks=None,
        col_tiles=None,
        block_q=block_q,
        block_kv=block_kv,
        q_len=q_len,
        kv_len=kv_len,
    )


def pair_entries(mask: BlockMask) -> np.ndarray:
    """int32 [B|1, H|1, q_len, kv_len]: the entry of a host mask's lists that visits each pair, -1 where none does."""
    lead, capacity = mask.kv_blocks.shape[:2], mask.kv_blocks.shape[2]
    entries = np.full((*lead, mask.nq, mask.block_q, mask.nk, mask.block_kv), -1, np.int32)
    for b, h in np.ndindex(*lead):
        used = np.arange(min(capacity, int(mask.row_offsets[b, h, -1])))
        rows = np.searchsorted(mask.row_offsets[b, h, 1:], used, side="right")
        entries[b, h, rows, :, mask.kv_blocks[b, h, used]] = used[:, None, None]
    entries = entries.reshape(*lead, mask.nq * mask.block_q, mask.nk * mask.block_kv)
    return entries[..., : mask.q_len, : mask.kv_len].copy()


# Patterns: bool [q_len, kv_len], True attends.


def _draw(rng: np.random.Generator, case: Case) -> tuple[Mask | None, np.ndarray]:
    """A pattern, and the lazy mask that makes it where it is one of `mask_draws`."""
    if case.pattern in mask_draws.DRAWS:
        return mask_draws.DRAWS[case.pattern](rng, case.q_len, case.kv_len)
    return None, PATTERNS[case.pattern](rng, case)


def _some_blocks(rng: np.random.Generator, case: Case, density: float) -> np.ndarray:
    return rng.random((-(-case.q_len // case.block_q), -(-case.kv_len // case.block_kv))) < density


def _spread(blocks: np.ndarray, case: Case) -> np.ndarray:
    return blocks.repeat(case.block_q, 0).repeat(case.block_kv, 1)[: case.q_len, : case.kv_len]


def _positions(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(case.q_len)[:, None], np.arange(case.kv_len)[None, :]


def _random(rng, case):
    """Blocks at random: some full, some with pairs at random."""
    full = _spread(_some_blocks(rng, case, case.density / 2), case)
    partial = _spread(_some_blocks(rng, case, case.density), case)
    return full | (partial & (rng.random((case.q_len, case.kv_len)) < 0.5))


def _empty_row(rng, case):
    """A row of blocks, and a few single queries, attend to nothing."""
    dense = _random(rng, case)
    start = rng.integers(-(-case.q_len // case.block_q)) * case.block_q
    dense[start : start + case.block_q] = False
    dense[rng.integers(case.q_len, size=3)] = False
    return dense


def _empty_column(rng, case):
    """A column of blocks, and a few single keys, are attended to by nothing."""
    dense = _random(rng, case)
    start = rng.integers(-(-case.kv_len // case.block_kv)) * case.block_kv
    dense[:, start : start + case.block_kv] = False
    dense[:, rng.integers(case.kv_len, size=3)] = False
    return dense


def _full(rng, case):
    return np.ones((case.q_len, case.kv_len), bool)


def _empty(rng, case):
    return np.zeros((case.q_len, case.kv_len), bool)


def _diagonal(rng, case):
    q, kv = _positions(case)
    return q == kv


def _skewed(rng, case):
    """One row of blocks sees everything, the others next to nothing."""
    blocks = _some_blocks(rng, case, case.density / 10)
    blocks[rng.integers(len(blocks))] = True
    return _spread(blocks, case)


def _causal(rng, case):
    q, kv = _positions(case)
    return q >= kv


def _window(rng, case):
    q, kv = _positions(case)
    left, right = rng.integers(1 + case.kv_len // 2), rng.integers(1 + case.kv_len // 4)
    return (kv >= q - left) & (kv <= q + right)


def _segments(rng, case):
    """Documents of random lengths, the same ids on both sides, causal within."""
    ids = np.cumsum(rng.random(max(case.q_len, case.kv_len)) < 1 / 50)
    q, kv = _positions(case)
    return (ids[: case.q_len, None] == ids[None, : case.kv_len]) & (q >= kv)


PATTERNS: dict[str, Callable[[np.random.Generator, Case], np.ndarray]] = {
    "random": _random,
    "empty_row": _empty_row,
    "empty_column": _empty_column,
    "full": _full,
    "empty": _empty,
    "diagonal": _diagonal,
    "skewed": _skewed,
    "causal": _causal,
    "window": _window,
    "segments": _segments,
    "empty_tile": _random,  # and blocks are listed whose tile has no bit set
}


def random_case(
    seed: int,
    *,
    max_len: int = 1024,
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16"),
    blocks: tuple[int, ...] = (64, 128),
) -> Case:
    """The case of a seed. Note that it depends on the options too: the command line uses the defaults.

    Args:
        seed: any int.
        max_len: longest queries and keys; where queries are few, keys are up to three times as long.
        dtypes: of the operands.
        blocks: block sizes of either side.
    """
    rng = np.random.default_rng([seed, 20])

    def pick(*options):
        return options[int(rng.integers(len(options)))]

    def length():
        # Half of them anywhere from 1, geometrically, so that short ones are common; half near multiples of 64, where
        # tails are of every kind.
        if rng.random() < 0.5:
            return round(math.exp(rng.uniform(0, math.log(max_len))))
        return int(np.clip(64 * rng.integers(1, max(2, max_len // 64 + 1)) + pick(-1, 0, 0, 1), 1, max_len))

    q_len = length()
    kv_len = q_len if rng.random() < 0.5 else length()
    kv_heads = pick(1, 1, 2, 3)
    heads = kv_heads * pick(1, 4, 8) if kv_heads < 3 else 3
    head_size = pick(64, 96, 128, 256, 8, 17, 40)
    few = np.random.default_rng([seed, 21])  # of its own, so that the other cases stay what they were
    if max_len >= 1024 and few.random() < 0.08:  # few queries on many keys, which CUDA has a kernel for
        q_len, kv_len = int(few.integers(1, 1 + 64 * kv_heads // heads)), int(few.integers(1024, 3 * max_len))
    more = np.random.default_rng([seed, 24])  # likewise
    case = Case(
        name=f"seed-{seed}",
        batch=pick(1, 1, 2, 3),
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=head_size if rng.random() < 0.7 else pick(32, 64, 128, 24, 5),
        dtype=pick(*dtypes),
        block_q=pick(*blocks),
        block_kv=pick(*blocks),
        pattern=pick(*PATTERNS),
        density=float(np.round(rng.uniform(0.05, 0.9), 2)),
        mask_per_batch=rng.random() < 0.25,
        mask_per_head=rng.random() < 0.25,
        lengths=rng.random() < 0.3,
        soft_cap=pick(None, None, None, 5.0, 30.0),
        sinks=rng.random() < 0.3,
        bias=more.random() < 0.15,
        distances=more.random() < 0.15,
        tiles=more.random() < 0.15,
        dropout=int(more.choice([0, 0, 0, 0, 0, 0, 1, 26, 128, 230])),
        scale=pick(None, None, None, 0.5, 0.05),
        amplitude=pick(1.0, 1.0, 1.0, 4.0),
        gates=rng.random() < 0.25,
        seed=seed,
    )
    elsewhere = np.random.default_rng([seed, 22])  # of its own, too
    if elsewhere.random() < 0.2:
        case = dataclasses.replace(case, pattern=str(elsewhere.choice(list(mask_draws.DRAWS))))
    return case


DRAWS = 8  # cases of one shape, see `redraw`


def redraw(case: Case, draw: int) -> Case:
    """Another case of the same shape and options: other numbers and lengths, another pattern, density and amplitude.

    Programs compiled for the one serve the other where the mask is traced. Draw 0 is the case itself.
    """
    if draw == 0:
        return case
    rng = np.random.default_rng([case.seed, 21, draw])
    return dataclasses.replace(
        case,
        name=f"{case.name}.{draw}",
        pattern=list(PATTERNS)[int(rng.integers(len(PATTERNS)))],
        density=float(np.round(rng.uniform(0.05, 0.9), 2)),
        amplitude=float(rng.choice([1.0, 1.0, 1.0, 4.0])),
        seed=int(rng.integers(2**31)),
    )


def for_shards(case: Case, shards: int) -> Case:
    """The same case with lengths that split over so many devices: in most cases into whole blocks."""
    rng = np.random.default_rng(case.seed)
    whole = rng.random() < 0.8
    q_unit, kv_unit = (shards * (block if whole else 1) for block in (case.block_q, case.block_kv))
    q_len = -(-case.q_len // q_unit) * q_unit
    kv_len = q_len if rng.random() < 0.7 and q_len % kv_unit == 0 else -(-case.kv_len // kv_unit) * kv_unit
    return dataclasses.replace(case, q_len=q_len, kv_len=kv_len)


def _corner(name: str, **fields: Any) -> Case:
    return Case(name=name, tag="corner", **fields)


CORNER_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _corner("one-token", q_len=1, kv_len=1),
        _corner("one-query", q_len=1, kv_len=300, pattern="full"),
        _corner("one-key", q_len=300, kv_len=1, pattern="full"),
        _corner("half-block-tail", q_len=192, kv_len=192, pattern="causal"),
        _corner("tail-of-one", q_len=257, kv_len=129, pattern="random", density=0.8),
        _corner("more-queries", q_len=384, kv_len=128, pattern="causal", block_q=64),
        _corner("few-queries", batch=2, q_len=1, kv_len=1100, heads=8, kv_heads=2, pattern="full", lengths=True),
        _corner(
            "few-queries-bits", q_len=5, kv_len=1500, heads=8, dtype="bfloat16", block_kv=64, density=0.4, sinks=True
        ),
        _corner(
            "few-queries-float16", q_len=16, kv_len=2100, heads=4, head_size=128, dtype="float16", pattern="window"
        ),
        _corner("few-queries-256", q_len=3, kv_len=1030, head_size=256, value_size=64, dtype="bfloat16", soft_cap=5.0),
        _corner("more-keys", q_len=100, kv_len=500, pattern="window", block_kv=64),
        _corner("all-masked", q_len=200, kv_len=200, pattern="empty"),
        _corner("all-masked-sinks", q_len=200, kv_len=200, pattern="empty", sinks=True),
        _corner("empty-tiles", q_len=256, kv_len=256, pattern="empty_tile", block_q=64, block_kv=64, seed=1),
        _corner("diagonal", q_len=300, kv_len=300, pattern="diagonal", block_q=64, block_kv=64),
        _corner("skewed", q_len=640, kv_len=640, pattern="skewed", block_q=64, block_kv=64),
        _corner("mqa", heads=8, kv_heads=1, q_len=200, kv_len=200, pattern="causal"),
        _corner("gqa-4", batch=2, heads=8, kv_heads=2, q_len=150, kv_len=150, pattern="segments", lengths=True),
        _corner("gqa-per-head", heads=8, kv_heads=2, q_len=150, kv_len=200, mask_per_head=True),
        _corner("per-batch", batch=3, q_len=200, kv_len=150, mask_per_batch=True, lengths=True),
        _corner("per-batch-and-head", batch=2, heads=4, q_len=200, kv_len=150, mask_per_batch=True, mask_per_head=True),
        _corner("lengths", batch=4, q_len=256, kv_len=256, pattern="causal", lengths=True),
        _corner("lengths-sinks", batch=4, q_len=200, kv_len=200, pattern="full", lengths=True, sinks=True),
        _corner("soft-cap", q_len=200, kv_len=200, soft_cap=2.0, amplitude=8.0),
        _corner("peaked", q_len=256, kv_len=256, pattern="causal", amplitude=40.0),
        _corner("low-lse", q_len=130, kv_len=130, pattern="diagonal", amplitude=60.0),
        _corner("head-256", q_len=130, kv_len=130, head_size=256, value_size=256, pattern="causal"),
        _corner("head-1", q_len=130, kv_len=130, head_size=1, value_size=3, pattern="causal"),
        _corner("odd-sizes", q_len=77, kv_len=91, head_size=17, value_size=5),
        _corner("narrow-values", q_len=130, kv_len=130, head_size=128, value_size=64, pattern="causal"),
        _corner("wide-values", q_len=130, kv_len=130, head_size=64, value_size=128, pattern="causal"),
        _corner("bfloat16", q_len=300, kv_len=300, dtype="bfloat16", pattern="causal", heads=4, kv_heads=1),
        _corner("float16", q_len=300, kv_len=300, dtype="float16", pattern="window", heads=4, kv_heads=1),
        _corner("float64", q_len=64, kv_len=64, head_size=80, dtype="float64", soft_cap=17.3, sinks=True),
        _corner("float64-large-logits", q_len=64, kv_len=64, head_size=80, dtype="float64", amplitude=200.0),
        _corner("negative-scale", q_len=130, kv_len=130, scale=-0.2, pattern="causal"),
        _corner("gates", batch=2, heads=4, kv_heads=2, q_len=300, kv_len=257, gates=True, density=0.7, block_q=64),
        _corner(
            "gates-lengths", batch=4, q_len=200, kv_len=200, pattern="causal", lengths=True, sinks=True, gates=True
        ),
        _corner("gates-soft-cap", q_len=200, kv_len=200, soft_cap=2.0, amplitude=8.0, gates=True, block_kv=64),
        _corner("gates-empty-tiles", q_len=256, kv_len=256, pattern="empty_tile", block_q=64, block_kv=64, gates=True),
        _corner("gates-peaked", q_len=256, kv_len=256, pattern="causal", amplitude=40.0, gates=True),
        _corner("gates-low-lse", q_len=130, kv_len=130, pattern="diagonal", amplitude=60.0, gates=True),
        _corner("gates-all-masked", q_len=200, kv_len=200, pattern="empty", sinks=True, gates=True),
        _corner("gates-mqa", heads=8, kv_heads=1, q_len=200, kv_len=200, mask_per_head=True, gates=True),
        _corner("gates-wide-values", q_len=130, kv_len=130, head_size=64, value_size=128, pattern="causal", gates=True),
        _corner(
            "gates-bfloat16", q_len=300, kv_len=300, dtype="bfloat16", pattern="causal", heads=4, kv_heads=1, gates=True
        ),
        _corner(
            "gates-float16",
            q_len=300,
            kv_len=300,
            dtype="float16",
            pattern="window",
            block_q=64,
            block_kv=64,
            gates=True,
        ),
        _corner("bias", batch=2, heads=4, kv_heads=2, q_len=200, kv_len=300, pattern="causal", bias=True),
        _corner("distances", batch=2, heads=4, kv_heads=2, q_len=300, kv_len=200, distances=True, block_q=64),
        _corner("tiles", batch=2, heads=4, kv_heads=1, q_len=257, kv_len=200, tiles=True, block_kv=64, lengths=True),
        _corner("dropout", batch=2, heads=4, kv_heads=2, q_len=200, kv_len=300, pattern="window", dropout=64),
        _corner(
            "biases-dropout-bfloat16",
            q_len=300,
            kv_len=300,
            heads=4,
            dtype="bfloat16",
            pattern="causal",
            bias=True,
            distances=True,
            tiles=True,
            dropout=26,
        ),
        _corner(
            "biases-dropout-gates",
            q_len=200,
            kv_len=257,
            soft_cap=5.0,
            sinks=True,
            gates=True,
            bias=True,
            tiles=True,
            distances=True,
            dropout=128,
        ),
        _corner("gates-head-128", q_len=300, kv_len=300, head_size=128, value_size=128, dtype="bfloat16", gates=True),
        _corner("gates-head-256", q_len=200, kv_len=200, head_size=256, value_size=256, dtype="bfloat16", gates=True),
    )
}

PERFORMANCE_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("causal-4k", 1, 4096, 4096, 8, 8, 64, 64, pattern="causal", tag="performance"),
        Case("window-4k", 1, 4096, 4096, 8, 8, 64, 64, pattern="window", tag="performance"),
        Case("random-4k", 1, 4096, 4096, 8, 8, 64, 64, density=0.15, tag="performance"),
        Case("full-4k", 1, 4096, 4096, 8, 8, 64, 64, pattern="full", tag="performance"),
        Case("gqa-8k", 1, 8192, 8192, 16, 4, 128, 128, "bfloat16", density=0.15, tag="performance"),
    )
}
