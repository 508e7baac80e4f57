"""Offsets of queries: ints, one per example, one per query; known on the host and traced; and the room they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk.masks as m
from jax_bsk import sparse_attention
from jax_bsk.masks.algebra.mask import count_codes
from jax_bsk.masks.grid import Grid

B, T, S = 3, 40, 100
K = np.arange(S)
MASKS = {
    "causal": (lambda o: m.CausalMask(o), lambda p: p >= K),
    "local": (lambda o: m.LocalMask((9, 2), offset=o), lambda p: (p - 9 <= K) & (p + 2 >= K)),
    "local, unbounded": (lambda o: m.LocalMask((None, 2), offset=o), lambda p: p + 2 >= K),
    "chunked": (lambda o: m.ChunkedMask(7, offset=o), lambda p: p // 7 == K // 7),
    "prefix": (lambda o: m.PrefixLMMask(21, offset=o), lambda p: (p >= K) | (K < 21)),
    "composed": (lambda o: m.CausalMask(o) & ~m.CausalMask(o - 9), lambda p: (p >= K) & (p - 9 < K)),
}
RNG = np.random.default_rng(0)
OFFSETS = {
    "int": 33,
    "all": np.int64(-7) * np.ones((), int),
    "per example": np.array([60, 0, -30], np.int32),
    "per query": RNG.integers(-T, S, (1, T)).astype(np.int16),
    "per example and query": RNG.integers(-T, S, (B, T)),
}


def expected(dense, offset):
    offset = np.asarray(offset)
    offset = offset[:, None] if offset.ndim == 1 else offset
    positions = np.arange(T) + offset
    return np.stack([dense(p[:, None]) for p in np.atleast_2d(positions)])[:, None]


@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets_on_the_host_and_traced(kind, assert_well_formed):
    offset = OFFSETS[kind]

    def bind(offset):
        return {name: make(offset).bind(T, S, block_size=32) for name, (make, _) in MASKS.items()}

    traced = jax.jit(bind)(offset) if "example" in kind else {}
    for name, bound in [*bind(offset).items(), *traced.items()]:
        assert_well_formed(bound)
        np.testing.assert_array_equal(bound.to_dense(), expected(MASKS[name][1], offset), err_msg=name)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32])
def test_integers_of_any_type(dtype):
    offset = np.array([100, 3], dtype)
    with jax.enable_x64(True):
        bound = jax.jit(lambda o: (m.CausalMask(o) | m.PrefixLMMask(o)).bind(64, 128, block_size=32))(offset)
    q, k = np.arange(64)[:, None], np.arange(128)
    np.testing.assert_array_equal(bound.to_dense()[:, 0], q + offset.astype(int)[:, None, None] >= k)


@pytest.mark.parametrize("seed", range(40))
def test_the_room_of_traced_offsets_is_enough_and_a_diagonals(seed):
    rng = np.random.default_rng(seed)
    q_len, kv_len = (int(n) for n in rng.integers(1, 900, 2))
    q_len = 1 if seed % 8 == 0 else q_len
    block_q, block_kv = (int(b) for b in rng.choice([32, 64, 96, 128], 2))
    grid = Grid(q_len, kv_len, block_q, block_kv)
    left, right, chunk = (int(n) for n in rng.integers(0, 200, 3))

    def masks(offset):
        yield m.CausalMask(offset)
        yield m.LocalMask((left, right), offset=offset)
        yield m.LocalMask((None, right), offset=offset)
        yield m.ChunkedMask(chunk + 1, offset=offset)
        yield m.PrefixLMMask(left, offset=offset)

    for offset in rng.integers(-q_len, kv_len + 1, 8):
        # An offset per example has the bounds of a traced one.
        for mask, unknown in zip(masks(offset), masks(offset[None]), strict=True):
            visited, partial = count_codes(mask, grid)
            assert partial <= unknown._partial_bound(grid), mask
            assert visited <= unknown._visited_bound(grid), mask


def test_room_is_that_of_the_diagonal_and_the_window():
    shape = jax.ShapeDtypeStruct((), np.int32)

    def room(make, q_len, kv_len):
        bound = jax.eval_shape(lambda o: make(o).bind(q_len, kv_len), shape)
        return bound.kv_blocks.shape[-1], bound.bit_tiles.shape[2]

    assert room(m.CausalMask, 4096, 4096) == (32 * 32, 2 * 32 - 1), "any offset, one diagonal"
    assert room(m.CausalMask, 1, 4096) == (32, 1), "one query"
    assert room(lambda o: m.LocalMask((255, 0), offset=o), 1, 131072) == (3, 2), "decoding through a window"
    assert room(lambda o: m.LocalMask((255, 0), offset=o), 4096, 4096)[0] == 32 * 4
    assert room(lambda o: m.CausalMask(o) & m.LocalMask((255, 0), offset=o), 1, 4096)[0] == 3
    assert room(lambda o: m.CausalMask(o) | m.LocalMask((255, 0), offset=o), 1, 4096)[0] == 32
    assert room(lambda o: m.ChunkedMask(256, offset=o), 1, 4096)[0] <= 5


def test_decoding_compiles_once_and_is_the_whole_sequence():
    """Each example's cache is filled up to a length of its own; one query per example through a window."""
    length, heads = 64, 2
    q, k, v = (jax.random.normal(key, (B, length, heads, 8)) for key in jax.random.split(jax.random.key(0), 3))
    window = (9, 0)
    whole = sparse_attention(q, k, v, local_window_size=window, implementation="xla")
    traces = []

    @jax.jit
    def decode(query, position):
        traces.append(position)
        mask = m.LocalMask(window, offset=position)
        return sparse_attention(query, k, v, mask=mask, implementation="xla")

    for position in ([0, 5, 63], [63, 8, 9]):
        position = np.array(position, np.int32)
        one = jnp.take_along_axis(q, position[:, None, None, None], axis=1)
        out = decode(one, position)
        np.testing.assert_allclose(out[:, 0], whole[np.arange(B), position], atol=1e-5)
    assert len(traces) == 1


BAD = [
    (lambda: m.LocalMask(3, 0), TypeError, r"got 2 arguments; write LocalMask\(\(3, 0\)\)"),
    (lambda: m.CausalMask(np.ones(3)), TypeError, r"must be an int or an integer array, got float64\(3,\); cast"),
    (lambda: m.ChunkedMask(3, offset=np.ones((2, 1, 1), int)), ValueError, r"got shape \(2, 1, 1\); give one offset"),
    (lambda: m.CausalMask(np.ones((2, 5), int)).bind(4), ValueError, r"q_len=4, got 5; give one offset per query"),
    (lambda: jax.jit(m.LocalMask)(3), TypeError, r"; for a traced window write CausalMask\(offset=right\) & ~"),
    (lambda: jax.jit(lambda w: m.LocalMask((w, 0)))(3), TypeError, r"window\[0\] .*for a traced window write"),
    (lambda: jax.jit(m.ChunkedMask)(3), TypeError, "chunk must be an int that is known .*static_argnums"),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
