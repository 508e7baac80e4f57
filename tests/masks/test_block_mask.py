"""The lists themselves: layout, deduplication, constructors, transposition, `check`, and the views."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk import sparse_attention

FIELDS = [field.name for field in dataclasses.fields(m.BlockMask)]


def columns_by_brute_force(mask):
    """For each (b, h): the (query block, tile) entries of each key block, in the promised order."""
    result = {}
    for b, h in np.ndindex(mask.kv_blocks.shape[:2]):
        offsets, ids, tiles = (np.asarray(x)[b, h] for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
        columns = [[] for _ in range(mask.nk)]
        for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
            for e in range(begin, min(end, ids.size)):
                if 0 <= ids[e] < mask.nk:
                    columns[ids[e]].append((row, tiles[e]))
        result[b, h] = [sorted(column, key=lambda entry: (entry[1] == -1, entry[0])) for column in columns]
    return result


def assert_transposed(mask):
    turned = mask.transpose()
    for (b, h), columns in columns_by_brute_force(mask).items():
        offsets, rows, tiles = (np.asarray(x)[b, h] for x in (turned.col_offsets, turned.q_blocks, turned.col_tiles))
        assert offsets.dtype == rows.dtype == tiles.dtype == np.int32
        assert offsets.shape == (mask.nk + 1,)
        assert rows.shape == tiles.shape == (mask.kv_blocks.shape[-1],)
        got = [list(zip(rows[s:e].tolist(), tiles[s:e].tolist(), strict=True)) for s, e in itertools.pairwise(offsets)]
        assert got == columns
        assert (rows[offsets[-1] :] == -1).all()
        assert (tiles[offsets[-1] :] == -1).all()


@pytest.mark.parametrize("seed", range(40))
def test_transpose(seed, random_mask, random_sizes):
    rng = np.random.default_rng(seed)
    q_len, kv_len, block_size = random_sizes(rng)
    mask, _ = random_mask(rng, q_len, kv_len)
    block_mask = mask.bind(q_len, kv_len, block_size=block_size)
    assert_transposed(block_mask)
    if seed % 5:  # compiling is what takes long
        return
    on_device = jax.tree_util.tree_map(jnp.asarray, block_mask)
    for name in ("col_offsets", "q_blocks", "col_tiles"):
        np.testing.assert_array_equal(getattr(on_device.transpose(), name), getattr(block_mask.transpose(), name))
    jitted = jax.jit(lambda x: x.transpose())(block_mask)
    np.testing.assert_array_equal(jitted.q_blocks, block_mask.transpose().q_blocks)


def test_transpose_is_made_once():
    mask = m.CausalMask().bind(300)
    assert mask.transpose() is mask.transpose()
    assert mask.transpose().transpose() is mask.transpose()
    assert isinstance(mask.transpose().q_blocks, np.ndarray)


@pytest.mark.parametrize("where", ["host", "traced"])
def test_transpose_drops_what_is_invalid(where):
    mask = m.FullMask().bind(256, block_size=64)
    ids = mask.kv_blocks.copy()
    ids[0, 0, 1], ids[0, 0, 6] = 99, -5
    offsets = mask.row_offsets.copy()
    offsets[0, 0, -1] = 40  # past the capacity: its entries that exist stay
    broken = dataclasses.replace(mask, kv_blocks=ids, row_offsets=offsets)
    turned = broken.transpose() if where == "host" else jax.jit(lambda x: x.transpose())(broken)
    assert np.asarray(turned.col_offsets)[0, 0].tolist() == [0, 4, 7, 10, 14]
    assert np.asarray(turned.q_blocks)[0, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 0, 2, 3, 0, 1, 2, 3, -1, -1]


def test_causal_needs_one_tile_and_a_window_two():
    assert m.CausalMask().bind(4096).bit_tiles.shape[2] == 1
    assert (m.CausalMask() & m.LocalMask((512, None))).bind(4096).bit_tiles.shape[2] == 2
    assert (m.CausalMask() & m.SegmentMask(np.arange(4096) // 128)).bind(4096).bit_tiles.shape[2] == 1
    heads = m.MultiHeadMask([m.CausalMask(), m.LocalMask((512, 0)), m.CausalMask()]).bind(4096)
    assert heads.bit_tiles.shape == (1, 1, 2, 128, 4)


def test_bits_are_as_documented():
    tile = m.CausalMask().bind(128).bit_tiles[0, 0, 0]
    for r, c in [(0, 0), (5, 5), (5, 6), (40, 33), (127, 127), (64, 96)]:
        assert (tile[r, c // 32] >> (c % 32)) & 1 == (r >= c)


def test_a_row_lists_partial_blocks_first():
    mask = m.CausalMask().bind(512)
    assert mask.row_offsets[0, 0].tolist() == [0, 1, 3, 6, 10]
    assert mask.kv_blocks[0, 0].tolist() == [0, 1, 0, 2, 0, 1, 3, 0, 1, 2]
    assert mask.tiles[0, 0].tolist() == [0, 0, -1, 0, -1, -1, 0, -1, -1, -1]


def test_tail_blocks_are_full_or_dropped_by_what_is_inside():
    array = np.ones((130, 130), bool)
    mask = m.BlockMask.from_dense(array)
    assert (mask.tiles == -1).all()
    assert mask.bit_tiles.shape[2] == 0
    array[128:, 128:] = False
    mask = m.BlockMask.from_dense(array)
    assert mask.row_offsets[0, 0].tolist() == [0, 2, 3]
    # The same through a mask whose tiles are shared along diagonals.
    assert m.DilatedMask(1, (0, 0)).bind(129, 129).tiles[0, 0].tolist() == [0, -1]


def test_hash_collisions_are_harmless(monkeypatch):
    from jax_bsk.masks import _tiles
    from jax_bsk.masks.builders import _host

    class Colliding(_tiles.TileStore):
        def __init__(self, block_q, block_kv):
            super().__init__(block_q, block_kv)
            self._multipliers = np.zeros_like(self._multipliers)

    monkeypatch.setattr(_host, "TileStore", Colliding)
    dense = np.random.default_rng(0).random((200, 300)) < 0.5
    np.testing.assert_array_equal(m.BlockMask.from_dense(dense, block_size=32).to_dense()[0, 0], dense)


# ---- constructors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 90), (3, 70, 90), (1, 70, 90), (2, 3, 70, 90), (2, 1, 70, 90)])
def test_from_dense(shape):
    array = np.random.default_rng(0).random(shape) < 0.3
    for given in (array, jnp.asarray(array), array.tolist()):
        mask = m.BlockMask.from_dense(given, block_size=(32, 64))
        np.testing.assert_array_equal(mask.to_dense(), array.reshape((1,) * (4 - len(shape)) + shape))


def test_room_given_beforehand_fixes_the_shapes():
    a = m.BlockMask.from_mask(m.CausalMask(), 512, max_blocks=20, max_tiles=3)
    b = m.BlockMask.from_mask(m.LocalMask(9), 512, max_blocks=20, max_tiles=3)
    assert [x.shape for x in jax.tree_util.tree_leaves(a)] == [x.shape for x in jax.tree_util.tree_leaves(b)]
    assert a.kv_blocks.shape[-1] == 20
    assert a.bit_tiles.shape[2] == 3
    np.testing.assert_array_equal(a.to_dense(), m.CausalMask().bind(512).to_dense())
    assert_transposed(b)
    with pytest.raises(ValueError, match="max_blocks=9, but the mask visits 10 blocks"):
        m.BlockMask.from_mask(m.CausalMask(), 512, max_blocks=9)
    with pytest.raises(ValueError, match="max_tiles=0, but the mask needs 1 distinct"):
        m.BlockMask.from_mask(m.CausalMask(), 512, max_tiles=0)


def test_from_block_mask():
    blocks = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.4
    sizes: dict[str, Any] = {"q_len": 200, "kv_len": 300, "block_size": 64}
    expected = blocks.repeat(64, 2).repeat(64, 3)[:, :, :200, :300]
    np.testing.assert_array_equal(m.BlockMask.from_block_mask(blocks, **sizes).to_dense(), expected)
    traced = jax.jit(lambda x: m.BlockMask.from_block_mask(x, **sizes))(blocks)
    assert traced.bit_tiles.shape[2] == 0
    np.testing.assert_array_equal(traced.to_dense(), expected)
    causal = expected & (np.arange(200)[:, None] >= np.arange(300))
    np.testing.assert_array_equal(m.BlockMask.from_block_mask(blocks, mask=m.CausalMask(), **sizes).to_dense(), causal)
    with pytest.raises(ValueError, match=r"expected last dimensions \(4, 5\)"):
        m.BlockMask.from_block_mask(blocks[..., :4], **sizes)
    with pytest.raises(TypeError, match="BlockArrayMask: blocks must be boolean"):
        m.BlockMask.from_block_mask(blocks.astype(int), **sizes)


INDICES = np.array([[0, 2, 9], [1, 9, 9], [9, 9, 9], [0, 1, 2]])
COUNTS = np.array([2, 1, 0, 3])
SIZES = {"q_len": 120, "kv_len": 96, "block_size": 32}


def dense_of(lists, sizes):
    block = sizes["block_size"]
    dense = np.zeros((len(lists) * block, -(-sizes["kv_len"] // block) * block), bool)
    for row, ids in enumerate(lists):
        for j in ids:
            dense[row * block : (row + 1) * block, j * block : (j + 1) * block] = True
    return dense[: sizes["q_len"], : sizes["kv_len"]]


@pytest.mark.parametrize("traced", [False, True])
def test_from_indices(traced, assert_well_formed):
    def make(ids, counts):
        return m.BlockMask.from_indices(ids, counts, **SIZES)

    mask = (jax.jit(make) if traced else make)(INDICES, COUNTS)
    assert_well_formed(mask)
    np.testing.assert_array_equal(mask.to_dense()[0, 0], dense_of([[0, 2], [1], [], [0, 1, 2]], SIZES))
    assert_transposed(mask)


@pytest.mark.parametrize("traced", [False, True])
def test_from_indices_per_example_and_head(traced):
    ids = np.stack([np.stack([INDICES, INDICES[::-1]])] * 2)
    counts = np.stack([np.stack([COUNTS, COUNTS[::-1]]), np.zeros((2, 4), int)])

    def make(ids, counts):
        return m.BlockMask.from_indices(ids, counts, **SIZES)

    mask = (jax.jit(make) if traced else make)(ids, counts)
    assert mask.shape == (2, 2, 120, 96)
    dense = mask.to_dense()
    np.testing.assert_array_equal(dense[0, 1], dense_of([[0, 1, 2], [], [1], [0, 2]], SIZES))
    assert not dense[1].any()


def with_entry(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD_INDICES = [
    (with_entry(INDICES, (3, 1), 0), COUNTS, "batch 0, head 0, row 3: it has an id twice"),
    (with_entry(INDICES, (0, 0), 3), COUNTS, r"row 0: it has an id outside \[0, 3\)"),
    (with_entry(INDICES, (0, 0), -1), COUNTS, r"row 0: it has an id outside \[0, 3\)"),
    (INDICES[:, ::-1], COUNTS * 0 + 3, "outside"),
    (with_entry(INDICES, (3, 0), 2), COUNTS, "row 3: its ids do not ascend; sort them"),
    (INDICES, with_entry(COUNTS, 1, 4), r"row 1: its count is not in \[0, 3\]"),
    (INDICES, with_entry(COUNTS, 2, -1), r"row 2: its count is not in \[0, 3\]"),
    (INDICES[:3], COUNTS[:3], r"with nq=4 .*given shape \(3, 3\)"),
    (INDICES, COUNTS[:3], r"without its last dimension, \(4,\), given \(3,\)"),
]


@pytest.mark.parametrize("n", range(len(BAD_INDICES)))
def test_from_indices_refuses_on_the_host(n):
    ids, counts, message = BAD_INDICES[n]
    with pytest.raises(ValueError, match=message):
        m.BlockMask.from_indices(ids, counts, **SIZES)


def test_from_indices_refuses_floats():
    with pytest.raises(TypeError, match="kv_blocks must hold integers"):
        m.BlockMask.from_indices(INDICES * 1.0, COUNTS, **SIZES)


@pytest.mark.parametrize(
    ("row", "ids", "count"), [(0, [3, 0, 0], 1), (1, [-1, 0, 0], 2), (2, [0, 1, 2], 4), (3, [0] * 3, -7)]
)
def test_from_indices_traced_poisons_that_row_only(row, ids, count):
    ids, counts = with_entry(INDICES, row, ids), with_entry(COUNTS, row, count)
    mask = jax.jit(lambda i, c: m.BlockMask.from_indices(i, c, **SIZES))(ids, counts)
    with pytest.raises(ValueError, match=f"batch 0, head 0, row {row}: it visits key block"):
        mask.check()
    offsets = np.asarray(mask.row_offsets)[0, 0]
    good = [[0, 2], [1], [], [0, 1, 2]]
    for other in set(range(4)) - {row}:
        assert np.asarray(mask.kv_blocks)[0, 0, offsets[other] : offsets[other + 1]].tolist() == good[other]


def test_from_indices_traced_visits_as_listed():
    ids = np.array([[2, 0, 2]] * 4)
    mask = jax.jit(lambda i, c: m.BlockMask.from_indices(i, c, **SIZES))(ids, COUNTS * 0 + 3)
    assert np.asarray(mask.kv_blocks)[0, 0].tolist() == [2, 0, 2] * 4
    mask.check()


def top_k_by_brute_force(scores, k, allowed):
    chosen = np.zeros(scores.shape, bool)
    for index in np.ndindex(scores.shape[:-1]):
        order = sorted(range(scores.shape[-1]), key=lambda j: (-scores[index][j], j))
        order = [j for j in order if allowed[index[-1], j] and scores[index][j] > -np.inf]
        chosen[index][order[:k]] = True
    return chosen


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("mask", [None, m.CausalMask(), m.CausalMask() & m.LocalMask(150)])
def test_from_topk(mask, traced, assert_well_formed):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (2, 3, 7, 7)).astype(np.float32)  # many ties
    scores[0, 0, 3, 2:5] = -np.inf
    scores[1, 1, 6, :] = np.nan
    dense = np.ones((1, 1, 200, 200), bool) if mask is None else mask.bind(200, block_size=32).to_dense()
    allowed = np.pad(dense[0, 0], ((0, 24), (0, 24))).reshape(7, 32, 7, 32).any((1, 3))
    for k in (3,) if traced else (1, 3, 7):

        def make(s, k=k):
            return m.BlockMask.from_topk(s, k, q_len=200, block_size=32, mask=mask)

        got = (jax.jit(make) if traced else make)(scores)
        assert_well_formed(got)
        assert got.kv_blocks.shape[-1] <= 7 * k
        chosen = top_k_by_brute_force(np.where(np.isnan(scores), -np.inf, scores), k, allowed)
        expected = chosen.repeat(32, 2).repeat(32, 3)[..., :200, :200] & dense
        np.testing.assert_array_equal(got.to_dense(), expected)


@pytest.mark.parametrize("k", [0, 8, 2.0])
def test_from_topk_refuses_k(k):
    with pytest.raises((ValueError, TypeError), match="k must be"):
        m.BlockMask.from_topk(np.zeros((7, 7)), k, q_len=200, block_size=32)


def test_from_topk_refuses_scores():
    with pytest.raises(ValueError, match=r"\(nq, nk\) = \(7, 7\), given shape \(7, 6\)"):
        m.BlockMask.from_topk(np.zeros((7, 6)), 1, q_len=200, block_size=32)
    with pytest.raises(TypeError, match="scores must be real numbers, given bool"):
        m.BlockMask.from_topk(np.zeros((7, 7), bool), 1, q_len=200, block_size=32)


BAD_SIZES = [
    (lambda: m.FullMask().bind(-1), ValueError, r"q_len must be in \[0, 2\*\*30\), given -1"),
    (lambda: m.FullMask().bind(2**31), ValueError, "q_len must be in"),
    (lambda: m.FullMask().bind(1.5), TypeError, "q_len must be an int, given float"),  # pyright: ignore[reportArgumentType]
    (lambda: m.FullMask().bind(10, "a"), TypeError, "kv_len must be an int, given str"),  # pyright: ignore[reportArgumentType]
    (
        lambda: m.FullMask().bind(10, block_size=100),
        ValueError,
        "block_size must be a positive multiple of 32, given 100",
    ),
    (lambda: m.FullMask().bind(10, block_size=0), ValueError, "positive multiple of 32"),
    (lambda: m.FullMask().bind(10, block_size=(64, 33)), ValueError, "positive multiple of 32"),
    (lambda: m.FullMask().bind(10, block_size=(64, 64, 64)), TypeError, "pair of ints"),  # pyright: ignore[reportArgumentType]
    (lambda: m.FullMask().bind(10, block_size=64.0), TypeError, "pair of ints"),  # pyright: ignore[reportArgumentType]
    (lambda: m.BlockMask.from_mask(np.ones((3, 3), bool), 3), TypeError, "use BlockMask.from_dense"),  # pyright: ignore[reportArgumentType]
    (lambda: m.BlockMask.from_mask("causal", 3), TypeError, "must be a jax_bsk.masks.Mask, given str"),  # pyright: ignore[reportArgumentType]
    (lambda: m.BlockMask.from_mask(m.FullMask(), 3, max_blocks=0), ValueError, "max_blocks must be in"),
    (lambda: m.BlockMask.from_mask(m.FullMask(), 3, max_tiles=1.0), TypeError, "max_tiles must be an int"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize("n", range(len(BAD_SIZES)))
def test_sizes_are_checked(n):
    make, error, message = BAD_SIZES[n]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 70), (70, 0)])
def test_zero_lengths(q_len, kv_len):
    ids = [np.zeros(n, np.int32) for n in (q_len, kv_len)]
    masks = [m.CausalMask() & m.GlobalMask(1), ~m.FullMask(), m.SegmentMask(*ids), m.PrefixLMMask(3), m.BigBirdMask(32)]
    masks += [m.ArrayMask(np.zeros((q_len, kv_len), bool)), m.FunctionMask(lambda q, k: q > k), m.DilatedMask(2)]
    for mask in masks:
        for bound in (mask.bind(q_len, kv_len), jax.jit(lambda x: x.bind(q_len, kv_len))(mask)):
            assert bound.to_dense().shape == (1, 1, q_len, kv_len)
            assert bound.transpose().col_offsets.tolist() == [[[0] * (bound.nk + 1)]]
            assert (bound.density, bound.element_density) == (0.0, 0.0)
            bound.check()
            assert "0 blocks per list" in bound.describe(head_dim=64)


# ---- check ------------------------------------------------------------------------------------------------------

BROKEN = [
    ("row_offsets", (1, 2, 3), -1, "batch 1, head 2, row 2: its entries end before they begin"),
    ("row_offsets", (0, 1, 0), -1, "batch 0, head 1, row 0: its entries begin at a negative offset"),
    ("row_offsets", (1, 0, 4), 99, "batch 1, head 0, row 3: its entries end at 99, past the lists' capacity of 10"),
    ("kv_blocks", (1, 2, 4), 4, r"batch 1, head 2, row 2: it visits key block 4, outside \[0, 4\)"),
    ("kv_blocks", (1, 2, 0), -2, "batch 1, head 2, row 0: it visits key block -2"),
    ("tiles", (0, 2, 9), 1, "batch 0, head 2, row 3: it refers to bit tile 1 of 1; give a larger max_tiles"),
    ("tiles", (0, 2, 2), -2, "batch 0, head 2, row 1: it refers to bit tile -2"),
]


@pytest.mark.parametrize("n", range(len(BROKEN)))
def test_check_names_the_row(n):
    name, index, value, message = BROKEN[n]
    mask = m.CausalMask().bind(128, block_size=32)
    mask = dataclasses.replace(
        mask, **{f: np.tile(getattr(mask, f), (2, 3, 1)) for f in ("row_offsets", "kv_blocks", "tiles")}
    )
    mask.check()
    broken = dataclasses.replace(mask, **{name: with_entry(getattr(mask, name), index, value)})
    for given in (broken, jax.tree_util.tree_map(jnp.asarray, broken)):
        with pytest.raises(ValueError, match=f"invalid BlockMask: {message}"):
            given.check()
        with pytest.raises(ValueError, match="invalid BlockMask"):
            given.to_dense()


# ---- views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_densities(seed, random_mask, random_sizes):
    rng = np.random.default_rng(seed)
    q_len, kv_len, block_size = random_sizes(rng)
    mask, dense = random_mask(rng, q_len, kv_len)
    bound = mask.bind(q_len, kv_len, block_size=block_size)
    assert bound.element_density == pytest.approx(dense.mean())
    pad = ((0, 0), (0, 0), (0, bound.nq * bound.block_q - q_len), (0, bound.nk * bound.block_kv - kv_len))
    blocks = np.pad(dense, pad).reshape(*dense.shape[:2], bound.nq, bound.block_q, bound.nk, bound.block_kv)
    assert bound.density == pytest.approx(blocks.any((3, 5)).mean())


def test_describe():
    text = m.CausalMask().bind(512).describe(batch=2, heads=8, head_dim=64)
    assert text.splitlines() == [
        "BlockMask: 512 queries x 512 keys in blocks of 128 x 128 (4 x 4 blocks), batch 1, heads 1",
        "  visited: 10 blocks per list, 6 full, 4 partial",
        "  density: 62.50% of the blocks, 50.10% of the elements",
        f"  storage: 1 bit tiles, {5 * 4 + 10 * 4 * 2 + 2048:,} bytes",
        "  useful work: 0.54 GFLOP forward, 1.34 GFLOP backward (batch 2, heads 8, head size 64)",
    ]


def test_repr_says_sizes():
    text = repr(m.CausalMask().bind(512))
    assert text == "BlockMask(batch=1, heads=1, q_len=512, kv_len=512, block_size=(128, 128), 10 entries, 1 tiles)"


def test_pytree_round_trip():
    mask = m.MultiHeadMask([m.CausalMask(), m.FullMask()]).bind(200, 300, block_size=(64, 32)).transpose()
    back = jax.jit(lambda x: x)(mask)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(mask, name))
    assert "PyTreeDef" in str(jax.tree_util.tree_structure(mask))
    assert back.shape == (1, 2, 200, 300)


def test_views_of_a_traced_mask_say_what_to_do():
    def look(mask):
        with pytest.raises(TypeError, match="call it outside of jit"):
            mask.to_dense()
        with pytest.raises(TypeError, match="call it outside of jit"):
            _ = mask.density
        return mask.row_offsets

    assert jax.jit(look)(m.FullMask().bind(64)).shape == (1, 1, 2)


def test_plot_writes_a_picture(tmp_path):
    mask = m.MultiHeadMask([m.CausalMask() & m.LocalMask(300) | m.GlobalMask(1), m.FullMask()]).bind(1000, 900)
    path = tmp_path / "mask.png"
    mask.plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000
    ax = mask.plot(head=1, title="all of it")
    assert ax.get_title() == "all of it"
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["empty 0", "partial 0", "full 64"]
    image = mask.plot().get_images()[0].get_array()
    dense = np.pad(mask.to_dense()[0, 0], ((0, 24), (0, 124))).reshape(8, 128, 8, 128)
    np.testing.assert_array_equal(np.asarray(image) > 0, dense.any((1, 3)))
    with pytest.raises(ValueError, match="head=2: the mask has batch 1 and heads 2"):
        mask.plot(path, head=2)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        m.FullMask().bind(64).plot()


def test_import_is_light():
    code = "import sys, jax_bsk.masks; print([x for x in ('matplotlib', 'scipy', 'flax') if x in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", "plotting is imported when asked for"


def test_a_batch_of_nothing_is_one():
    mask = m.BlockMask.from_dense(np.ones((0, 1, 64, 64), bool), block_size=32)
    assert mask.shape == (0, 1, 64, 64)
    assert mask.to_dense().shape == (0, 1, 64, 64)


# ---- room -------------------------------------------------------------------------------------------------------


def test_padded_masks_compile_once():
    traces = []

    @jax.jit
    def attend(q, mask):
        traces.append(mask)
        return sparse_attention(q, q, q, mask=mask, implementation="xla")

    q = jax.random.normal(jax.random.key(0), (1, 96, 1, 8))
    position = np.arange(96)
    for window in (2, 9, 20):
        padded = m.LocalMask(window).bind(96, block_size=32).padded()
        assert (padded.kv_blocks.shape[-1], padded.bit_tiles.shape[2]) == (8, 4)
        near = np.abs(position[:, None] - position) <= window
        np.testing.assert_array_equal(padded.to_dense()[0, 0], near)
        expected = jax.nn.dot_product_attention(q, q, q, mask=near[None, None])
        np.testing.assert_allclose(attend(q, padded), expected, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("traced", [False, True])
def test_padding(traced):
    def pad(mask):
        return mask.padded(max_blocks=100, max_tiles=7)

    mask = m.LocalMask(9).bind(96, block_size=32).transpose()
    tiles = mask.tiles.copy()
    tiles[0, 0, -1] = mask.bit_tiles.shape[2]
    for given in (mask, dataclasses.replace(mask, tiles=tiles)):
        make = (
            jax.jit(lambda x: x.padded(max_blocks=100, max_tiles=7))
            if traced
            else lambda x: x.padded(max_blocks=100, max_tiles=7)
        )
        padded = make(given)
        assert padded.kv_blocks.shape == padded.tiles.shape == padded.q_blocks.shape == padded.col_tiles.shape
        assert (padded.kv_blocks.shape[-1], padded.bit_tiles.shape[2]) == (100, 7)
        if given is mask:
            padded.check()
            np.testing.assert_array_equal(padded.to_dense(), mask.to_dense())
        else:
            with pytest.raises(ValueError, match="refers to bit tile 2147483647 of 7"):
                padded.check()
    assert m.FullMask().bind(32, block_size=32).padded().bit_tiles.shape[2] == 0
    with pytest.raises(ValueError, match=r"max_tiles must be at least \d, what the mask has, got 1"):
        mask.padded(max_tiles=1)
