"""Every mask as a literal picture, and against brute force over random shapes."""

from __future__ import annotations

import numpy as np
import pytest

import jax_bsk.masks as m

PICTURES = {
    "full": (m.FullMask(), ["####", "####", "####"]),
    "causal": (m.CausalMask(), ["#...", "##..", "###.", "####"]),
    "causal, ahead": (m.CausalMask(1), ["##..", "###.", "####", "####"]),
    "causal, behind": (m.CausalMask(-2), ["....", "....", "#...", "##.."]),
    "causal, more queries": (m.CausalMask(), ["#.", "##", "##", "##"]),
    "causal, bottom right": (m.CausalMask(2), ["###.", "####"]),
    "local": (m.LocalMask((1, 2)), ["###..", "####.", ".####", "..###", "...##"]),
    "local, int": (m.LocalMask(1), ["##..", "###.", ".###", "..##"]),
    "local, left only": (m.LocalMask((1, 0)), ["#...", "##..", ".##.", "..##"]),
    "local, unbounded left": (m.LocalMask((None, 0)), ["#..", "##.", "###"]),
    "local, unbounded right": (m.LocalMask((0, None)), ["###", ".##", "..#"]),
    "chunked": (m.ChunkedMask(2), ["##...", "##...", "..##.", "..##.", "....#"]),
    "prefix": (m.PrefixLMMask(2), ["##..", "##..", "###.", "####"]),
    "global, count": (m.GlobalMask(1), ["####", "#...", "#...", "#..."]),
    "global, positions": (m.GlobalMask([2, 9]), ["..#.", "..#.", "####", "..#."]),
    "dilated": (m.DilatedMask(2), ["#.#.", ".#.#", "#.#.", ".#.#"]),
    "dilated, window": (m.DilatedMask(2, (2, 0)), ["#.....", ".#....", "#.#...", ".#.#..", "..#.#.", "...#.#"]),
    "segments": (m.SegmentMask([0, 0, 1, 2, 2]), ["##...", "##...", "..#..", "...##", "...##"]),
    "segments, keys": (m.SegmentMask([7, 8], [8, 7, 8, 9]), [".#..", "#.#."]),
    "array": (m.ArrayMask([[True, False], [False, False]]), ["#.", ".."]),
    "function": (m.FunctionMask(lambda q, k: (q + k) % 3 == 0), ["#..#", "..#.", ".#.."]),
    "not": (~m.CausalMask(), [".##", "..#", "..."]),
    "and": (m.CausalMask() & m.LocalMask(1), ["#..", "##.", ".##"]),
    "or": (m.LocalMask(0) | m.GlobalMask([0]), ["###", "##.", "#.#"]),
    "big bird, global and window": (
        m.BigBirdMask(1, window=3, global_blocks=1, random_blocks=0),
        ["#####", "###..", "####.", "#.###", "#..##"],
    ),
    # Fixes the draw: it must not change with machines or versions.
    "big bird, random": (
        m.BigBirdMask(1, window=1, global_blocks=0, random_blocks=1, seed=0),
        ["#.#...", ".#..#.", "..#..#", ".#.#..", ".#..#.", "..#..#"],
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name):
    mask, picture = PICTURES[name]
    expected = np.array([[c == "#" for c in line] for line in picture])
    dense = mask.bind(*expected.shape, block_size=32).to_dense()
    np.testing.assert_array_equal(dense[0, 0], expected)


@pytest.mark.parametrize("seed", range(120))
def test_leaf_against_brute_force(seed, random_mask, random_sizes, assert_well_formed):
    rng = np.random.default_rng(seed)
    q_len, kv_len, block_size = random_sizes(rng)
    mask, dense = random_mask(rng, q_len, kv_len, depth=0)
    block_mask = mask.bind(q_len, kv_len, block_size=block_size)
    assert_well_formed(block_mask)
    assert block_mask.shape == dense.shape
    np.testing.assert_array_equal(block_mask.to_dense(), dense, err_msg=f"{mask} {q_len}x{kv_len} {block_size}")


def test_big_bird_follows_its_definition():
    window, global_blocks, random_blocks, blocks = 5, 2, 3, 40
    mask = m.BigBirdMask(32, window=window, global_blocks=global_blocks, random_blocks=random_blocks, seed=3)
    table = mask.bind(blocks * 32, block_size=32).to_dense()[0, 0, ::32, ::32]
    row, column = np.arange(blocks)[:, None], np.arange(blocks)
    fixed = (abs(row - column) <= window // 2) | (row < global_blocks) | (column < global_blocks)
    assert table[fixed].all()
    extra = (table & ~fixed).sum(1)
    np.testing.assert_array_equal(extra, np.minimum(random_blocks, (~fixed).sum(1)))
    # Other seeds draw others, the same seed the same; every column has a chance.
    other = m.BigBirdMask(32, window=window, global_blocks=global_blocks, random_blocks=random_blocks, seed=4)
    assert (other.bind(blocks * 32, block_size=32).to_dense()[0, 0, ::32, ::32] != table).any()
    assert len(set(np.nonzero(table & ~fixed)[1])) > blocks // 2


@pytest.mark.parametrize("block_size", [32, 64, (96, 32), 128])
@pytest.mark.parametrize("block", [32, 50, 128])
def test_big_bird_on_any_grid(block, block_size):
    q_len, kv_len = 500, 430
    mask = m.BigBirdMask(block, random_blocks=1)
    row, column = np.arange(q_len) // block, np.arange(kv_len) // block
    table = m.BigBirdMask(32, random_blocks=1).bind(-(-q_len // block) * 32, -(-kv_len // block) * 32, block_size=32)
    expected = table.to_dense()[0, 0, ::32, ::32][row[:, None], column]
    np.testing.assert_array_equal(mask.bind(q_len, kv_len, block_size=block_size).to_dense()[0, 0], expected)


def test_huge_numbers_do_not_wrap():
    big = 2**62
    assert m.LocalMask(big).bind(300).density == 1.0
    assert m.CausalMask(big).bind(300).density == 1.0
    assert m.CausalMask(-big).bind(300).density == 0.0
    assert m.ChunkedMask(big).bind(300).density == 1.0
    assert m.PrefixLMMask(big).bind(300).density == 1.0
    np.testing.assert_array_equal(
        m.DilatedMask(big, big).bind(70, block_size=32).to_dense()[0, 0], np.eye(70, dtype=bool)
    )


def test_dilated_window_is_dilated_and_local():
    a = m.DilatedMask(3, (40, 7)).bind(200, block_size=32)
    b = (m.DilatedMask(3) & m.LocalMask((40, 7))).bind(200, block_size=32)
    np.testing.assert_array_equal(a.to_dense(), b.to_dense())


def test_function_is_asked_inside_the_lengths_only():
    table = np.random.default_rng(0).random((70, 45)) < 0.5

    def look_up(q, k):
        assert q.dtype == np.int32
        assert k.dtype == np.int32
        return table[q, k]

    np.testing.assert_array_equal(m.FunctionMask(look_up).bind(70, 45, block_size=32).to_dense()[0, 0], table)


# Of 300 keys in blocks of 128: three blocks a row, and tiles of 128 x 128.
NOT_ELEMENTWISE = {
    "an example": lambda q, k, xp: k <= q + xp.array([5, 150, 296])[:, None, None],
    "one example": lambda q, k, xp: k <= q + xp.array([5])[:, None, None],
    "a token of a block": lambda q, k, xp: k <= q + xp.arange(128)[:, None],
    "a key of a block": lambda q, k, xp: (k <= q) & (xp.arange(128)[None] > 3),
    "a tile": lambda q, k, xp: (k <= q) & (xp.ones((128, 128)) > 0),
    "the query alone": lambda q, k, xp: q > 4,
    "neither": lambda q, k, xp: xp.ones((1, 1)) > 0,
    "a scalar": lambda q, k, xp: xp.max(q) > 0,
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
@pytest.mark.parametrize("q_len", [3, 128, 300])
def test_functions_that_are_not_elementwise_are_refused_by_shape(name, traced, q_len):
    import jax
    import jax.numpy as jnp

    function = NOT_ELEMENTWISE[name]

    def bind(x):
        # x closes the function over a tracer where there is one.
        return m.FunctionMask(lambda q, k: function(q + x, k, jnp if traced else np)).bind(q_len, 300)

    with pytest.raises(ValueError, match=r"FunctionMask\(.*fn (must return|fails).* is it elementwise.* use ArrayMask"):
        jax.make_jaxpr(bind)(np.int32(0)) if traced else bind(0)
    if traced:  # or where it is of host arrays alone, written with jax.numpy, and asked inside jit
        with pytest.raises(ValueError, match="is it elementwise"):
            jax.make_jaxpr(lambda x: bind(0))(np.int32(0))


def test_mistakes_inside_a_function_are_its_own():
    def wrong(q, k):
        raise TypeError("something else")

    with pytest.raises(TypeError, match=r"^something else$"):
        m.FunctionMask(wrong).bind(64)
    with pytest.raises(TypeError, match="positional argument"):
        m.FunctionMask(lambda q: q > 3).bind(64)


def test_function_of_jax_numpy():
    import jax
    import jax.numpy as jnp

    mask = m.FunctionMask(lambda q, k: jnp.abs(q - k) < 9)
    expected = m.LocalMask(8).bind(100, block_size=32).to_dense()
    np.testing.assert_array_equal(mask.bind(100, block_size=32).to_dense(), expected)

    @jax.jit
    def inside(x):
        # Nothing in the mask is traced: built exactly, on the host, also here.
        block_mask = mask.bind(100, block_size=32)
        assert isinstance(block_mask.kv_blocks, np.ndarray)
        return x, block_mask

    np.testing.assert_array_equal(inside(1.0)[1].to_dense(), expected)


BAD = [
    (lambda: m.CausalMask(1.5), TypeError, "CausalMask: offset must be an int"),  # pyright: ignore[reportArgumentType]
    (lambda: m.LocalMask(-1), ValueError, "LocalMask: window must be at least 0, given -1"),
    (lambda: m.LocalMask((1, 2, 3)), ValueError, "LocalMask: window must be a"),  # pyright: ignore[reportArgumentType]
    (lambda: m.LocalMask((1, -2)), ValueError, r"window\[1\] must be at least 0"),
    (lambda: m.LocalMask(None), TypeError, "LocalMask: window must be an int"),  # pyright: ignore[reportArgumentType]
    (lambda: m.ChunkedMask(0), ValueError, "ChunkedMask: chunk must be at least 1"),
    (lambda: m.PrefixLMMask(-1), ValueError, "PrefixLMMask: prefix must be at least 0"),
    (lambda: m.PrefixLMMask(np.ones((2, 2), int)), ValueError, "PrefixLMMask: prefix must be an int or an integer"),
    (lambda: m.GlobalMask([-1]), ValueError, "negative position -1"),
    (lambda: m.GlobalMask(np.ones(3, bool)), ValueError, r"np.flatnonzero\(flags\)"),
    (lambda: m.GlobalMask(1.0), TypeError, "GlobalMask: tokens must be an int"),  # pyright: ignore[reportArgumentType]
    (lambda: m.DilatedMask(0), ValueError, "DilatedMask: dilation must be at least 1"),
    (lambda: m.BigBirdMask(window=2), ValueError, "window must be odd"),
    (lambda: m.BigBirdMask(0), ValueError, "BigBirdMask: block must be at least 1"),
    (lambda: m.SegmentMask([0.5]), TypeError, "SegmentMask: q_ids must hold integers, given float64"),
    (lambda: m.SegmentMask(np.zeros((1, 1, 1), int)), ValueError, r"given shape \(1, 1, 1\)"),
    (lambda: m.SegmentMask(np.zeros((2, 4), int), np.zeros((3, 4), int)), ValueError, "different batch sizes"),
    (lambda: m.SegmentMask([0, 1]).bind(3), ValueError, r"q_ids has shape \(2,\); expected .* q_len=3"),
    (lambda: m.SegmentMask([0, 1]).bind(2, 3), ValueError, "give kv_ids, as there are"),
    (lambda: m.ArrayMask(np.zeros((3, 3))), TypeError, "array == 0"),
    (lambda: m.ArrayMask(np.zeros(3, bool)), ValueError, r"given shape \(3,\)"),
    (lambda: m.ArrayMask(np.zeros((3, 4), bool)).bind(4, 3), ValueError, r"shape \(3, 4\); expected .*\(4, 3\)"),
    (lambda: m.FunctionMask(np.zeros((3, 3), bool)), TypeError, r"wrap a boolean array in ArrayMask"),  # pyright: ignore[reportArgumentType]
    (lambda: m.FunctionMask(lambda q, k: q + k).bind(4), TypeError, "fn must return booleans, given int32"),
    (lambda: m.FunctionMask(lambda q, k: np.ones(3, bool)).bind(4), ValueError, "is it elementwise"),
    (lambda: m.MultiHeadMask([]), ValueError, "masks is empty"),
    (lambda: m.MultiHeadMask(m.FullMask()), TypeError, "must be a list of masks"),  # pyright: ignore[reportArgumentType]
    (lambda: m.MultiHeadMask([np.zeros((3, 3), bool)]), TypeError, r"masks\[0\] is a ndarray"),  # pyright: ignore[reportArgumentType]
    (lambda: m.MultiHeadMask([m.MultiHeadMask([m.FullMask()] * 2)]), ValueError, "has 2 heads itself"),
    (lambda: m.BlockArrayMask(np.ones((2, 2), bool), 64).bind(128), ValueError, "block_size is"),
    (lambda: m.BlockArrayMask(np.ones((2, 2), bool), 64).bind(256, block_size=64), ValueError, r"dimensions \(4, 4\)"),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_mistakes_are_named(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message):
        make()
