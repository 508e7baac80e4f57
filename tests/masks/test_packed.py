"""PackedMask: what it attends to, its lists on the host and traced, the room they have, and what it refuses."""

from __future__ import annotations

import itertools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bsk.masks as m
from jax_bsk.masks import _search
from jax_bsk.masks._search import greatest_before, last_at_most, sums_before
from tests.util import text_of


def random_numbers(rng: np.random.Generator, sequences: int, tokens: int) -> np.ndarray:
    """Where sequences begin: some empty, often with padding before and after them."""
    numbers = np.sort(rng.integers(0, tokens + 1, sequences + 1))
    if rng.random() < 0.7:
        numbers[0] = 0
    if rng.random() < 0.4:
        numbers[-1] = tokens
    return numbers.astype(np.int32)


def within_and_dense(rng: np.random.Generator, sequences: int) -> tuple[m.Mask | None, Any]:
    """A mask of intervals, and the same as a function of (query position, key position, sequence)."""
    a, b = (int(x) for x in rng.integers(0, 90, 2))
    offset, each = int(rng.integers(-40, 40)), rng.integers(-9, 60, sequences)
    kinds: list[tuple[m.Mask | None, Any]] = [
        (None, lambda q, k, n: (q == q) & (k == k)),
        (m.CausalMask(), lambda q, k, n: q >= k),
        (m.CausalMask(offset), lambda q, k, n: q + offset >= k),
        (m.CausalMask(each), lambda q, k, n: q + each[n] >= k),
        (m.LocalMask((a, 0)), lambda q, k, n: (k >= q - a) & (k <= q)),
        (m.LocalMask((a, b), offset=offset), lambda q, k, n: (k >= q + offset - a) & (k <= q + offset + b)),
        (m.LocalMask((None, b)), lambda q, k, n: k <= q + b),
        (m.ChunkedMask(a + 1), lambda q, k, n: q // (a + 1) == k // (a + 1)),
        (m.PrefixLMMask(a), lambda q, k, n: (k < a) | (q >= k)),
        (
            m.PrefixLMMask(abs(each)) & m.LocalMask((b, None)),
            lambda q, k, n: ((k < abs(each[n])) | (q >= k)) & (k >= q - b),
        ),
    ]
    return kinds[rng.integers(len(kinds))]


def dense_of(q_numbers, kv_numbers, q_len, kv_len, allowed, bottom_right):
    dense = np.zeros((q_len, kv_len), bool)
    for n, ((a, b), (c, d)) in enumerate(
        zip(itertools.pairwise(q_numbers), itertools.pairwise(kv_numbers), strict=True)
    ):
        q = np.arange(b - a)[:, None] + ((d - c) - (b - a) if bottom_right else 0)
        dense[a:b, c:d] = allowed(q, np.arange(d - c)[None], n)
    return dense


@pytest.fixture
def as_accelerators(monkeypatch):
    """A function after whose call programs for a CPU, too, search and sum as those for accelerators do."""

    def replace():
        monkeypatch.setattr(_search, "_last_by_bisection", _search.last_by_comparison)
        monkeypatch.setattr(_search, "_sums_by_prefixes", _search.sums_by_comparison)
        monkeypatch.setattr(_search, "_greatest_by_prefixes", _search.greatest_by_comparison)

    return replace


@pytest.mark.parametrize("seed", range(24))
def test_traced_equals_host_and_the_definition(seed, assert_well_formed, as_accelerators):
    if seed % 3:
        as_accelerators()
    rng = np.random.default_rng(seed)
    sequences, q_len = int(rng.integers(1, 12)), int(rng.integers(1, 400))
    alike = rng.random() < 0.4
    kv_len = q_len if alike else int(rng.integers(1, 400))
    q_numbers = random_numbers(rng, sequences, q_len)
    kv_numbers = q_numbers if alike else random_numbers(rng, sequences, kv_len)
    within, allowed = within_and_dense(rng, sequences)
    block_size = [32, 64, (32, 64), (64, 32)][rng.integers(4)]
    promised = rng.random() < 0.5
    options: dict[str, Any] = {"alignment": ["top_left", "bottom_right"][rng.integers(2)]}
    if promised:
        options |= {"max_seqlen_q": int(np.diff(q_numbers).max()), "max_seqlen_kv": int(np.diff(kv_numbers).max())}

    def bind(q_numbers, kv_numbers):
        mask = m.PackedMask(q_numbers, None if alike else kv_numbers, within, **options)
        return mask.bind(q_len, kv_len, block_size=block_size)

    host, traced = bind(q_numbers, kv_numbers), jax.jit(bind)(q_numbers, kv_numbers)
    dense = dense_of(q_numbers, kv_numbers, q_len, kv_len, allowed, options["alignment"] == "bottom_right")
    np.testing.assert_array_equal(host.to_dense()[0, 0], dense)
    traced.check()
    assert_well_formed(traced)
    np.testing.assert_array_equal(traced.to_dense()[0, 0], dense)
    # Exact lists: no empty block is visited, and none that is full has a tile.
    count = host.row_offsets[0, 0, -1]
    np.testing.assert_array_equal(traced.row_offsets, host.row_offsets)
    np.testing.assert_array_equal(traced.kv_blocks[0, 0, :count], host.kv_blocks[0, 0, :count])
    np.testing.assert_array_equal(traced.tiles[0, 0, :count] < 0, host.tiles[0, 0, :count] < 0)


WITHIN = {
    "full": None,
    "causal": m.CausalMask(),
    "window": m.LocalMask((40, 0)),
    "both sides": m.LocalMask((40, 70)),
    "left": m.LocalMask((40, None)),
    "chunks": m.ChunkedMask(50),
    "prefix": m.PrefixLMMask(70),
    "all": m.CausalMask() & m.LocalMask((90, 3)) & m.ChunkedMask(200),
    "behind": m.LocalMask((5, 9), offset=-50),
}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", WITHIN)
def test_room_is_always_enough(name, alike):
    """The bounds on blocks and tiles, against layouts of many kinds: counted on the host, without compiling."""
    rng = np.random.default_rng(list(WITHIN).index(name))
    from jax_bsk.masks.algebra.mask import count_codes
    from jax_bsk.masks.grid import Grid

    for _ in range(40):
        q_len, sequences = int(rng.integers(1, 900)), int(rng.choice([1, 2, 5, 20, 100]))
        kv_len = q_len if alike else int(rng.integers(1, 900))
        q = random_numbers(rng, sequences, q_len)
        kv = q if alike else random_numbers(rng, sequences, kv_len)
        longest = int(np.diff(q).max()), int(np.diff(kv).max())
        for block, promised in itertools.product((32, (32, 64)), (False, True)):
            sizes = dict(zip(("max_seqlen_q", "max_seqlen_kv"), longest, strict=True)) if promised else {}
            alignment: Any = rng.choice(["top_left", "bottom_right"])
            one = m.PackedMask(q, None if alike else kv, WITHIN[name], alignment=alignment, **sizes)
            host = one.bind(q_len, kv_len, block_size=block)
            grid = Grid(q_len, kv_len, *host.block_size)
            # Of examples, so that nothing is known on the host.
            many = m.PackedMask(q[None], None if alike else kv[None], WITHIN[name], alignment=alignment, **sizes)
            partial = int((host.tiles[0, 0, : host.row_offsets[0, 0, -1]] >= 0).sum())
            assert host.row_offsets[0, 0, -1] <= many._visited_bound(grid)
            assert partial <= many._partial_bound(grid)
            assert count_codes(one, grid)[0] >= host.row_offsets[0, 0, -1]


OTHERS = {
    "global tokens": (
        m.GlobalMask(3) | m.LocalMask((4, 0)),
        lambda q, k: (q < 3) & (q >= 0) | (k < 3) | (q - k <= 4) & (q >= k),
    ),
    "dilated": (m.DilatedMask(3), lambda q, k: (q - k) % 3 == 0),
    "function": (
        m.FunctionMask(lambda q, k: (q + k) % 3 == 0) & m.CausalMask(),
        lambda q, k: ((q + k) % 3 == 0) & (q >= k),
    ),
    "not causal": (~m.CausalMask(), lambda q, k: q < k),
}


@pytest.mark.parametrize("name", OTHERS)
def test_masks_without_intervals(name):
    within, allowed = OTHERS[name]
    kinds: list[Any] = ["top_left", "bottom_right"]
    for seed, alignment in enumerate(kinds):
        rng = np.random.default_rng(seed)
        q_len, kv_len = (int(n) for n in rng.integers(100, 300, 2))
        q, kv = random_numbers(rng, 4, q_len), random_numbers(rng, 4, kv_len)

        def bind(q, kv, alignment=alignment, sizes=(q_len, kv_len)):
            return m.PackedMask(q, kv, within, alignment=alignment).bind(*sizes, block_size=32)

        dense = dense_of(q, kv, q_len, kv_len, lambda q, k, n: allowed(q, k), alignment == "bottom_right")
        np.testing.assert_array_equal(bind(q, kv).to_dense()[0, 0], dense)
        np.testing.assert_array_equal(jax.jit(bind)(q, kv).to_dense()[0, 0], dense)


def test_examples_have_numbers_of_their_own_and_others_combine():
    numbers = np.array([[0, 30, 90], [10, 50, 50]], np.int32)
    flags = np.random.default_rng(0).random((100, 100)) < 0.5

    def bind(numbers):
        return (m.PackedMask(numbers, within=m.CausalMask()) & m.ArrayMask(flags)).bind(100, block_size=32)

    causal = lambda q, k, n: q >= k  # noqa: E731
    dense = np.stack([dense_of(row, row, 100, 100, causal, False) for row in numbers]) & flags
    np.testing.assert_array_equal(bind(numbers).to_dense()[:, 0], dense)
    np.testing.assert_array_equal(jax.jit(bind)(numbers).to_dense()[:, 0], dense)
    per_head = m.MultiHeadMask([m.PackedMask(numbers), m.PackedMask(numbers, within=m.CausalMask())])
    assert jax.jit(lambda mask: mask.bind(100, block_size=32))(per_head).to_dense().shape == (2, 2, 100, 100)


@pytest.mark.parametrize(
    "numbers",
    [[0, 60, 50, 100], [0, 50, 101], [-1, 50, 100], [0, 2**30, 100]],
    ids=["falls", "past", "negative", "far"],
)
def test_numbers_that_make_no_sense_poison_every_row(numbers):
    numbers = np.array(numbers, np.int32)
    mask = jax.jit(lambda x: m.PackedMask(x, within=m.CausalMask()).bind(100, block_size=32))(numbers)
    assert (np.asarray(mask.row_offsets)[0, 0, 1:] > mask.capacity).all()
    with pytest.raises(ValueError, match="row 0: its entries end at"):
        mask.check()
    with pytest.raises(ValueError, match="cu_seqlens_q must"):
        m.PackedMask(numbers).bind(100)


def test_a_sequence_that_is_longer_than_promised():
    bind = jax.jit(lambda x: m.PackedMask(x, max_seqlen_q=32).bind(512, block_size=32))
    kept = bind(np.arange(0, 513, 32, dtype=np.int32))
    kept.check()
    broken = bind(np.array([0, *[512] * 16], np.int32))
    with pytest.raises(ValueError, match="past the lists' capacity"):
        broken.check()
    first = np.asarray(broken.row_offsets)[0, 0, 1:] <= broken.capacity
    assert first.any(), "rows that found room"
    with pytest.raises(ValueError, match="more than the 32 that were promised"):
        m.PackedMask(np.array([0, 512]), max_seqlen_q=32).bind(512)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: m.PackedMask([0.0, 2.0]), TypeError, "must hold integers"),
        (lambda: m.PackedMask([3]), ValueError, "at least one sequence"),
        (lambda: m.PackedMask([0, 3], [0, 1, 3]), ValueError, "the same number of sequences"),
        (lambda: m.PackedMask(np.zeros((2, 2), int), np.zeros((3, 2), int)), ValueError, "different batch sizes"),
        (lambda: m.PackedMask([0, 3], alignment=cast(Any, "middle")), ValueError, "'top_left' or 'bottom_right'"),
        (lambda: m.PackedMask([0, 3], within=m.SegmentMask([0, 1, 1])), ValueError, "mask of positions"),
        (lambda: m.PackedMask([0, 3], within=m.MultiHeadMask([m.CausalMask()])), ValueError, "for all heads"),
        (lambda: m.PackedMask([0, 3], within=cast(Any, np.ones(3))), TypeError, "within must be a Mask"),
        (
            lambda: m.PackedMask([0, 2, 4], within=m.CausalMask(np.array([1, 2, 3]))),
            ValueError,
            r"one per sequence \[2\]",
        ),
        (
            lambda: m.PackedMask([0, 2, 4], within=m.CausalMask(np.zeros((1, 4), int))),
            ValueError,
            "of shape \\(1, 4\\)",
        ),
        (lambda: m.PackedMask([0, 3], within=~m.PrefixLMMask(np.array([2]))), ValueError, "numbers per sequence"),
        (lambda: m.PackedMask([0, 3], max_seqlen_q=-1), ValueError, "max_seqlen_q must be at least 0"),
        (lambda: m.PackedMask([0, 3]).bind(3, 4), ValueError, "cu_seqlens_kv must be given"),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "within",
    [
        m.RowRangeMask(0, 40),
        m.BlockDiagonalMask([40]),
        m.BlockDiffusionMask(20, 40) | m.SliceMask([[0, 40]], [[0, 40]]),
        m.NeighborhoodMask((4, 10), (4, 10)),
        m.TreeMask(np.arange(40) - 1),
    ],
)
def test_positions_before_the_first_select_nothing(within):
    """Of 30 queries the last 10 stand at the sequence's 10 keys."""
    mask = m.PackedMask([0, 30], [0, 10], within=within, alignment="bottom_right")
    dense = np.asarray(mask.bind(40, block_size=32).to_dense()[0, 0])
    assert not dense[:20].any()
    assert dense[20:30, 0].any()
    traced = jax.jit(lambda mask: mask.bind(40, block_size=32))(mask)
    np.testing.assert_array_equal(traced.to_dense()[0, 0], dense)


def test_printed_and_compared():
    mask = m.PackedMask(np.array([0, 3]), within=m.CausalMask(), max_seqlen_q=3)
    assert repr(mask) == "PackedMask(cu_seqlens_q=int64[2], within=CausalMask(), max_seqlen_q=3)"
    assert mask == m.PackedMask(np.array([0, 3]), within=m.CausalMask(), max_seqlen_q=3)
    assert mask != m.PackedMask(np.array([0, 3]), within=m.CausalMask(), max_seqlen_q=4)


def test_the_traced_build_is_cheap(as_accelerators):
    """No sort, loop or scatter, no array of all pairs of blocks, and 3 tiles for each row of causal sequences."""
    as_accelerators()
    tokens = 32_768
    bind = jax.jit(lambda x: m.PackedMask(x, within=m.CausalMask(), max_seqlen_q=8192).bind(tokens))
    numbers = jax.ShapeDtypeStruct((65,), "int32")
    lists = jax.eval_shape(bind, numbers)
    assert lists.bit_tiles.shape == (1, 1, 3 * 256, 128, 4)
    assert lists.capacity == 256 * 66
    text = text_of(bind.lower(numbers).compile())
    entry = text[text.index("ENTRY") :]
    assert not re.findall(r"\b(sort|while|scatter|conditional|custom-call)\(", entry)
    assert len(re.findall(r"\breduce\(", text)) <= 13, "each is a kernel on a GPU, with what is elementwise fused to it"


@pytest.mark.parametrize("accelerators", [False, True])
def test_searches_and_sums(accelerators, as_accelerators):
    if accelerators:
        as_accelerators()
    rng = np.random.default_rng(0)
    for size in (1, 5, 200, 300, 4000):
        starts = np.sort(rng.integers(0, 500, size)).astype(np.int32)
        values = rng.integers(-3, 510, (7, 3)).astype(np.int32)
        expected = np.searchsorted(starts, values, side="right") - 1
        np.testing.assert_array_equal(last_at_most(starts, values, np), expected)
        np.testing.assert_array_equal(jax.jit(lambda s, v: last_at_most(s, v, jnp))(starts, values), expected)
        counts = rng.integers(0, 9, (2, size)).astype(np.int32)
        np.testing.assert_array_equal(jax.jit(sums_before)(counts), np.cumsum(counts, -1) - counts)
    values = rng.integers(0, 99, (3, 20)).astype(np.int32)
    before = np.maximum.accumulate(np.pad(values, ((0, 0), (1, 0)))[:, :-1], -1)
    np.testing.assert_array_equal(greatest_before(jnp.asarray(values)), before)


def test_examples_on_a_mesh_need_no_communication():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    numbers = np.sort(np.random.default_rng(0).integers(0, 200, (4, 6)), -1).astype(np.int32)
    given = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("data")))
    bind = jax.jit(lambda x: m.PackedMask(x, within=m.CausalMask()).bind(200, block_size=32))
    with jax.set_mesh(mesh):
        compiled = bind.lower(given).compile()
        sharded = compiled(given)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text_of(compiled))
    np.testing.assert_array_equal(sharded.to_dense(), bind(numbers).to_dense())
