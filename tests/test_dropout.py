"""`sparse_attention(..., dropout_rate=, dropout_rng=)`: the same pairs are dropped everywhere, and look like chance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.attention import dropout
from jax_bsk.biases import AlibiBias, alibi_slopes
from jax_bsk.masks import CausalMask, FullMask
from tests.test_biases import reference, weighted
from tests.util import collectives, random_inputs, random_mask

RNG = jax.random.key(7)
HASHED = [0, 1753845952, 3507691905, 1734902346]
QUERY_WORDS = [1675371566, 1675371566, 3114314732, 176720085, 579660883]
KEY_WORDS = [520022130, 520022130, 1309480819, 2889670270, 3480269886]
PAIR_WORDS = [1698886846, 1615558103, 4294967294, 0, 0]
B, T, S, N, K, BLOCK = 2, 80, 96, 4, 2, 32


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def dropped_pairs(implementation, mask, rate=0.3, batch=B, q_len=T, kv_len=S, heads=N, dtype=jnp.float32):
    """Which pairs a call keeps, [B, N, T, S]: of equal logits, the value of key s being its unit vector."""
    query = jnp.zeros((batch, q_len, heads, 8), dtype)
    key = jnp.zeros((batch, kv_len, 1, 8), dtype)
    value = jnp.broadcast_to(jnp.eye(kv_len, dtype=dtype)[None, :, None], (batch, kv_len, 1, kv_len))
    out = sparse_attention(
        query, key, value, mask=mask, dropout_rate=rate, dropout_rng=RNG, implementation=implementation
    )
    return np.swapaxes(np.asarray(out) != 0, 1, 2)


def factors(rate=0.3, batch=B, q_len=T, kv_len=S, heads=N, dtype: DTypeLike = np.float32):
    keys = dropout.keys_of_heads(RNG, batch, heads)
    return np.asarray(dropout.dense_factors(keys, q_len, kv_len, dropout.threshold_of(rate), dtype))


# ---- the bits


def test_the_hash_is_this_one():
    """Written down once: other bits would be other results for a seed that somebody saved."""
    numbers = jnp.asarray([0, 1, 2, 0xFFFFFFFF], jnp.uint32)
    assert dropout.hash_word(numbers).tolist() == HASHED
    positions = jnp.asarray([0, 8, 9, 16, 1000], jnp.int32)
    assert dropout.query_words(jnp.uint32(123), positions).tolist() == QUERY_WORDS
    assert dropout.key_words(positions).tolist() == KEY_WORDS
    of_queries = jnp.asarray([QUERY_WORDS[0], QUERY_WORDS[-1], 0xFFFFFFFF, 1, 0], jnp.uint32)
    of_keys = jnp.asarray([KEY_WORDS[0], KEY_WORDS[-1], 0xFFFFFFFF, 0xFFFFFFFF, 5], jnp.uint32)
    assert dropout.pair_words(of_queries, of_keys).tolist() == PAIR_WORDS


def test_words_are_those_of_whole_numbers():
    """The formula of `csrc/attention/dropout.h` in Python's integers."""
    key, rows, columns, threshold = 0xDEADBEEF, 40, 56, 100

    def hashed(x):
        x &= 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ x >> shift) * factor & 0xFFFFFFFF
        return x

    def place(i):
        return i // 16 * 8 + i % 8

    def drops(q, k):
        first = hashed(key + 0x9E3779B9 * (place(q) + 1)) * hashed(place(k) + 0x85EBCA6B)
        second = (first & 0xFFFFFFFF) * (first >> 32)
        word = second & 0xFFFFFFFF ^ second >> 32
        return word >> 8 * ((q // 8 & 1) + 2 * (k // 8 & 1)) & 0xFF < threshold

    actual = dropout.dense_factors(jnp.full((1, 1), key, jnp.uint32), rows, columns, threshold)[0, 0]
    expected = [[0 if drops(q, k) else np.float32(256 / 156) for k in range(columns)] for q in range(rows)]
    np.testing.assert_array_equal(actual, np.array(expected, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_implementation_drops_the_same_pairs(dtype):
    with jax.enable_x64(dtype == "float64"):
        attends = random_mask(0, q_len=T, kv_len=S)
        mask = BlockMask.from_dense(attends, block_size=BLOCK)
        kept = attends & (factors() > 0)
        for implementation in ("cpu", "xla"):
            actual = dropped_pairs(implementation, mask, dtype=jnp.dtype(dtype))
            np.testing.assert_array_equal(actual, kept)


def test_blocks_and_lists_do_not_matter():
    kept = factors(q_len=128, kv_len=128) > 0
    for size in (32, 64, 128):
        mask = FullMask().bind(128, block_size=size)
        np.testing.assert_array_equal(dropped_pairs("cpu", mask, q_len=128, kv_len=128), kept)


def test_the_rate_is_what_was_asked_for_and_pairs_are_independent():
    """Of 2^22 pairs: the share itself, and that of pairs of neighbours in all directions, within five deviations."""
    rate = 0.25
    kept = (factors(rate, 2, 512, 512, 8) > 0).reshape(16, 512, 512)

    def check(values, chance):
        deviation = np.sqrt(chance * (1 - chance) / values.size)
        assert abs(values.mean() - chance) < 5 * deviation, (values.mean(), chance, deviation)

    drop = ~kept
    check(drop, rate)
    for row, column in ((0, 1), (1, 0), (1, 1), (0, 8), (8, 0), (8, 8), (0, 16), (16, 0), (3, 5)):
        check(drop[:, row:, column:] & drop[:, : 512 - row, : 512 - column], rate**2)
    check(drop[1:] & drop[:-1], rate**2)  # heads and examples
    check(drop & drop.swapaxes(-1, -2), rate**2 + (rate - rate**2) / 512)  # a pair and its mirror image
    for axis in (1, 2):  # rows and columns as a whole: no row is luckier than chance
        counts = drop.sum(axis)
        assert abs(counts.var() / (512 * rate * (1 - rate)) - 1) < 0.1


def test_rates_are_multiples_of_a_256th():
    thresholds = [dropout.threshold_of(rate) for rate in (0, 0.0, 1e-9, 0.1, 0.5, 0.999)]
    assert thresholds == [0, 0, 1, 26, 128, 255]
    mask = FullMask().bind(T, S, block_size=BLOCK)
    query, key, value = random_inputs(0, B, T, S, N, K)
    plain = sparse_attention(query, key, value, mask=mask, implementation="cpu")
    same = sparse_attention(query, key, value, mask=mask, dropout_rng=RNG, implementation="cpu")
    np.testing.assert_array_equal(plain, same)


# ---- values and gradients


@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(x64, implementation, biased):
    attends = random_mask(0, q_len=T, kv_len=S)
    mask = BlockMask.from_dense(attends, block_size=BLOCK)
    operands = *random_inputs(1, B, T, S, N, K, dtype=jnp.float64), jnp.asarray(alibi_slopes(N), np.float64)

    kept = factors(dtype=np.float64)

    def attend(query, key, value, slopes):
        bias = AlibiBias(slopes) if biased else None
        return weighted(
            sparse_attention(
                query,
                key,
                value,
                bias,
                mask,
                dropout_rate=0.3,
                dropout_rng=RNG,
                implementation=implementation,
            )
        )

    def dense(query, key, value, slopes):
        distances = np.abs(np.arange(S)[None] - np.arange(T)[:, None])
        bias = -slopes[None, :, None, None] * jnp.asarray(distances, slopes.dtype)[None, None] * float(biased)
        return weighted(reference(query, key, value, bias, attends, kept))

    actual, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*operands) for f in (attend, dense))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-10, rtol=1e-9)


def test_log_sum_exp_does_not_depend_on_it(implementation):
    query, key, value = random_inputs(2, B, T, S, N, K)
    mask = CausalMask().bind(T, S, block_size=BLOCK)
    attend = functools.partial(
        sparse_attention, query, key, value, mask=mask, implementation=implementation, return_residual=True
    )
    np.testing.assert_allclose(attend(dropout_rate=0.5, dropout_rng=RNG)[1], attend()[1], rtol=1e-6)


def test_forward_mode_uses_the_same_bits(x64):
    mask = CausalMask().bind(T, S, block_size=BLOCK)
    query, key, value = random_inputs(3, B, T, S, N, K, dtype=jnp.float64)

    def loss(query):
        attend = functools.partial(sparse_attention, mask=mask, dropout_rate=0.4, dropout_rng=RNG, implementation="cpu")
        return weighted(attend(query, key, value))

    step = jnp.cos(query)
    np.testing.assert_allclose(jax.jvp(loss, (query,), (step,))[1], jnp.vdot(jax.grad(loss)(query), step), rtol=1e-9)


# ---- transformations


def test_examples_of_vmap_have_their_own_keys():
    mask = FullMask().bind(T, S, block_size=BLOCK)
    query, key, value = random_inputs(4, B, T, S, N, K)
    rngs = jax.random.split(RNG, 2)

    def attend(rng, query):
        return sparse_attention(query, key, value, mask=mask, dropout_rate=0.5, dropout_rng=rng, implementation="cpu")

    out = jax.jit(jax.vmap(attend, (0, None)))(rngs, query)
    np.testing.assert_array_equal(out, jnp.stack([attend(rng, query) for rng in rngs]))
    assert (np.asarray(out[0]) != np.asarray(out[1])).mean() > 0.9


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_bits_do_not_depend_on_the_mesh(axis_type):
    mask = FullMask().bind(T, S, block_size=BLOCK)
    operands = random_inputs(5, B, T, S, 8, 4)

    def loss(query, key, value):
        attend = functools.partial(sparse_attention, mask=mask, dropout_rate=0.5, dropout_rng=RNG, implementation="cpu")
        return weighted(attend(query, key, value))

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = step(*operands)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in operands]
        compiled = step.lower(*sharded).compile()
        actual = compiled(*sharded)
    assert set(collectives(compiled)) <= {"all-reduce"}  # of the loss
    for a, e in zip(actual[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, e)


# ---- refusals


def test_refusals():
    x = jnp.zeros((1, 64, 1, 8))
    attend = functools.partial(sparse_attention, x, x, x, mask=CausalMask(), implementation="cpu")
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_rate is in \[0, 1\)"):
            attend(dropout_rate=rate, dropout_rng=RNG)
    with pytest.raises(ValueError, match=r"dropout_rng is a key of jax\.random where dropout_rate > 0"):
        attend(dropout_rate=0.1)
    with pytest.raises((TypeError, ValueError), match=r"dropout_rng is one key of jax\.random"):
        attend(dropout_rate=0.1, dropout_rng=jax.random.split(RNG))
    here, there = jax.devices()[:2]
    for key in (RNG, jax.random.PRNGKey(0)):
        x_here, key_there = jax.device_put(x, here), jax.device_put(key, there)
        with pytest.raises(ValueError, match="dropout_rng must be on the query's devices cpu:0, got cpu:1"):
            sparse_attention(x_here, x, x, dropout_rate=0.1, dropout_rng=key_there, implementation="cpu")
    with pytest.raises(TypeError, match="dropout_rate is a Python number, got str"):
        attend(dropout_rate="0.1", dropout_rng=RNG)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="static argument"):
        jax.jit(lambda rate: attend(dropout_rate=rate, dropout_rng=RNG))(0.1)
