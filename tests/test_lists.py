"""The native transpose of block lists: against numpy's and plain JAX's, transformed, sharded, lowered."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_bsk
from jax_bsk.core import library
from jax_bsk.lists import ffi, native
from jax_bsk.masks.orders.column_lists import ordered_transpose_traced, transpose_host, transpose_in_jax
from jax_bsk.qa.testing.faults.boundary import check_refused
from jax_bsk.qa.testing.faults.direct import DirectCall, shape
from tests.util import text_of

CALL = "custom_call @jax_bsk_lists_transpose("
FIELDS = ("col_offsets", "q_blocks", "col_tiles", "to_columns", "to_rows")


def make(seed: int, tables: tuple[int, ...] = (2, 3)):
    """Lists of random sizes, a third of them with what no list should have; and their columns."""
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(0, 40)), int(rng.integers(0, 50))
    capacity = int(rng.integers(0, 400))
    offsets = np.sort(rng.integers(0, capacity + 1, (*tables, rows + 1)), axis=-1)
    offsets[..., 0] = 0
    ids = rng.integers(0, max(columns, 1), (*tables, capacity))
    tiles = rng.integers(-1, 3, (*tables, capacity))
    if seed % 3 == 0:
        spoiled = rng.random(offsets.shape) < 0.1
        offsets = np.where(spoiled, rng.integers(-50, capacity + 50, offsets.shape), offsets)
        ids = np.where(rng.random(ids.shape) < 0.1, rng.integers(-(2**31), 2**31 - 1, ids.shape), ids)
        tiles = np.where(rng.random(tiles.shape) < 0.1, rng.integers(-9, 9, tiles.shape), tiles)
    return [x.astype(np.int32) for x in (offsets, ids, tiles)], columns


def in_jax(lists, columns):
    one = lambda *table: transpose_in_jax(*table, nk=columns)  # noqa: E731
    for _ in range(lists[0].ndim - 1):
        one = jax.vmap(one)
    return jax.jit(one)(*lists)


@pytest.mark.parametrize("seed", range(24))
def test_native_is_the_sort_of_plain_jax_and_of_numpy(seed):
    lists, columns = make(seed)
    assert library.load("cpu").usable
    got = ordered_transpose_traced(*lists, nk=columns)
    for name, x, y in zip(FIELDS, got, in_jax(lists, columns), strict=True):
        np.testing.assert_array_equal(x, y, name)
    for name, x, y in zip(FIELDS, got, transpose_host(*lists, nk=columns), strict=False):
        np.testing.assert_array_equal(x, y, name)
    entries, places = got[3:]
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(entries), np.asarray(places), -1),
        np.broadcast_to(np.arange(entries.shape[-1]), entries.shape),
    )


def test_vmap_adds_tables():
    stacked = [make(1, (1, 2)), make(1, (1, 2))]
    columns = stacked[0][1]
    offsets, ids, tiles = (np.stack([lists[i] for lists, _ in stacked]) for i in range(3))
    ids = ids[:, :, :, ::-1].copy()
    both = jax.vmap(lambda *lists: ordered_transpose_traced(*lists, nk=columns))(offsets, ids, tiles)
    shared = jax.vmap(lambda ids: ordered_transpose_traced(offsets[0], ids, tiles[0], columns))(ids)
    for i in range(2):
        for got in (both, shared):
            want = ordered_transpose_traced(offsets[0], ids[i], tiles[0], columns)
            jax.tree.map(np.testing.assert_array_equal, tuple(x[i] for x in got), want)


def test_tables_shard_without_a_collective():
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    lists, columns = make(2, (4, 6))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    placed = [jax.device_put(x, sharding) for x in lists]
    call = jax.jit(lambda *lists: ordered_transpose_traced(*lists, nk=columns))
    compiled = call.lower(*placed).compile()
    text = text_of(compiled)
    assert 'custom_call_target="jax_bsk_lists_transpose"' in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    results = compiled(*placed)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in results)
    jax.tree.map(np.testing.assert_array_equal, results, ordered_transpose_traced(*lists, nk=columns))


def test_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Explicit,))
    lists, columns = make(2, (4, 1))
    with jax.sharding.set_mesh(mesh):
        placed = [jax.device_put(x, PartitionSpec("data")) for x in lists]
        results = jax.jit(lambda *lists: ordered_transpose_traced(*lists, nk=columns))(*placed)
    jax.tree.map(np.testing.assert_array_equal, results, ordered_transpose_traced(*lists, nk=columns))


def lowered(platform, columns=20, rows=10):
    shapes = [jax.ShapeDtypeStruct((1, 2, n), jnp.int32) for n in (rows + 1, 64, 64)]
    function = jax.jit(lambda *lists: ordered_transpose_traced(*lists, nk=columns))
    checks = jax_bsk.export_checks()
    return jax.export.export(function, platforms=[platform], disabled_checks=checks)(*shapes).mlir_module()


def test_other_platforms_and_sizes_have_plain_jax(monkeypatch):
    assert CALL in lowered("cpu")
    assert CALL not in lowered("tpu")
    # As a CUDA library says of itself, whose counters are in shared memory.
    limited = library.Library("cuda", {"lists_max_words": 1_000}, None)
    monkeypatch.setattr(library, "load", lambda platform: limited)
    assert CALL in lowered("cuda")
    assert CALL not in lowered("cuda", columns=300)
    assert CALL not in lowered("cuda", rows=1_000)
    monkeypatch.setattr(library, "load", lambda platform: library.Library(platform, {}, "not built"))
    assert CALL not in lowered("cuda")


def test_bad_shapes_are_refused_by_the_handler():
    call = native.TransposeCall(5, transpose_in_jax)
    offsets, ids, tiles = np.zeros((1, 4), np.int32), np.zeros((1, 8), np.int32), np.zeros((1, 9), np.int32)
    with pytest.raises(Exception, match="tiles has shape"):
        jax.block_until_ready(native.transpose((offsets, ids, tiles), call))


def test_what_does_not_fit_is_refused():
    rows, columns, capacity = 2, 3, 4
    operands = {
        "row_offsets": jnp.array([[[0, 2, 4]]], jnp.int32),
        "kv_blocks": jnp.array([[[0, 1, 1, 2]]], jnp.int32),
        "tiles": jnp.full((1, 1, capacity), -1, jnp.int32),
    }
    lengths = {"col_offsets": columns + 1, "q_blocks": capacity, "col_tiles": capacity}
    lengths |= {"to_columns": capacity, "to_rows": capacity}
    results = {name: shape("int32", 1, 1, length) for name, length in lengths.items()}
    attributes = {"columns": np.int64(columns), "version": jax_bsk.__version__}
    call = DirectCall(ffi.LISTS_TRANSPOSE, operands, results, attributes)
    changes = {
        "columns": {"columns": np.int64(columns + 1)},
        "negative columns": {"columns": np.int64(-1)},
        "the largest number of columns": {"columns": np.int64(2**63 - 1)},
        "offsets rank": {"row_offsets": shape("int32", rows + 1)},
        "no offsets": {"row_offsets": shape("int32", 1, 1, 0)},
        "ids type": {"kv_blocks": shape("float32", 1, 1, capacity)},
        "tiles capacity": {"tiles": shape("int32", 1, 1, capacity + 1)},
        "to_rows tables": {"to_rows": shape("int32", 1, 2, capacity)},
        "another version": {"version": "0.0.0"},
    }
    check_refused(call, changes)
    np.testing.assert_array_equal(call()["col_offsets"][0, 0], [0, 1, 3, 4])
