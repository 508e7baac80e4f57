"""Block lists as runs: the same lists as without them, whatever is done with them, and the same attention."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
import jax_bsk.masks as m
from jax_bsk.masks import _runs
from jax_bsk.masks.block_mask import RunBlockMask
from jax_bsk.masks.builders import _descent, _host

LISTS = ("row_offsets", "kv_blocks", "tiles", "bit_tiles")
COLUMNS = ("col_offsets", "q_blocks", "col_tiles")


@contextlib.contextmanager
def small_masks_as_runs():
    """Coarse blocks of 2 x 2, as many levels as there can be, and every list as runs."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (_descent, "SIDE", 2),
            (_descent, "TOP", 4),
            (_host, "DESCENT_BLOCKS", 0),
            (_host, "RUN_ENTRIES", 0),
            (_host, "RUN_GAIN", 0.01),
        ):
            patch.setattr(module, name, value)
        yield


def both(mask, *sizes, **options):
    """The mask bound as runs and as plain lists."""
    with small_masks_as_runs():
        runs = mask.bind(*sizes, **options)
    plain = mask.bind(*sizes, **options)
    assert isinstance(runs, RunBlockMask)
    assert type(plain) is m.BlockMask
    return runs, plain


def assert_same_lists(runs, plain):
    for name in LISTS:
        np.testing.assert_array_equal(getattr(runs, name), getattr(plain, name), err_msg=name)
    for name in COLUMNS:
        turned = (getattr(x.transpose(), name) for x in (runs, plain))
        np.testing.assert_array_equal(*turned, err_msg=name)


@pytest.mark.parametrize("seed", range(40))
def test_random_masks(seed, random_mask, random_sizes):
    rng = np.random.default_rng(seed)
    q_len, kv_len, block_size = random_sizes(rng)
    mask, dense = random_mask(rng, q_len, kv_len)
    runs, plain = both(mask, q_len, kv_len, block_size=block_size)
    assert_same_lists(runs, plain)
    np.testing.assert_array_equal(runs.to_dense(), dense)
    runs.check()
    runs.transpose().check()
    assert runs.shape == plain.shape
    assert runs.capacity == plain.capacity == plain.kv_blocks.shape[-1]
    assert runs.density == plain.density
    assert runs.element_density == pytest.approx(plain.element_density)
    ours, theirs = (x.describe(head_dim=64).splitlines() for x in (runs, plain))
    assert [line for line in ours if "storage" not in line] == [line for line in theirs if "storage" not in line]


def documents(length):
    return np.searchsorted([90, 91, 300, 640], np.arange(length), side="right")


LONG = {
    "causal": m.CausalMask(),
    "window": m.CausalMask() & m.LocalMask((300, None)),
    "documents": m.SegmentMask(documents(1000)),
    "causal documents": m.CausalMask() & m.SegmentMask(documents(1000)),
    "window or global": m.LocalMask(100) | m.GlobalMask([0, 5, 700]),
    "prefix": m.PrefixLMMask(150),
    "chunks": m.ChunkedMask(130) & ~m.GlobalMask([40]),
    "not causal": ~m.CausalMask(5),
    "dilated": m.DilatedMask(2) & m.CausalMask(),
    "everything": m.FullMask(),
    "nothing": ~m.FullMask(),
    "function in a window": m.LocalMask(70) & m.FunctionMask(lambda q, k: (q + k) % 3 > 0),
    "heads": m.MultiHeadMask([m.CausalMask(), ~m.FullMask(), m.LocalMask((64, 0)), m.CausalMask()]),
    "BigBird": m.BigBirdMask(32),
    "prefixes": m.PrefixLMMask(np.array([0, 500])),
    "blocks": m.BlockArrayMask(np.tri(32, dtype=bool), 32) | m.LocalMask(3),
}


@pytest.mark.parametrize("name", LONG)
def test_many_blocks(name):
    """32 x 32 blocks, of which the last ones are not whole: several levels, and long runs."""
    assert_same_lists(*both(LONG[name], 1000, block_size=32))


def test_coarse_blocks_decide_most_of_a_regular_mask(monkeypatch):
    asked = []
    classify = m.CausalMask._classify
    monkeypatch.setattr(m.CausalMask, "_classify", lambda *args: asked.append(classify(*args)) or asked[-1])
    mask = m.CausalMask().bind(2**20)
    assert isinstance(mask, RunBlockMask)
    assert sum(codes.size for codes in asked) < 200_000, "of 67 million"
    assert mask.row_starts.size == 2 * mask.nq - 1


def test_equal_blocks_of_documents_are_evaluated_once(monkeypatch):
    asked = []
    evaluate = m.SegmentMask._evaluate
    monkeypatch.setattr(m.SegmentMask, "_evaluate", lambda *args: asked.append(evaluate(*args)) or asked[-1])
    plain = m.SegmentMask(documents(1000)).bind(1000, block_size=32)
    evaluated = sum(x.shape[0] for x in asked)
    assert plain.tiles.max() + 1 <= evaluated < (plain.tiles >= 0).sum() / 2


@pytest.mark.parametrize("seed", range(20))
def test_transposition_of_runs(seed):
    """Random labels of blocks, by brute force."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-2, 3, rng.integers(1, 12, 2)).repeat(rng.integers(1, 4), 1).repeat(rng.integers(1, 4), 0)

    def runs_of(table):
        rows, columns = np.nonzero(table > -2)
        lists = _host.lay_out(table.shape[0], rows, columns, table[rows, columns])
        return _runs.from_lists(lists)

    runs, expected = runs_of(labels), runs_of(labels.T)
    turned = _runs.transpose(runs, labels.shape[1])
    for ours, theirs in zip(turned, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert _runs.count_transposed(runs, labels.shape[1]) == turned.starts.size


# ---- as data ----------------------------------------------------------------------------------------------------

MASK = m.MultiHeadMask([m.CausalMask(), m.LocalMask((20, 10)) | m.GlobalMask([40])])


def test_short_lists_and_lists_with_room_stay_lists():
    assert type(m.CausalMask().bind(4096)) is m.BlockMask
    with small_masks_as_runs():
        assert type(m.BlockMask.from_mask(m.CausalMask(), 512, max_blocks=20)) is m.BlockMask
    striped = m.FunctionMask(lambda q, k: ((k // 32) % 2 == 0) & (q >= 0))
    with small_masks_as_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host, "RUN_GAIN", 4)
        assert type(striped.bind(512, block_size=32)) is m.BlockMask, "runs of one block gain nothing"
        assert isinstance(m.CausalMask().bind(2048, block_size=32), RunBlockMask)


def test_pickling_and_replacing():
    runs, plain = both(MASK, 200, block_size=32)
    _ = jax.tree.leaves(runs), runs.kv_blocks, runs.transpose()
    back = pickle.loads(pickle.dumps(runs.transpose()))
    assert isinstance(back, RunBlockMask)
    assert_same_lists(back, plain)
    assert len(pickle.dumps(runs)) < len(pickle.dumps(both(MASK, 200, block_size=32)[0])) + 100
    assert_same_lists(copy.deepcopy(runs), plain)
    replaced = dataclasses.replace(runs, tiles=plain.tiles)
    assert type(replaced) is m.BlockMask
    assert_same_lists(replaced, plain)


def test_pytree():
    runs, plain = both(MASK, 200, block_size=32)
    structure = jax.tree.structure(runs)
    assert structure == jax.tree.structure(both(MASK, 200, block_size=32)[0])
    assert structure != jax.tree.structure(plain)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(runs))
    assert "row_starts" in str(jax.tree_util.tree_flatten_with_path(runs)[0][1][0])
    for value in (None, True, "x"):
        assert "BlockMask(row_offsets=" in repr(jax.tree.map(lambda _, v=value: v, runs))
    for back in (jax.tree.map(np.asarray, runs), jax.jit(lambda x: x)(runs)):
        assert_same_lists(back, plain)
        back.check()
    traced = jax.jit(lambda x: (x.kv_blocks, x.tiles, x.transpose().q_blocks))(runs)
    for ours, theirs in zip(traced, (plain.kv_blocks, plain.tiles, plain.transpose().q_blocks), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert repr(runs) == repr(plain)


BROKEN = [
    ("row_offsets", (0, 1, 3), 999, "batch 0, head 1, row 2: its entries end at 999, past"),
    ("row_offsets", (0, 0, 2), 0, "batch 0, head 0, row 1: its entries end before they begin"),
    ("row_blocks", (0, 0, 2), -1, "batch 0, head 0, row 1: it visits key block -1, outside"),
    ("row_blocks", (0, 0, 2), 7, r"batch 0, head 0, row 1: it visits key block 7, outside \[0, 7\)"),
    ("row_tiles", (0, 0, 0), 99, "batch 0, head 0, row 0: it refers to bit tile 99"),
    ("col_blocks", (0, 1, 0), 9, "batch 0, head 1, column 0: it visits query block 9"),
    ("col_run_tiles", (0, 1, 0), -1, "batch 0, head 1, column 0: its entries are not those of the rows"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), BROKEN)
def test_check_names_the_row(name, index, value, message):
    runs, _ = both(MASK, 200, block_size=32)
    runs = runs.transpose() if name.startswith("col") else runs
    array = getattr(runs, name).copy()
    array[index] = value
    with pytest.raises(ValueError, match=f"invalid BlockMask: {message}"):
        runs._with_arrays(**{name: array}).check()


# ---- attention --------------------------------------------------------------------------------------------------


def inputs(batch=1, length=96, heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (batch, length, heads, 32)) for key in keys]


def loss(q, k, v, mask, **options):
    out, lse = jax_bsk.sparse_attention(q, k, v, mask=mask, return_residual=True, **options)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + lse.sum(where=jnp.isfinite(lse)), out


def assert_equal(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(x, y)


def test_attention_has_the_same_bits():
    """As a constant, as an argument, in eager calls; values and gradients."""
    runs, plain = both(MASK, 96, block_size=32)
    arrays = inputs()

    def run(mask):
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays, mask)

    expected = jax.jit(run)(plain)
    assert_equal(jax.jit(lambda: run(runs))(), expected)
    assert_equal(jax.jit(run)(runs), expected)
    assert_equal(jax.jit(run)(runs.transpose()), expected)
    assert_equal(jax_bsk.sparse_attention(*arrays, mask=runs), expected[0][1])


def test_xla():
    """Values and gradients; not bit for bit, as what is known of lists decides the order of sums."""
    runs, plain = both(MASK, 96, block_size=32)
    arrays = inputs()

    def run(mask, implementation):
        grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return jax.jit(lambda *arrays: grad(*arrays, mask, implementation=implementation))(*arrays)

    for ours, theirs in zip(jax.tree.leaves(run(runs, "xla")), jax.tree.leaves(run(plain, "cpu")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_gates():
    runs, plain = both(MASK, 96, block_size=32)
    gates = jax.random.normal(jax.random.key(1), (1, 2, runs.capacity))

    def grads(mask, gates):
        return jax.grad(lambda q, g: loss(q, *inputs()[1:], mask=mask, gates=g)[0], (0, 1))(inputs()[0], gates)

    expected = jax.jit(lambda g: grads(plain, g))(gates)
    assert_equal(jax.jit(lambda g: grads(runs, g))(gates), expected)
    assert_equal(jax.jit(grads)(runs, gates), expected)


def test_vmap_over_masks():
    masks = [both(m.LocalMask((w, 0)), 96, block_size=32)[0] for w in (10, 20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)
    arrays = [x.repeat(2, 0)[:, None] for x in inputs()]
    out = jax.vmap(lambda q, k, v, mask: jax_bsk.sparse_attention(q, k, v, mask=mask))(
        arrays[0], arrays[1], arrays[2], stacked
    )
    for n, mask in enumerate(masks):
        assert_equal(out[n], jax_bsk.sparse_attention(*(x[n] for x in arrays), mask=mask))


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_meshes(axis_type):
    runs, plain = both(MASK, 96, block_size=32)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        by_head = jax.sharding.PartitionSpec(None, "heads")
        arrays = [jax.device_put(x, jax.sharding.PartitionSpec(None, None, "heads")) for x in inputs()]
        sharded = jax.tree.map(lambda x: jax.device_put(x, by_head if x.shape[1] == 2 else None), runs)

        @jax.jit
        def grads(mask, *arrays):
            return jax.grad(lambda *a: loss(*a, mask=mask)[1].sum(), (0, 1, 2))(*arrays)

        results = [grads(sharded, *arrays), grads(runs, *arrays), jax.jit(lambda *a: grads(runs, *a))(*arrays)]
    for ours in results:
        assert_equal(ours, jax.jit(lambda *a: grads(plain, *a))(*inputs()))


def test_shard_map():
    runs, plain = both(MASK, 96, block_size=32)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, heads = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec(None, None, "heads")
    lists = jax.tree.map(lambda x: spec(None, "heads" if x.shape[1] == 2 else None), runs)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(heads, heads, heads, lists), out_specs=heads)
    def attend(q, k, v, mask):
        return jax_bsk.sparse_attention(q, k, v, mask=mask)

    assert_equal(attend(*inputs(), runs), jax_bsk.sparse_attention(*inputs(), mask=plain))


def test_export():
    runs, plain = both(m.CausalMask(), 96, block_size=32)
    exported = jax.export.export(jax.jit(lambda mask: (mask, mask.kv_blocks)))(runs)
    mask, kv_blocks = jax.export.deserialize(exported.serialize()).call(runs)
    assert isinstance(mask, RunBlockMask)
    assert_same_lists(mask, plain)
    np.testing.assert_array_equal(kv_blocks, plain.kv_blocks)


# ---- copies on the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1])
def test_device_copies_are_made_once(form):
    mask = both(MASK, 96, block_size=32)[form]
    first, second = jax.tree.leaves(mask), jax.tree.leaves(mask)
    assert all(isinstance(x, jax.Array) for x in first)
    assert all(x is y for x, y in zip(first, second, strict=True))
    assert mask.is_host, "the mask itself is as it was built"
    inside = []
    jax.jit(lambda: inside.extend(jax.tree.leaves(mask)) or 0)()
    assert all(isinstance(x, np.ndarray) for x in inside), "in a trace they are constants, whose values are known"
    back = pickle.loads(pickle.dumps(mask))
    assert back.is_host
    assert set(back.__dict__) == {*mask._stored, *mask._size_names}
    with jax.default_device(jax.devices()[1]):
        assert jax.tree.leaves(mask)[0].devices() == {jax.devices()[1]}
