"""jax_bsk.packing: rows of documents, packed arrays, positions and numbers of sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import packing


def first_fit_by_search(lengths, length):
    rows, room = [], []
    for number, size in enumerate(lengths):
        fits = [n for n, left in enumerate(room) if left >= size]
        row = fits[0] if fits else len(rows)
        if not fits:
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= size
    return tuple(map(tuple, rows))


def best_fit_by_search(lengths, length):
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fits = [(left, n) for n, left in enumerate(room) if left >= lengths[number]]
        row = min(fits)[1] if fits else len(rows)
        if not fits:
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= lengths[number]
    return tuple(sorted(tuple(sorted(row)) for row in rows))


@pytest.mark.parametrize("seed", range(10))
def test_rows(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 200))
    lengths = rng.integers(0, length + 1, int(rng.integers(0, 60)))
    for found, searched in (
        (packing.first_fit(lengths, length), first_fit_by_search(lengths, length)),
        (packing.best_fit(lengths, length), best_fit_by_search(lengths, length)),
    ):
        assert found.rows == searched
        assert sorted(n for row in found for n in row) == list(range(len(lengths)))
        assert all(sum(lengths[n] for n in row) <= length for row in found)
        numbers = found.cu_seqlens(100)
        assert numbers.shape == (len(found), 101)
        for row, starts in zip(found, numbers, strict=True):
            np.testing.assert_array_equal(np.diff(starts)[: len(row)], [lengths[n] for n in row])
            assert (starts[len(row) :] == starts[-1]).all()


def test_waste_is_reported():
    lengths = [5, 5, 5, 3, 3, 3]
    assert packing.first_fit(lengths, 8).waste == 0
    rows = packing.best_fit([7, 7, 2], 10)
    assert rows.waste == pytest.approx(0.2)
    assert str(rows) == "3 documents of 16 tokens in 2 rows of 10, 20.0% of them padding"
    assert packing.first_fit([], 10).waste == 0


def test_many_documents_are_fast():
    lengths = np.random.default_rng(0).integers(1, 2048, 20_000)
    best, first = packing.best_fit(lengths, 4096), packing.first_fit(lengths, 4096)
    assert best.waste <= first.waste < 0.05


@pytest.mark.parametrize("xp", [np, jnp])
def test_pack_and_unpack(xp):
    arrays = [xp.asarray(np.random.default_rng(n).random((n, 3), np.float32)) for n in (4, 0, 7)]
    packed, numbers = packing.pack(arrays, 16, sequences=5)
    assert isinstance(packed, np.ndarray) == (xp is np)
    assert packed.shape == (16, 3)
    assert numbers.tolist() == [0, 4, 4, 11, 11, 11]
    assert not packed[11:].any()
    for array, back in zip(arrays, packing.unpack(packed, numbers, 3), strict=True):
        np.testing.assert_array_equal(back, array)
    assert len(packing.unpack(packed, numbers)) == 5
    assert packing.pack(arrays)[0].shape == (11, 3)


def test_positions_and_numbers_are_traced():
    numbers = np.array([[0, 3, 3, 8], [2, 2, 5, 6]], np.int32)
    run = jax.jit(lambda x: (packing.positions(x, 10), packing.segment_ids(x, 10)))
    places, ids = run(numbers)
    assert places.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 0, 0, 0, 0, 0]]
    assert ids.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2, 3, 3], [-1, -1, 1, 1, 1, 2, 3, 3, 3, 3]]
    assert places.dtype == ids.dtype == jnp.int32
    np.testing.assert_array_equal(jax.jit(lambda x: packing.cu_seqlens(x, 4))(jnp.array([3, 0, 5])), [0, 3, 3, 8, 8])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: packing.first_fit([3, 9], 8), ValueError, r"lengths is in \[0, 8\]"),
        (lambda: packing.best_fit([-1], 8), ValueError, r"lengths is in \[0, 8\]"),
        (lambda: packing.best_fit(np.array([1.5]), 8), TypeError, "sequence of integers"),
        (lambda: packing.cu_seqlens([1, 2], 1), ValueError, "make room for more"),
        (lambda: packing.pack([]), ValueError, "at least one array"),
        (lambda: packing.pack([np.zeros((2, 3)), np.zeros((2, 4))]), ValueError, "one type and one shape"),
        (lambda: packing.pack([np.zeros((2, 3))], 1), ValueError, "length is at least the 2 tokens"),
        (lambda: jax.jit(lambda x: packing.unpack(x, x))(np.zeros(3, int)), TypeError, "cu_seqlens has known values"),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
