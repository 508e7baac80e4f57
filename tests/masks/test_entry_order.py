"""The order that numbers an entry take to the key-major lists and back, for whatever the lists hold."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk.masks.orders import entry_order
from jax_bsk.masks.orders.entry_order import EntryOrder, to_columns, to_rows, with_entry_order

LISTS = "col_offsets", "q_blocks", "col_tiles"


def wild_mask(seed: int) -> m.BlockMask:
    """Lists with duplicates, ids and tiles out of range, rows in no order, room left, offsets that make no sense."""
    rng = np.random.default_rng(seed)
    batch, heads, capacity = (int(n) for n in (*rng.integers(1, 3, 2), rng.choice([1, 7, 20, 33])))
    nq, nk, n_tiles = int(rng.integers(1, 6)), int(rng.integers(1, 6)), int(rng.integers(0, 4))
    offsets = np.sort(rng.integers(0, capacity + 1, (batch, heads, nq + 1)), -1)
    if seed % 3 == 0:
        offsets[rng.integers(batch), rng.integers(heads), rng.integers(nq + 1)] = rng.choice([-3, 0, capacity + 4])
    ids = (
        rng.integers(-1, nk + 1, (batch, heads, capacity))
        if seed % 2
        else rng.integers(0, nk, (batch, heads, capacity))
    )
    tiles = rng.integers(-1, n_tiles, ids.shape)
    if seed % 5 == 0:
        tiles[rng.random(ids.shape) < 0.1] = rng.choice([-2, n_tiles, 99])
    return m.BlockMask(
        offsets.astype(np.int32),
        ids.astype(np.int32),
        tiles.astype(np.int32),
        np.zeros((1, 1, n_tiles, 32, 1), np.uint32),
        None,
        None,
        None,
        block_q=32,
        block_kv=32,
        q_len=32 * nq,
        kv_len=32 * nk,
    )


def assert_ordered(mask, ordered, order):
    """The order against the lists that it is said to be of."""
    rows_of = {}
    for b, h in np.ndindex(mask.kv_blocks.shape[:2]):
        entries, places, fate = (np.asarray(x)[b, h] for x in order)
        offsets, q_blocks, col_tiles = (np.asarray(getattr(ordered, name))[b, h] for name in LISTS)
        ids, tiles = mask.kv_blocks[b, h], mask.tiles[b, h]
        np.testing.assert_array_equal(np.sort(entries), np.arange(ids.size))
        np.testing.assert_array_equal(entries[places], np.arange(ids.size))
        row_offsets = np.clip(np.maximum.accumulate(mask.row_offsets[b, h]), 0, ids.size)
        for row, (begin, end) in enumerate(itertools.pairwise(row_offsets)):
            rows_of |= dict.fromkeys(range(begin, end), row)
        for column, (begin, end) in enumerate(itertools.pairwise(offsets)):
            own = entries[begin:end]
            np.testing.assert_array_equal(ids[own], column)
            np.testing.assert_array_equal(tiles[own], col_tiles[begin:end])
            np.testing.assert_array_equal([rows_of[entry] for entry in own], q_blocks[begin:end])
            sound = ((col_tiles[begin:end] >= -1) & (col_tiles[begin:end] < mask.bit_tiles.shape[2])).all()
            np.testing.assert_array_equal(fate[own], 1 if sound else np.nan)
        np.testing.assert_array_equal(fate[entries[offsets[-1] :]], 0)
        rows_of.clear()


@pytest.mark.parametrize("seed", range(30))
def test_order_of_any_lists(seed):
    mask = wild_mask(seed)
    ordered, order = with_entry_order(mask)
    assert_ordered(mask, ordered, order)
    for name in LISTS:
        np.testing.assert_array_equal(getattr(ordered, name), getattr(mask.transpose(), name))
    if seed % 5:  # compiling is what takes long
        return
    for traced in (jax.jit(with_entry_order)(mask), with_entry_order(jax.tree.map(jnp.asarray, mask))):
        for a, e in zip(jax.tree.leaves(traced), jax.tree.leaves((ordered, order)), strict=True):
            np.testing.assert_array_equal(a, e)
            assert a.dtype == e.dtype


def test_host_order_is_made_once(monkeypatch):
    mask = wild_mask(1)
    first = with_entry_order(mask)
    monkeypatch.setattr(entry_order, "_order_host", None)
    assert with_entry_order(mask) is first
    assert first[0] is mask.transpose()


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_there_and_back(lead):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 3, 9)).astype(np.float32)
    entries = np.argsort(rng.random((*lead, 9)), -1).astype(np.int32)
    fate = np.where(np.arange(9) < 7, np.where(np.arange(9) < 6, np.float32(1), np.float32(np.nan)), np.float32(0))
    order = EntryOrder(entries, np.argsort(entries, -1).astype(np.int32), np.broadcast_to(fate, entries.shape))
    turned = np.take_along_axis(numbers, np.broadcast_to(entries, numbers.shape), -1)
    for call in (lambda f, x: f(x, order), lambda f, x: jax.jit(f)(x, order)):
        np.testing.assert_array_equal(call(to_columns, jnp.asarray(numbers)), turned)
        back = np.asarray(call(to_rows, jnp.asarray(turned)))
        np.testing.assert_array_equal(back[..., :6], numbers[..., :6])
        assert np.isnan(back[..., 6]).all()
        np.testing.assert_array_equal(back[..., 7:], 0)


@pytest.mark.parametrize("q_len", [0, 64])
@pytest.mark.parametrize("kv_len", [0, 64])
def test_empty_sizes(q_len, kv_len):
    mask = m.FullMask().bind(q_len, kv_len, block_size=32)
    host = with_entry_order(mask)
    for a, e in zip(jax.tree.leaves(jax.jit(with_entry_order)(mask)), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(a, e)
