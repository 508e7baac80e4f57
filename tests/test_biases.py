"""`sparse_attention(..., bias=...)`: every object of `jax_bsk.biases`, alone and added up, over every implementation.

Compared with dense attention in float64, to whose logits the bias is added as an array of all pairs. The kernels' own
corners are in `test_bias_kernels`, the numeric battery draws biases too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bsk
from jax_bsk import BlockMask, sparse_attention
from jax_bsk.biases import (
    AlibiBias,
    Bias,
    BlockBias,
    ClippedBuckets,
    DenseBias,
    PositionBias,
    RelativeBias,
    T5Buckets,
    TileBias,
    alibi_slopes,
)
from jax_bsk.core.dispatch import Implementation
from jax_bsk.masks import CausalMask, FullMask, LocalMask
from jax_bsk.qa.testing.cases import pair_entries
from tests.util import collectives, random_inputs, random_mask, text_of

B, T, S, N, K, BLOCK = 2, 80, 96, 4, 2, 32
DISTANCES = np.arange(S)[None] - np.arange(T)[:, None]
EXAMPLE, HEAD = np.arange(B)[:, None, None, None], np.arange(N)[None, :, None, None]
ROW, COLUMN = np.arange(T)[None, None, :, None] % BLOCK, np.arange(S)[None, None, None] % BLOCK


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def reference(query, key, value, bias, attends, factors=None):
    """Dense attention; `bias` and `attends` broadcast to BNTS, `factors` multiply the probabilities."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[-1]) + bias
    ceiling = jnp.where(attends, logits, -jnp.inf).max(-1, keepdims=True)
    ceiling = jnp.where(jnp.isneginf(ceiling), 0, ceiling)
    weights = jnp.where(attends, jnp.exp(jnp.where(attends, logits - ceiling, -jnp.inf)), 0)
    total = weights.sum(-1, keepdims=True)
    probs = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("bnts,bsnv->btnv", probs if factors is None else probs * factors, value)


def weighted(out):
    """A scalar whose gradient is another for each element of the output."""
    return (jnp.sin(out) * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum()


@jax.jit
def expected_gradients(query, key, value, bias, attends, factors):
    """Value and gradients of query, key, value and of the bias of all pairs."""

    def loss(query, key, value, bias):
        return weighted(reference(query, key, value, bias, attends, factors))

    return jax.value_and_grad(loss, (0, 1, 2, 3))(query, key, value, bias)


def bind(batch=1, heads=1) -> tuple[BlockMask, np.ndarray]:
    dense = random_mask(0, batch=batch, heads=heads, q_len=T, kv_len=S)
    return BlockMask.from_dense(dense, block_size=BLOCK), dense


def numbers_of(mask: BlockMask, count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-1, count, mask.kv_blocks.shape)


class Example(NamedTuple):
    """A bias by its arrays, and the same as an array of all pairs.

    Attributes:
      make: (mask, *arrays) to what `bias` is given.
      dense: (mask, *arrays) to the array [B|1, N|1, T, S].
      shapes: Of the arrays, from the mask.
    """

    make: Callable[..., Any]
    dense: Callable[..., Any]
    shapes: Callable[[BlockMask], list[tuple[int, ...]]]


def of_table(table, buckets):
    return jnp.moveaxis(table[buckets(DISTANCES)], -1, 0)[None]


def of_entries(mask, values):
    """A number per entry, [B|1, N|1, capacity], for each pair; what no entry has is never read."""
    values = jnp.broadcast_to(values, (B, N, values.shape[-1]))
    return values[EXAMPLE, HEAD, np.broadcast_to(pair_entries(mask), (B, N, T, S))]


def of_tiles(mask, tiles):
    numbers = np.broadcast_to(numbers_of(mask, tiles.shape[2]), (B, N, mask.capacity))
    number = numbers[EXAMPLE, HEAD, np.broadcast_to(pair_entries(mask), (B, N, T, S))]
    tiles = jnp.broadcast_to(tiles, (B, N, tiles.shape[2], BLOCK, BLOCK))
    return jnp.where(number < 0, 0, tiles[EXAMPLE, HEAD, np.maximum(number, 0), ROW, COLUMN])


def of_features(mask, of_queries, of_keys):
    del mask
    of_keys = jnp.repeat(of_keys, N // of_keys.shape[2], 2)
    of_queries = jnp.broadcast_to(of_queries, (B, T, N, of_queries.shape[-1]))
    return jnp.einsum("btnf,bsnf->bnts", of_queries, jnp.broadcast_to(of_keys, (B, S, N, of_keys.shape[-1])))


def of_slopes(slopes):
    return (
        -jnp.broadcast_to(slopes, (slopes.shape[0], N))[:, :, None, None]
        * np.abs(DISTANCES).astype(slopes.dtype)[None, None]
    )


EXAMPLES = {
    "alibi": Example(lambda m, s: AlibiBias(s), lambda m, s: of_slopes(s[None]), lambda m: [(N,)]),
    "alibi of examples": Example(lambda m, s: AlibiBias(s), lambda m, s: of_slopes(s), lambda m: [(B, N)]),
    "t5": Example(
        lambda m, t: RelativeBias.t5(t), lambda m, t: of_table(t, T5Buckets(32, True, 128)), lambda m: [(32, N)]
    ),
    "clipped": Example(
        lambda m, t: RelativeBias.clipped(t), lambda m, t: of_table(t, ClippedBuckets(10)), lambda m: [(21, N)]
    ),
    "clipped past all": Example(
        lambda m, t: RelativeBias.clipped(t), lambda m, t: of_table(t, ClippedBuckets(200)), lambda m: [(401, 1)]
    ),
    "a function": Example(
        lambda m, t: RelativeBias(t, lambda d: d % 5), lambda m, t: of_table(t, lambda d: d % 5), lambda m: [(5, N)]
    ),
    "positions": Example(lambda m, q, k: PositionBias(q, k), of_features, lambda m: [(1, T, N, 3), (B, S, 1, 3)]),
    "positions of all heads": Example(
        lambda m, q, k: PositionBias(q, k), of_features, lambda m: [(B, T, 1, 3), (1, S, N, 3)]
    ),
    "blocks": Example(lambda m, v: BlockBias(v), of_entries, lambda m: [(B, N, m.capacity)]),
    "tiles": Example(lambda m, t: TileBias(t, numbers_of(m, 3)), of_tiles, lambda m: [(1, N, 3, BLOCK, BLOCK)]),
    "tiles of rows": Example(lambda m, t: TileBias(t, numbers_of(m, 3)), of_tiles, lambda m: [(B, 1, 3, BLOCK, 1)]),
    "dense": Example(lambda m, x: DenseBias(x), lambda m, x: x, lambda m: [(B, N, T, S)]),
    "dense, shared": Example(lambda m, x: x, lambda m, x: x, lambda m: [(1, N, T, S)]),
    "dense, keys": Example(lambda m, x: x, lambda m, x: x, lambda m: [(B, 1, 1, S)]),
    "dense, queries": Example(lambda m, x: x, lambda m, x: x, lambda m: [(T, 1)]),
    "sum": Example(
        lambda m, s, t, x: AlibiBias(s) + TileBias(t, numbers_of(m, 3)) + x,
        lambda m, s, t, x: of_slopes(s[None]) + of_tiles(m, t) + x,
        lambda m: [(N,), (1, 1, 3, BLOCK, BLOCK), (1, N, 1, S)],
    ),
    "sum of a kind": Example(
        lambda m, a, b, v, w: a + (BlockBias(v) + TileBias(w, numbers_of(m, 3))) + DenseBias(b),
        lambda m, a, b, v, w: a + b + of_entries(m, v) + of_tiles(m, w),
        lambda m: [(1, N, T, S), (B, 1, 1, S), (B, N, m.capacity), (1, 1, 3, BLOCK, BLOCK)],
    ),
    "sum of positions": Example(
        lambda m, s, q, k, p, r: AlibiBias(s) + PositionBias(q, k) + PositionBias(p, r),
        lambda m, s, q, k, p, r: of_slopes(s[None]) + of_features(m, q, k) + of_features(m, p, r),
        lambda m: [(N,), (1, T, N, 2), (1, S, 1, 2), (B, T, 1, 1), (B, S, K, 1)],
    ),
}
# Of each kind of term one, and a sum: compiling plain JAX takes a second or two.
IN_XLA = "alibi of examples", "clipped", "positions of all heads", "blocks", "tiles of rows", "dense, keys", "sum"


def arrays_of(example: Example, mask: BlockMask, dtype: Any = np.float64, amplitude: float = 1.0):
    rng = np.random.default_rng(3)
    return [jnp.asarray(amplitude * rng.standard_normal(shape), dtype) for shape in example.shapes(mask)]


def compare(name, implementation, mask, attends, inputs, tolerance=1e-11, amplitude=1.0):
    """A call with one of `EXAMPLES` and all its gradients against the reference."""
    example = EXAMPLES[name]
    dtype = np.float64 if inputs[0].dtype == np.float64 else np.float32
    arrays = arrays_of(example, mask, dtype, amplitude)

    def loss(query, key, value, *arrays):
        bias = example.make(mask, *arrays)
        out = sparse_attention(query, key, value, bias, mask, implementation=implementation)
        return weighted(out.astype(dtype))

    actual = jax.jit(jax.value_and_grad(loss, tuple(range(3 + len(arrays)))))(*inputs, *arrays)
    inputs64, arrays64 = ([x.astype(np.float64) for x in xs] for xs in (inputs, arrays))
    bias, pullback = jax.vjp(lambda *a: jnp.broadcast_to(example.dense(mask, *a), (B, N, T, S)), *arrays64)
    value, (*grads, dbias) = expected_gradients(*inputs64, bias, attends, jnp.ones((1, 1, 1, 1)))
    expected = value, (*grads, *pullback(dbias))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        largest = max(1, float(np.abs(e).max()))
        np.testing.assert_allclose(np.asarray(a, np.float64) / largest, e / largest, atol=tolerance, rtol=0)


# ---- values and gradients


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_and_gradients(x64, name):
    mask, attends = bind(B, N) if name in ("blocks", "sum") else bind()
    compare(name, "cpu", mask, attends, random_inputs(0, B, T, S, N, K, dtype=jnp.float64))


@pytest.mark.parametrize("name", IN_XLA)
def test_values_and_gradients_in_xla(x64, name):
    mask, attends = bind(B, N) if name in ("blocks", "tiles of rows") else bind()
    compare(name, "xla", mask, attends, random_inputs(0, B, T, S, N, K, dtype=jnp.float64))


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("sum", "float32", 2e-5),
        ("sum of positions", "float32", 2e-5),
        ("sum", "bfloat16", 0.05),
        ("sum", "float16", 0.01),
    ],
)
def test_other_types(x64, name, dtype, tolerance):
    """Gradients of slopes are sums that cancel, hence the wide bounds; the numeric battery judges every element."""
    mask, attends = bind()
    inputs = random_inputs(1, B, T, S, N, K, dtype=jnp.dtype(dtype))
    compare(name, "cpu", mask, attends, inputs, tolerance, amplitude=0.2)


def test_a_small_scale_does_not_touch_positions(x64):
    """Dividing features by it would overflow in 16 bits, and by 0 anywhere."""
    mask, _ = bind()
    query, key, value = random_inputs(2, B, T, S, N, K, dtype=jnp.float64)
    arrays = arrays_of(EXAMPLES["positions"], mask)
    for scale in (0.0, 1e-12, 0.7):
        attend = functools.partial(sparse_attention, query, key, value, PositionBias(*arrays), mask, scale=scale)
        np.testing.assert_allclose(attend(implementation="cpu"), attend(implementation="xla"), atol=1e-12)


def test_lists_get_heads_where_only_the_numbers_have_them(x64):
    mask, attends = bind()
    inputs = random_inputs(0, B, T, S, N, K, dtype=jnp.float64)
    numbers = np.random.default_rng(5).integers(-1, 3, (1, N, mask.capacity))
    tiles = jnp.asarray(np.random.default_rng(6).standard_normal((1, 1, 3, BLOCK, BLOCK)))
    number = np.broadcast_to(numbers, (B, N, mask.capacity))[EXAMPLE, HEAD, pair_entries(mask)]
    bias = jnp.where(
        number < 0,
        0,
        jnp.broadcast_to(tiles, (B, N, 3, BLOCK, BLOCK))[EXAMPLE, HEAD, np.maximum(number, 0), ROW, COLUMN],
    )
    expected = reference(*inputs, bias, attends)
    np.testing.assert_allclose(
        sparse_attention(*inputs, TileBias(tiles, numbers), mask, implementation="cpu"), expected, atol=1e-12
    )


@pytest.mark.parametrize("name", ["slopes", "table"])
def test_gradients_by_finite_differences(x64, implementation, name):
    mask = CausalMask().bind(T, S, block_size=BLOCK)
    inputs = random_inputs(4, B, T, S, N, K, dtype=jnp.float64)
    x, make = {
        "slopes": (jnp.asarray(alibi_slopes(N), np.float64), AlibiBias),
        "table": (jnp.zeros((32, N)), functools.partial(RelativeBias.t5, bidirectional=False)),
    }[name]
    step = jnp.asarray(np.random.default_rng(7).standard_normal(x.shape))

    @jax.jit
    def loss(x):
        return weighted(sparse_attention(*inputs, make(x), mask, implementation=implementation))

    slope = jnp.vdot(jax.grad(loss)(x), step)
    h = 1e-5
    np.testing.assert_allclose(slope, (loss(x + h * step) - loss(x - h * step)) / (2 * h), rtol=1e-7)


# ---- meanings


def test_slopes_are_the_papers():
    np.testing.assert_array_equal(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    # 12 heads: those of 8, then every second one of 16.
    np.testing.assert_array_equal(alibi_slopes(12)[8:], np.float32(2.0 ** -np.arange(0.5, 4.5)))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(ValueError, match="heads is at least 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 256), (16, 100)])
def test_buckets_are_those_of_t5(bidirectional, buckets, max_distance):
    """Against the paper's logarithm, which float64 may round across a bound: there the exact number decides."""
    distances = np.arange(-1000, 1001)
    actual = T5Buckets(buckets, bidirectional, max_distance)(distances)
    side = buckets // 2 if bidirectional else buckets
    back = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    exact = side // 2
    grown = np.log(np.maximum(back, 1) / exact) / np.log(max_distance / exact) * (side - exact)
    far = exact + np.minimum(np.floor(grown + 1e-9).astype(int), side - exact - 1)
    expected = np.where(back < exact, back, far) + (side * (distances > 0) if bidirectional else 0)
    np.testing.assert_array_equal(actual, expected)
    assert actual.min() == 0
    assert actual.max() == buckets - 1


def test_a_bias_of_minus_infinity_is_a_mask(implementation):
    query, key, value = random_inputs(5, B, T, S, N, K)
    attends = random_mask(1, q_len=T, kv_len=S)

    def loss(x, bias, mask):
        out, lse = sparse_attention(x, key, value, bias, mask, implementation=implementation, return_residual=True)
        return weighted(out), lse

    bias = jnp.where(attends, 0, -jnp.inf)
    with jax.debug_infs(False):
        (one, lse), grad = jax.value_and_grad(loss, has_aux=True)(query, bias, FullMask())
    (two, want), same = jax.value_and_grad(loss, has_aux=True)(query, None, jnp.asarray(attends))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    np.testing.assert_allclose(lse, want, atol=1e-5)
    np.testing.assert_allclose(grad, same, atol=1e-5)
    assert np.isneginf(lse[:, T // 2]).all()


def test_numbers_that_are_no_tile_give_nan():
    mask, _ = bind()
    inputs = random_inputs(6, B, T, S, N, K)
    tiles = jnp.zeros((1, 1, 3, BLOCK, BLOCK))
    numbers = np.zeros(mask.kv_blocks.shape, np.int32)
    last_row = int(mask.row_offsets[0, 0, -2])
    numbers[0, 0, last_row] = 3
    with pytest.raises(ValueError, match=r"numbers of TileBias are tiles, 0 to 2, .* got 3"):
        sparse_attention(*inputs, TileBias(tiles, numbers), mask)

    def attend(numbers, implementation: Implementation):
        return sparse_attention(*inputs, TileBias(tiles, numbers), mask, implementation=implementation)

    outs = [jax.jit(attend, static_argnums=1)(numbers, one) for one in ("cpu", "xla")]
    plain = sparse_attention(*inputs, None, mask, implementation="cpu")
    for out in outs:
        np.testing.assert_allclose(out[:, :64], plain[:, :64], atol=1e-6)
        assert np.isnan(out[:, 64:]).any()


def test_numbers_of_a_wide_type_do_not_wrap(x64):
    mask, _ = bind()
    inputs = random_inputs(6, B, T, S, N, K)
    tiles, wide = jnp.ones((1, 1, 2, 1, 1)), np.full(mask.capacity, 2**32)
    with pytest.raises(ValueError, match=r"numbers of TileBias are tiles, 0 to 1, .* got 4294967296"):
        sparse_attention(*inputs, TileBias(tiles, wide), mask)

    def attend(numbers):
        return sparse_attention(*inputs, TileBias(tiles, numbers), mask, implementation="cpu")

    plain = sparse_attention(*inputs, None, mask, implementation="cpu")
    for dtype in (np.int64, np.uint32, np.uint64):
        largest = np.full(mask.capacity, np.iinfo(dtype).max)  # -1 if cut to 32 bits
        assert np.isnan(jax.jit(attend)(largest)[plain != 0]).all()
    np.testing.assert_array_equal(jax.jit(attend)(-wide), plain)
    np.testing.assert_array_equal(attend(-wide), plain)


def test_large_features_of_float16_do_not_overflow():
    query, key, value = (x.astype(jnp.float16) for x in random_inputs(18, 1, 64, 64, 2, 2))
    places = 256 * jnp.arange(64.0)[None, :, None, None]  # 16128, which a scale of 1/5 would take past 65504
    ones = jnp.ones_like(places)
    bias = PositionBias(jnp.concatenate([places, ones], -1), jnp.concatenate([ones, -places], -1))

    def loss(query, implementation: Implementation):
        mask = LocalMask((3, 3))
        out = sparse_attention(query, key, value, bias, mask, scale=0.2, implementation=implementation)
        return out.astype(jnp.float32).sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(query, "cpu")
    (_, want), same = jax.value_and_grad(loss, has_aux=True)(query, "xla")
    np.testing.assert_allclose(out, want, atol=2e-3)
    np.testing.assert_allclose(gradient, same, atol=2e-3)


def test_no_tiles_add_nothing(implementation):
    mask, _ = bind()
    inputs = random_inputs(6, B, T, S, N, K)

    def attend(tiles):
        bias = TileBias(tiles, np.full(mask.capacity, -1))
        return sparse_attention(*inputs, bias, mask, implementation=implementation)

    plain = sparse_attention(*inputs, None, mask, implementation=implementation)
    out, pullback = jax.vjp(attend, jnp.zeros((1, N, 0, BLOCK, BLOCK)))
    np.testing.assert_array_equal(out, plain)
    assert pullback(out)[0].shape == (1, N, 0, BLOCK, BLOCK)


def test_buckets_of_jax_numpy_inside_jit():
    inputs = random_inputs(6, B, T, S, N, K)
    table = jax.random.normal(jax.random.key(7), (5, N))

    def attend(table, xp):
        bias = RelativeBias(table, lambda distances: xp.clip(distances // 16 + 2, 0, 4))
        return sparse_attention(*inputs, bias, implementation="cpu")

    np.testing.assert_array_equal(jax.jit(attend, static_argnums=1)(table, jnp), attend(table, np))


# ---- transformations


def stacked_call(mask, implementation):
    return lambda query, key, value, slopes, x: sparse_attention(
        query, key, value, AlibiBias(slopes) + x, mask, implementation=implementation
    )


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (0, None, 0)], ids=str)
def test_vmap(implementation, mapped):
    """Of queries, slopes and a dense bias; what is shared has the sum of the gradients."""
    if implementation == "xla" and mapped != (0, None, 0):
        pytest.skip("plain JAX maps itself: one such call is enough")
    mask, _ = bind()
    query, key, value = random_inputs(7, B, T, S, N, K)
    slopes, x = jnp.asarray(alibi_slopes(N)), jax.random.normal(jax.random.key(2), (1, N, 1, S))
    stack = [jnp.stack([a, 2 * a]) if axis == 0 else a for a, axis in zip((query, slopes, x), mapped, strict=True)]

    def loss(query, slopes, x):
        one = lambda q, s, x: stacked_call(mask, implementation)(q, key, value, s, x)  # noqa: E731
        return weighted(jax.vmap(one, mapped)(query, slopes, x))

    def loop(query, slopes, x):
        def part(i, a, axis):
            return a[i] if axis == 0 else a

        outs = [
            stacked_call(mask, "cpu")(
                *(part(i, query, mapped[0]), key, value, part(i, slopes, mapped[1]), part(i, x, mapped[2]))
            )
            for i in range(2)
        ]
        return weighted(jnp.stack(outs))

    actual = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*stack)
    expected = jax.jit(jax.value_and_grad(loop, (0, 1, 2)))(*stack)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-3, rtol=1e-4)


def test_objects_are_pytrees():
    mask, _ = bind()
    bias = AlibiBias(alibi_slopes(N)) + RelativeBias.t5(jnp.zeros((32, N))) + jnp.zeros((1, 1, 1, S))
    assert isinstance(bias, Bias)
    assert [x.shape for x in jax.tree.leaves(bias)] == [(N,), (32, N), (1, 1, 1, S)]
    assert jax.tree.structure(jax.tree.map(lambda _: None, bias, is_leaf=lambda x: x is None)) is not None
    moved = jax.tree.map(lambda x: x + 1, bias)
    inputs = random_inputs(8, B, T, S, N, K)
    out = jax.jit(lambda bias: sparse_attention(*inputs, bias, mask, implementation="cpu"))(moved)
    np.testing.assert_array_equal(out, sparse_attention(*inputs, moved, mask, implementation="cpu"))
    assert "AlibiBias(slopes=float32[4])" in repr(bias)
    assert isinstance(np.zeros((T, S)) + AlibiBias(alibi_slopes(N)), Bias)
    with pytest.raises(AttributeError, match="immutable"):
        AlibiBias(alibi_slopes(N)).slopes = 0


def test_remat_scan_and_unbatched():
    mask, _ = bind()
    query, key, value = random_inputs(9, B, T, S, N, K)
    slopes = jnp.stack([jnp.asarray(alibi_slopes(N)), jnp.zeros(N)])

    def layers(slopes, *, scanned):
        attend = lambda s: sparse_attention(query[0], key[0], value[0], AlibiBias(s), mask, implementation="cpu")  # noqa: E731
        if scanned:
            return jax.lax.scan(lambda total, s: (total + weighted(jax.checkpoint(attend)(s)), None), 0.0, slopes)[0]
        return sum(weighted(attend(s)) for s in slopes)

    one, two = (jax.jit(jax.value_and_grad(functools.partial(layers, scanned=x)))(slopes) for x in (True, False))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], two[1], atol=1e-4)


def test_forward_mode_and_second_derivatives(x64):
    mask, attends = bind()
    inputs = random_inputs(10, B, T, S, N, K, dtype=jnp.float64)
    slopes = jnp.asarray(alibi_slopes(N), np.float64)

    def loss(slopes):
        return weighted(sparse_attention(*inputs, AlibiBias(slopes), mask, implementation="cpu"))

    def dense(slopes):
        return weighted(reference(*inputs, of_slopes(slopes[None]), attends))

    step = jnp.arange(1.0, N + 1)
    actual = jax.jvp(loss, (slopes,), (step,))[1], jax.jvp(jax.grad(loss), (slopes,), (step,))[1]
    expected = jax.jvp(dense, (slopes,), (step,))[1], jax.jvp(jax.grad(dense), (slopes,), (step,))[1]
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-10)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-9)


def test_only_gradients_that_are_wanted_are_computed():
    mask, _ = bind()
    inputs = random_inputs(11, B, T, S, N, K)
    slopes = jnp.asarray(alibi_slopes(N))

    def loss(query, slopes):
        return sparse_attention(query, *inputs[1:], AlibiBias(slopes), mask, implementation="cpu").sum()

    def calls(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(inputs[0], slopes).as_text()
        names = "backward", "bias_gradient"
        return [text.count(f"@jax_bsk_attention_{name}(") for name in names]

    assert calls(0) == [1, 0]
    assert calls((0, 1)) == [1, 1]
    assert calls(1) == [0, 1]


def test_exported_functions_take_biases():
    x = random_inputs(15, 1, 64, 64, 2, 2)
    bias = AlibiBias(alibi_slopes(2)) + RelativeBias.t5(jnp.ones((32, 2))) + jnp.zeros((1, 1, 1, 64))
    step = jax.jit(lambda bias: sparse_attention(*x, bias, mask=CausalMask(), implementation="cpu"))
    exported = jax.export.export(step, disabled_checks=jax_bsk.export_checks())(bias)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(bias), step(bias))
    function = RelativeBias(jnp.ones((256, 2)), np.abs)
    exported = jax.export.export(step, disabled_checks=jax_bsk.export_checks())(function)
    with pytest.raises(ValueError, match="make the bias inside the exported function"):
        exported.serialize()


# ---- meshes


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_batch_and_heads_split(axis_type, kv_heads):
    """Forward without a collective; gradients of shared terms are summed over the devices that share them."""
    batch, heads = 2, 8
    mask, _ = bind()
    operands = random_inputs(12, batch, T, S, heads, kv_heads)
    rng = np.random.default_rng(8)
    shapes = (heads,), (batch, 1, 1, S), (1, heads, mask.capacity)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def attend(query, key, value, slopes, x, values):
        bias = AlibiBias(slopes) + x + BlockBias(values)
        return sparse_attention(query, key, value, bias, mask, implementation="cpu")

    loss = lambda *a: weighted(attend(*a))  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss, tuple(range(6))))(*operands, *arrays)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    split = P("data", None, "model", None)
    specs = split, *(split if kv_heads > 1 else P("data"),) * 2, P("model"), P("data"), P(None, "model")
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*operands, *arrays), specs, strict=True)]
        forward = jax.jit(attend).lower(*sharded).compile()
        assert collectives(forward) == []
        actual = jax.jit(jax.value_and_grad(loss, tuple(range(6))))(*sharded)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of heads"])
def test_features_on_an_explicit_mesh(shared):
    """They need not be sharded as queries and keys are."""
    operands = random_inputs(16, 2, 64, 64, 4, 2)
    shape = (1, 64, 1, 3) if shared else (2, 64, 4, 3)
    features = tuple(jax.random.normal(jax.random.key(17), (2, *shape)))

    def loss(query, key, value, *features):
        return weighted(sparse_attention(query, key, value, PositionBias(*features), implementation="cpu"))

    gradient = jax.jit(jax.grad(loss, range(5)))
    expected = gradient(*operands, *features)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data", None, "model"))
        whole = NamedSharding(mesh, P())
        arrays = [jax.device_put(x, split) for x in operands], [jax.device_put(x, whole) for x in features]
        actual = gradient(*arrays[0], *arrays[1])
        assert [P(*jax.typeof(x).sharding.spec[:3]) for x in actual[:3]] == [split.spec] * 3
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4, rtol=1e-4)


def test_a_sharded_sequence_is_gathered():
    mask = CausalMask().bind(256, block_size=BLOCK)
    query = jax.random.normal(jax.random.key(0), (1, 256, 2, 16))
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    bias = AlibiBias(alibi_slopes(2))
    attend = jax.jit(lambda x: sparse_attention(x, x, x, bias, mask, implementation="cpu"))
    compiled = attend.lower(jax.device_put(query, NamedSharding(mesh, P(None, "sequence")))).compile()
    assert "all-gather" in text_of(compiled)
    out = attend(jax.device_put(query, NamedSharding(mesh, P(None, "sequence"))))
    np.testing.assert_array_equal(out, attend(query))


# ---- score functions


def test_score_function(x64):
    """Arbitrary, differentiable to what it closes over; indices are those of the call."""
    mask, attends = bind(B, N)
    inputs = random_inputs(13, B, T, S, N, K, dtype=jnp.float64)
    factor = jnp.asarray(np.random.default_rng(9).standard_normal(N))

    def change(factor, score, b, h, q_idx, kv_idx):
        return score * factor[h] + jnp.where(b == 1, jnp.sin((q_idx - 2 * kv_idx).astype(score.dtype)), 0)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def actual(factor, query):
        score_function = functools.partial(change, factor)
        out = sparse_attention(query, *inputs[1:], mask=mask, implementation="xla", score_function=score_function)
        return weighted(out)

    def dense(factor, query):
        scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(inputs[1], N // K, 2)) / 4
        index = EXAMPLE, HEAD, np.arange(T)[None, None, :, None], np.arange(S)[None, None, None]
        changed = change(factor, scores, *map(jnp.asarray, index))
        zeros = jnp.zeros((1, 1, 1, 1))
        probs_of = reference(jnp.zeros_like(query), *inputs[1:], changed + zeros, attends)
        return weighted(probs_of)

    expected = jax.value_and_grad(dense, (0, 1))(factor, inputs[0])
    for a, e in zip(jax.tree.leaves(actual(factor, inputs[0])), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-10, rtol=1e-10)


def test_score_function_in_two_calls_of_one_function():
    """What it closes over may be another tracer each time."""
    mask = CausalMask().bind(64, block_size=BLOCK)
    x = jax.random.normal(jax.random.key(0), (1, 64, 1, 8))
    held = {}

    def score_function(score, b, h, q_idx, kv_idx):
        return score * held["factor"]

    def loss(factor):
        held["factor"] = factor
        return sparse_attention(x, x, x, mask=mask, implementation="xla", score_function=score_function).sum()

    assert jax.grad(loss)(1.0) == jax.grad(loss)(1.0)
    assert jax.grad(loss)(2.0) != jax.grad(loss)(1.0)


# ---- refusals


def refused(bias, match, error: type[Exception] = ValueError, **options):
    inputs = random_inputs(14, B, T, S, N, K)
    with pytest.raises(error, match=match):
        sparse_attention(*inputs, bias, **{"implementation": "cpu", **options})


def test_refusals():
    mask, _ = bind()
    refused(AlibiBias(jnp.ones(3)), r"slopes of AlibiBias is \[B\|1, N\|1\] = \[1\|2, 1\|4\], got shape \(1, 3\)")
    refused(RelativeBias.clipped(jnp.ones((3, 5))), r"table of RelativeBias is \[buckets, N\|1\] with N = 4")
    refused(RelativeBias(jnp.ones((3, 4)), np.abs), r"buckets are rows of the table, 0 to 2, got 0 to 95")
    refused(RelativeBias(jnp.ones((3, 4)), lambda d: d / 2), r"buckets gives an integer for each of .* got float64")
    refused(RelativeBias(jnp.ones((3, 4)), lambda d: d[:2]), r"buckets gives an integer for each of .* of shape \(2,\)")
    refused(BlockBias(jnp.ones((1, 1, 5))), "BlockBias belongs to the entries of a BlockMask")
    refused(BlockBias(jnp.ones((1, 1, 99))), r"values of BlockBias is .*capacity", mask=mask)
    refused(TileBias(jnp.ones((1, 1, 2, 64, 32)), numbers_of(mask, 2)), r"tiles of TileBias", mask=mask)
    refused(PositionBias(jnp.ones((1, T, 1, 2)), jnp.ones((1, S, 3, 2))), r"key_features of PositionBias is")
    refused(jnp.ones((T, S + 1)), "bias broadcasts to BNTS")
    refused(DenseBias(jnp.ones((T, S), bool)), "pass it as mask", TypeError)
    features = PositionBias(jnp.ones((1, T, 1, 2)), jnp.ones((1, S, 1, 2)))
    refused(features, "soft cap would bound it", jax_bsk.UnsupportedError, logits_soft_cap=2.0)
    refused(None, "take no score_function", jax_bsk.UnsupportedError, score_function=lambda s, *_: s)
    with pytest.raises(ValueError, match="an odd number"):
        RelativeBias.clipped(jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="the usual numbers are 32 and 128"):
        RelativeBias.t5(jnp.ones((3, 1)))
    with pytest.raises(TypeError, match="buckets is a function"):
        RelativeBias(jnp.ones((3, 1)), np.arange(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="numbers holds integers"):
        TileBias(jnp.ones((1, 1, 1, 32, 32)), np.ones(3))
    with pytest.raises(TypeError, match="slopes is a floating-point array"):
        AlibiBias(jnp.arange(4))
