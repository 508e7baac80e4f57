"""Masks whose values come later: equal to what the host builds, poisoned where they find no room, sharded silently."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bsk.masks as m


def poisoned_rows(mask, b=0, h=0):
    """Rows that kernels answer with NaN."""
    offsets, ids, tiles = (np.asarray(x)[b, h] for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
    rows = []
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        bad = end > ids.size or (ids[begin:end] < 0).any() or (tiles[begin:end] >= mask.bit_tiles.shape[2]).any()
        rows += [row] if bad else []
    return rows


@pytest.mark.parametrize("seed", range(16))
def test_traced_equals_host(seed, random_mask, random_sizes, assert_well_formed):
    rng = np.random.default_rng(seed)
    q_len, kv_len, block_size = random_sizes(rng)
    for _ in range(20):  # one that has something to trace
        mask, dense = random_mask(rng, q_len, kv_len)
        if jax.tree_util.tree_leaves(mask):
            break
    bind = jax.jit(lambda x: x.bind(q_len, kv_len, block_size=block_size))
    traced = bind(mask)
    assert isinstance(traced.kv_blocks, jax.Array)
    assert_well_formed(traced)
    np.testing.assert_array_equal(traced.to_dense(), np.broadcast_to(dense, traced.shape), err_msg=f"{mask}")


def test_leaves_may_be_mixed_with_values_known_beforehand():
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, 90)), -1)
    known = m.SegmentMask(ids[0]) | m.GlobalMask([3]) | m.BigBirdMask(32)

    def make(ids):
        return (known & m.SegmentMask(ids)).bind(90, block_size=32)

    np.testing.assert_array_equal(jax.jit(make)(ids).to_dense(), make(ids).to_dense())


def test_function_that_closes_over_traced_arrays():
    flags = np.random.default_rng(0).random(100) < 0.5

    def make(flags):
        return (m.FunctionMask(lambda q, k: flags[q] & flags[k]) & m.CausalMask()).bind(100, block_size=32)

    traced = jax.jit(make)(flags)
    assert traced.kv_blocks.shape[-1] == 10, "no more room than causal needs"
    np.testing.assert_array_equal(traced.to_dense(), make(flags).to_dense())


def test_room_is_bounded_by_what_is_known():
    ids = np.zeros(1024, np.int32)
    bind = jax.jit(lambda x: x.bind(1024, block_size=32))
    blocks = 32 * 33 // 2
    assert bind(m.SegmentMask(ids)).kv_blocks.shape[-1] == 32 * 32
    causal = bind(m.CausalMask() & m.SegmentMask(ids))
    assert (causal.kv_blocks.shape[-1], causal.bit_tiles.shape[2]) == (blocks, blocks)
    promised = bind(m.CausalMask() & m.SegmentMask(ids, contiguous=True))
    assert promised.bit_tiles.shape[2] == 2 * 64 + 32, "segment ends, and the diagonal of causal"
    per_head = bind(m.MultiHeadMask([m.CausalMask(), m.LocalMask(0)]) & m.SegmentMask(ids, contiguous=True))
    assert per_head.kv_blocks.shape == (1, 2, blocks)


def test_heads_of_their_own_with_an_array_per_example_and_head():
    array = np.random.default_rng(0).random((2, 2, 64, 64)) < 0.5

    def bind(array):
        return (m.MultiHeadMask([m.CausalMask(), m.LocalMask(3)]) & m.ArrayMask(array)).bind(64, block_size=32)

    np.testing.assert_array_equal(jax.jit(bind)(array).to_dense(), bind(array).to_dense())


@pytest.mark.parametrize("seed", range(60))
def test_contiguous_segments_always_find_room(seed):
    """The bound on partial blocks, against many shapes of documents: none, tiny, huge, aligned, disjoint ids."""
    rng = np.random.default_rng(seed)
    q_len, kv_len = (int(n) for n in rng.integers(1, 1200, 2))
    top = int(rng.choice([1, 2, 3, 10, 50, 2000]))
    q_ids, kv_ids = (np.sort(rng.integers(0, top, n)) for n in (q_len, kv_len))
    if rng.random() < 0.3:
        kv_len, kv_ids = q_len, q_ids
    from jax_bsk.masks.algebra.mask import count_codes
    from jax_bsk.masks.grid import Grid

    for block in (32, 64):
        grid = Grid(q_len, kv_len, block, block)
        mask = m.SegmentMask(q_ids, kv_ids, contiguous=True)
        assert count_codes(mask, grid)[1] <= mask._partial_bound(grid)


@pytest.mark.parametrize("least", [np.int32, np.int8])
def test_contiguous_segments_may_have_the_least_number(least):
    ids = np.array([np.iinfo(least).min] * 3 + [0, 0, np.iinfo(least).max], least)
    bound = jax.jit(lambda ids: m.SegmentMask(ids, contiguous=True).bind(6, block_size=32))(jnp.asarray(ids))
    np.testing.assert_array_equal(bound.to_dense()[0, 0], ids[:, None] == ids)


@pytest.mark.parametrize("within", [m.FullMask(), m.CausalMask()])
def test_broken_promise_is_poisoned(within):
    ids = np.sort(np.random.default_rng(0).integers(0, 50, 512))
    bind = jax.jit(lambda i: (m.SegmentMask(i, contiguous=True) & within).bind(512, block_size=32))
    assert poisoned_rows(bind(ids)) == []
    ids[[7, 300]] = ids[[300, 7]]  # one token out of place
    with pytest.raises(ValueError, match="batch 0, head 0, row 0: its entries end at"):
        bind(ids).check()
    assert poisoned_rows(bind(ids)) == list(range(16))


def test_broken_promise_is_poisoned_where_blocks_are_asked_about():
    ids = np.random.default_rng(0).integers(0, 50, 2048)  # anything but contiguous
    mask = (m.SegmentMask(ids, contiguous=True) & m.DilatedMask(1)) | m.SegmentMask(ids, contiguous=True)
    mask = jax.jit(lambda x: x.bind(2048, block_size=32))(mask)
    with pytest.raises(ValueError, match="keep the promise of contiguous=True"):
        mask.check()
    rows = poisoned_rows(mask)
    assert rows
    assert rows == list(range(rows[0], 64)), "those before the room ran out are right"
    dense = ids[:, None] == ids
    offsets = np.asarray(mask.row_offsets)[0, 0]
    assert offsets[-1] == 64 * 64, "true counts"
    bits = np.asarray(mask.bit_tiles)[0, 0, np.asarray(mask.tiles)[0, 0, : offsets[rows[0]]]]
    rebuilt = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little").astype(bool)
    expected = dense.reshape(64, 32, 64, 32).swapaxes(1, 2)[: rows[0]].reshape(-1, 32, 32)
    np.testing.assert_array_equal(rebuilt, expected)


def test_too_few_blocks_is_poisoned():
    ids = np.zeros((2, 128), np.int32)
    ids[1] = np.arange(128) // 32
    mask = jax.jit(lambda i: m.BlockMask.from_mask(m.SegmentMask(i), 128, block_size=32, max_blocks=6))(ids)
    assert mask.kv_blocks.shape == (2, 1, 6)
    assert poisoned_rows(mask, 0) == [1, 2, 3]
    assert poisoned_rows(mask, 1) == []
    with pytest.raises(ValueError, match="batch 0, head 0, row 1: its entries end at 8, past the lists' capacity of 6"):
        mask.check()


def test_padded_tile_slots_have_no_bit_set():
    ids = np.arange(256, dtype=np.int32) // 64
    mask = jax.jit(lambda i: m.SegmentMask(i).bind(256, block_size=32))(ids)
    assert not np.asarray(mask.bit_tiles).any(), "all visited blocks are full"


def test_vmap_over_ids():
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (3, 100)), -1)
    mapped = jax.vmap(lambda i: m.SegmentMask(i, contiguous=True).bind(100, block_size=32))(ids)
    whole = jax.jit(lambda i: m.SegmentMask(i, contiguous=True).bind(100, block_size=32))(ids)
    for name in ("row_offsets", "kv_blocks", "tiles", "bit_tiles"):
        np.testing.assert_array_equal(getattr(mapped, name)[:, 0], getattr(whole, name))


def test_changing_ids_does_not_retrace():
    count = []

    @jax.jit
    def bind(ids):
        count.append(1)
        return (m.CausalMask() & m.SegmentMask(ids, contiguous=True)).bind(200, block_size=32)

    for seed in range(3):
        ids = np.sort(np.random.default_rng(seed).integers(0, 9, (2, 200)), -1)
        expected = (ids[:, :, None] == ids[:, None]) & (np.arange(200)[:, None] >= np.arange(200))
        np.testing.assert_array_equal(bind(ids).to_dense()[:, 0], expected)
    assert len(count) == 1


def test_same_with_64_bit_types():
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, 100)), -1)
    with jax.enable_x64(True):
        mask = jax.jit(lambda i: m.SegmentMask(i).bind(100, block_size=32).transpose())(ids)
        topk = jax.jit(lambda s: m.BlockMask.from_topk(s, 2, q_len=100, block_size=32).transpose())(np.eye(4))
        listed = jax.jit(lambda i: m.BlockMask.from_indices(i, i[:, 0] + 1, q_len=100, block_size=32))(
            np.zeros((4, 1), int)
        )
    np.testing.assert_array_equal(mask.to_dense()[:, 0], ids[:, :, None] == ids[:, None])
    for tree in (mask, topk, listed):
        assert {str(x.dtype) for x in jax.tree_util.tree_leaves(tree)} == {"int32", "uint32"}
    assert listed.density == 0.25


# ---- meshes -----------------------------------------------------------------------------------------------------

T = 300


def _inputs():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 6, (4, T)), -1).astype(np.int32)
    return ids, rng.random((4, 2, T, T)) < 0.5, rng.random((4, 2, 5, 5)).astype(np.float32)


BUILDERS = {
    "segments": lambda ids, array, scores: (m.SegmentMask(ids, contiguous=True) & m.CausalMask()).bind(
        T, block_size=64
    ),
    "array": lambda ids, array, scores: (m.SegmentMask(ids) & m.ArrayMask(array)).bind(T, block_size=64),
    "heads": lambda ids, array, scores: m.MultiHeadMask([m.SegmentMask(ids), m.CausalMask()]).bind(T, block_size=64),
    "prefix": lambda ids, array, scores: m.PrefixLMMask(ids[:, -1]).bind(T, block_size=64),
    "blocks": lambda ids, array, scores: m.BlockMask.from_block_mask(scores > 0.5, q_len=T, block_size=64),
    "topk": lambda ids, array, scores: m.BlockMask.from_topk(scores, 2, q_len=T, block_size=64, mask=m.CausalMask()),
    "indices": lambda ids, array, scores: m.BlockMask.from_indices(
        (scores > 0.5).argsort(-1).astype(np.int32)[..., :2], (scores > 0).sum(-1) * 0 + 1, q_len=T, block_size=64
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"), [("Explicit", name) for name in BUILDERS] + [("Auto", name) for name in ("segments", "topk")]
)
def test_sharded_examples_and_heads_need_no_communication(kind, name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)
    specs = PartitionSpec("data"), PartitionSpec("data", "model"), PartitionSpec("data", "model")
    given = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(_inputs(), specs, strict=True)]
    build = jax.jit(lambda *args: BUILDERS[name](*args).transpose())
    with jax.set_mesh(mesh):
        compiled = build.lower(*given).compile()
        sharded = compiled(*given)
    text = compiled.as_text()
    assert text is not None
    collectives = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    assert not collectives
    assert sharded.kv_blocks.sharding.spec[0] == "data"
    np.testing.assert_array_equal(sharded.to_dense(), BUILDERS[name](*_inputs()).to_dense())


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    ids = _inputs()[0]
    build = jax.shard_map(
        lambda i: (m.SegmentMask(i, contiguous=True) & m.CausalMask()).bind(T, block_size=64).transpose(),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=check_vma,
    )
    expected = (ids[:, :, None] == ids[:, None]) & (np.arange(T)[:, None] >= np.arange(T))
    np.testing.assert_array_equal(jax.jit(build)(jnp.asarray(ids)).to_dense()[:, 0], expected)
