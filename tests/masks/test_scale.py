"""Long sequences: memory stays with the lists and a few chunks, never with tokens squared."""

from __future__ import annotations

import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
import jax_bsk.masks as m


def peak_of(build):
    tracemalloc.start()
    try:
        return build(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_long_documents():
    length = 65_536
    ids = np.sort(np.random.default_rng(0).integers(0, 500, length))
    mask = m.CausalMask() & m.LocalMask((4096, None)) & m.SegmentMask(ids)
    bound, peak = peak_of(lambda: mask.bind(length))
    assert peak < 64 * 2**20, "a boolean for each element would be 4 GiB"
    # Rows taken at random against their definition.
    for row in np.random.default_rng(1).integers(0, bound.nq, 5):
        got = np.zeros((128, length), bool)
        for e in range(bound.row_offsets[0, 0, row], bound.row_offsets[0, 0, row + 1]):
            column, tile = bound.kv_blocks[0, 0, e], bound.tiles[0, 0, e]
            bits = np.unpackbits(bound.bit_tiles[0, 0, tile].view(np.uint8), axis=-1, bitorder="little")
            got[:, column * 128 : (column + 1) * 128] = True if tile < 0 else bits
        q, k = np.arange(row * 128, (row + 1) * 128)[:, None], np.arange(length)
        np.testing.assert_array_equal(got, (q >= k) & (q - k <= 4096) & (ids[q] == ids[k]))


def test_memory_of_a_function():
    bound, peak = peak_of(lambda: m.FunctionMask(lambda q, k: (q ^ k) % 7 < 3).bind(8192))
    assert bound.bit_tiles.shape[2] == 7
    assert peak < 64 * 2**20, "a boolean for each element would be 64 MiB, its indices 512"


def test_million_tokens():
    start = time.perf_counter()
    bound = (m.CausalMask() & m.LocalMask((4096, None)) | m.GlobalMask(128)).bind(2**20)
    assert time.perf_counter() - start < 20  # 67 million blocks; about a second
    assert bound.density < 0.01
    assert bound.bit_tiles.shape[2] == 2


MILLION = 2**20
TEN_DOCUMENTS = np.searchsorted(np.linspace(0, MILLION, 11)[1:-1].round() + 77, np.arange(MILLION), side="right")
REGULAR = {
    "causal": m.CausalMask(),
    "window": m.CausalMask() & m.LocalMask((4096, None)),
    "documents": m.SegmentMask(TEN_DOCUMENTS),
    "causal documents": m.CausalMask() & m.SegmentMask(TEN_DOCUMENTS),
    "window or global": m.LocalMask(4096) | m.GlobalMask([0, 77_777]),
    "prefix": m.PrefixLMMask(1000),
    "chunks": m.ChunkedMask(100_000) & ~m.LocalMask(10),
    "heads": m.MultiHeadMask([m.CausalMask(), m.LocalMask((4096, 0)), ~m.SegmentMask(TEN_DOCUMENTS)]),
}


@pytest.mark.parametrize("name", REGULAR)
def test_a_regular_mask_costs_what_its_structure_costs(name):
    """As plain lists causal takes 4.7 s and 268 MB, twice that with its transposition, and 1 GB of program text."""
    mask = REGULAR[name]
    start = time.perf_counter()
    bound, peak = peak_of(lambda: mask.bind(MILLION))
    assert peak < 40 * 2**20
    array = jax.ShapeDtypeStruct((1, MILLION, mask.heads, 64), jnp.float32)

    def loss(q, k, v):
        return jax_bsk.sparse_attention(q, k, v, mask=bound).sum()

    for function in (loss, jax.grad(loss, (0, 1, 2))):
        assert len(jax.jit(function).lower(array, array, array).as_text()) < 16 * 2**20
    assert bound.nbytes < 4 * 2**20
    bound.check()
    assert f"{bound.density:.2%} of the blocks" in bound.describe()
    # About a second in all; the bound is for a busy machine.
    assert time.perf_counter() - start < 20


def test_traced_build_has_no_array_of_tokens_squared():
    length = 16_384
    bind = jax.jit(lambda i: (m.CausalMask() & m.SegmentMask(i, contiguous=True)).bind(length))
    memory = bind.lower(np.zeros((1, length), np.int32)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 64 * 2**20, "a boolean an element: 256 MiB"
