"""SparseK: the operator against the quadratic program in float64, its prefixes, its decoding state, its derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

import jax_bsk
from jax_bsk import SparseKState, sparsek, sparsek_causal

METHODS = ["exact", "fast"]
run = jax.jit(sparsek, static_argnames=("axis", "method"))
run_causal = jax.jit(sparsek_causal, static_argnames=("capacity", "chunk"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def project(z: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The quadratic program's solution [rows, n] for k in [0, n], float64, by its own means: bisection on tau."""
    z, k = np.asarray(z, np.float64), np.asarray(k, np.float64)
    kth = np.take_along_axis(-np.sort(-z, -1), np.maximum(np.ceil(k).astype(int) - 1, 0)[:, None], -1)
    z = z - kth  # tau is within 1 below, so that none of its digits is spent on magnitude
    low, high = np.full(len(z), -1.0), np.zeros(len(z))
    for _ in range(80):
        middle = (low + high) / 2
        enough = np.clip(z - middle[:, None], 0, 1).sum(-1) >= k
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return np.clip(z - low[:, None], 0, 1)


def assert_kkt(z: np.ndarray, k: np.ndarray, p: np.ndarray, atol: float) -> None:
    """p minimises |p - z|^2 / 2: feasible, and one multiplier tau is below z - p where p = 1, above where p = 0."""
    assert (p >= 0).all()
    assert (p <= 1).all()
    np.testing.assert_allclose(p.sum(-1), k, atol=atol, rtol=0)
    rest = z - p
    most = np.where(p > 0, rest, np.inf).min(-1)  # tau <= z - p where p may fall
    least = np.where(p < 1, rest, -np.inf).max(-1)  # tau >= z - p where p may rise
    assert (least <= most + atol).all(), (least - most).max()


def cases(seed: int, count: int, n: int, dtype: DTypeLike = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Rows of scores of many spreads, a third of them with ties, and k from 0 to n, half of them whole."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, n)) * np.exp(rng.uniform(-4, 4, (count, 1))) + rng.normal(size=(count, 1)) * 10
    z[::3] = np.round(z[::3] * 2) / 2
    z[::50] = z[::50, :1]
    k = rng.uniform(0, n, count)
    k[::2] = np.round(k[::2])
    k[:4] = 0, n, 1, n - 1
    return z.astype(dtype), k.astype(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "count"), [(1, 100), (7, 2000), (64, 2000)])
def test_solves_the_quadratic_program(method, n, count, x64):
    z, k = cases(n, count, n)
    p = np.asarray(run(z, k, method=method))
    np.testing.assert_allclose(p, project(z, k), atol=1e-9, rtol=0)
    assert_kkt(z, k, p, 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "count"), [(64, 2000), (4096, 8)])
def test_float32(method, n, count):
    z, k = cases(n, count, n, np.float32)
    p = np.asarray(run(z, k, method=method)).astype(np.float64)
    # tau is rounded once: at most an ulp of 1 in each p.
    np.testing.assert_allclose(p, project(z, k), atol=5e-7, rtol=0)
    np.testing.assert_allclose(p.sum(-1), k, atol=1e-6, rtol=5e-7)


@pytest.mark.parametrize("method", METHODS)
def test_huge_magnitudes(method):
    rng = np.random.default_rng(0)
    magnitude = np.repeat(np.array([1e3, 1e6, 1e20, 1e37]), 500)[:, None]
    z = rng.normal(size=(2000, 64)) * magnitude
    # Some far away, so that the threshold is among small ones; and far from zero with all of them near each other.
    z[::2, 9:] = rng.normal(size=(1000, 55))
    z[1::4] = magnitude[1::4] + rng.integers(-2, 3, (500, 64))
    z = z.astype(np.float32)
    k = rng.uniform(0, 64, 2000).astype(np.float32)
    p = np.asarray(run(z, k, method=method)).astype(np.float64)
    np.testing.assert_allclose(p, project(z, k), atol=5e-7, rtol=0)
    np.testing.assert_allclose(p.sum(-1), k, atol=1e-6, rtol=5e-7)


@pytest.mark.parametrize("method", METHODS)
def test_all_or_nothing(method):
    z = jnp.array([3.0, -1.0, 0.5, 0.5])
    value_and_grad = jax.jit(jax.value_and_grad(lambda z, k: (sparsek(z, k, method=method) * np.arange(4.0)).sum()))
    for k, expected in ((4, 1.0), (5, 1.0), (100.5, 1.0), (0, 0.0)):
        value, gradient = value_and_grad(z, jnp.float32(k))
        assert value == expected * 6
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(run(z, 2, method=method), [1, 0, 0.5, 0.5])
    np.testing.assert_array_equal(run(5 * z, 1, method=method), [1, 0, 0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_minus_infinity_is_never_chosen_and_nan_stays_in_its_row(method):
    inf, nan = np.inf, np.nan
    some = [1.0, -inf, 0.5, 0.2]
    z = np.array([some, [nan, 1, 2, 3], [-inf] * 4, [inf, inf, 0, inf], some, some, some], np.float32)
    k = jnp.array([2, 2, 2, 2, 3.5, -1, nan])
    p = np.asarray(run(z, k, method=method))
    np.testing.assert_allclose(p[0, [0, 2, 3]], project(z[:1, [0, 2, 3]], np.array([2]))[0], atol=1e-7)
    assert p[0, 1] == 0
    np.testing.assert_array_equal(p[2], 0)
    np.testing.assert_allclose(p[3], [2 / 3, 2 / 3, 0, 2 / 3], atol=1e-7)
    np.testing.assert_array_equal(p[4], [1, 0, 1, 1])
    gradient = np.asarray(jax.jit(jax.grad(lambda z: (sparsek(z, k, method=method) ** 2).sum()))(z))
    np.testing.assert_allclose(gradient[0, [0, 2, 3]].sum(), 0, atol=1e-6)
    np.testing.assert_array_equal(gradient[[0, 4], 1], 0)
    np.testing.assert_array_equal(gradient[2], 0)
    for bad in (1, 5, 6):
        assert np.isnan(p[bad]).all()
        assert np.isnan(gradient[bad]).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_against_finite_differences(method, x64):
    n, count, step = 9, 1000, 1e-5
    rng = np.random.default_rng(1)
    z = rng.normal(size=(count, n)) * np.exp(rng.uniform(-2, 2, (count, 1)))
    k, weights = rng.uniform(0.1, n - 0.6, count), rng.normal(size=(count, n))
    k[::2] = np.round(k[::2])

    def loss(z, k):
        return (run(z, k, method=method) * weights).sum(-1)

    dz, dk = jax.jit(jax.grad(lambda z, k: loss(z, k).sum(), (0, 1)))(z, k)

    def difference(up, down):
        return ((project(*up) - project(*down)) * weights).sum(-1) / (2 * step)

    # Where no score is within the step of a breakpoint.
    p = project(z, k)
    tau = np.where((p > 0) & (p < 1), z - p, -np.inf).max(-1)
    above = z - np.where(np.isfinite(tau), tau, 0)[:, None]
    smooth = np.isfinite(tau) & (np.minimum(np.abs(above), np.abs(above - 1)).min(-1) > 4 * step)
    assert smooth.sum() > count / 2
    for i in range(n):
        move = step * np.eye(n)[i]
        expected = difference((z + move, k), (z - move, k))
        np.testing.assert_allclose(np.asarray(dz)[smooth, i], expected[smooth], atol=1e-6)
    expected = difference((z, k + step), (z, k - step))
    np.testing.assert_allclose(np.asarray(dk)[smooth], expected[smooth], atol=1e-6)
    # Where S is empty: whole k and a gap, the derivative is 0.
    np.testing.assert_array_equal(np.asarray(dz)[((p == 0) | (p == 1)).all(-1)], 0)


def test_derivatives_of_every_mode(x64):
    rng = np.random.default_rng(2)
    z, dz, weights = rng.normal(size=(3, 6, 8))

    def f(z):  # the rule is one for both methods
        return run(z, 2.5, method="fast")

    @jax.jit
    def derivatives(z):
        (back,), (symmetric,) = (jax.vjp(f, z)[1](w) for w in (weights, dz))
        curvature = jax.jacfwd(jax.grad(lambda z: (f(z) ** 2).sum()))(z[0])
        return jax.jvp(f, (z,), (dz,))[1], back, symmetric, curvature, jax.jacrev(f)(z[0])

    forward, back, symmetric, curvature, jacobian = (np.asarray(x) for x in derivatives(z))
    np.testing.assert_allclose((forward * weights).sum(), (back * dz).sum())
    np.testing.assert_allclose(symmetric, forward)  # the map is symmetric
    np.testing.assert_allclose(curvature, 2 * jacobian @ jacobian, atol=1e-12)


def test_axes_batches_and_vmap():
    z = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32) * 2
    k = np.array([[1, 2.5, 3, 7]], np.float32)
    expected = np.swapaxes(run(np.swapaxes(z, 1, 2), k), 1, 2)
    np.testing.assert_allclose(sparsek(z, k, axis=1), expected, atol=1e-6)  # eager
    operator = functools.partial(sparsek, method="fast")

    def loss(z, k):
        return (operator(z, k) ** 2).sum()

    @jax.jit
    def mapped(z, k):
        gradients = jax.vmap(jax.vmap(jax.grad(loss)), (0, None))(jnp.swapaxes(z, 1, 2), k[0])
        return jax.vmap(operator, (2, 0), 2)(z, k[0]), jnp.swapaxes(gradients, 1, 2)

    values, gradients = mapped(z, k)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    inside = (expected > 0) & (expected < 1)
    mean = np.where(inside, expected, 0).sum(1, keepdims=True) / np.maximum(inside.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(gradients, np.where(inside, 2 * (expected - mean), 0), atol=1e-6)


def test_low_precision_is_computed_in_float32():
    z = np.random.default_rng(1).normal(size=(50, 40)).astype(jnp.bfloat16)

    @jax.jit
    def both(z):
        p, pullback = jax.vjp(lambda z: sparsek(z, 8, method="fast"), z)
        return p, pullback(p)[0]

    p, gradient = both(z)
    assert p.dtype == gradient.dtype == jnp.bfloat16
    wide = project(z.astype(np.float64), np.full(50, 8))
    np.testing.assert_allclose(np.asarray(p).astype(np.float64), wide, rtol=2**-8, atol=1e-6)


def test_empty():
    assert sparsek(jnp.zeros((3, 0)), 2).shape == (3, 0)
    assert sparsek(jnp.zeros((0, 3)), 2).shape == (0, 3)
    assert sparsek_causal(jnp.zeros((3, 0)), 2).tau.shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.arange(3), 1), TypeError, "floating-point"),
        ((np.float32(1), 1), ValueError, "scalar"),
        ((np.ones(3, np.float32), -1), ValueError, "not negative"),
        ((np.ones(3, np.float32), float("nan")), ValueError, "not NaN"),
        ((np.ones(3, np.float32), "2"), TypeError, "k is a number"),
        ((np.ones(3, np.float32), np.ones(2)), ValueError, "k broadcasts"),
        ((np.ones((2, 3), np.float32), 1, 2), ValueError, "axis"),
        ((np.ones(3, np.float32), 1, 0, "quick"), ValueError, "method"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sparsek(*arguments)


# ---- prefixes -------------------------------------------------------------------------------------------------------


def prefixes(z: np.ndarray, k) -> np.ndarray:
    """p of every prefix, [..., n, n], by the operator itself."""
    n = z.shape[-1]
    rows = np.where(np.tri(n, dtype=bool), z[..., None, :], -np.inf).astype(z.dtype)
    return np.asarray(run(rows, np.broadcast_to(np.asarray(k, z.dtype)[..., None], rows.shape[:-1])))


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Scores [8, 90] with spreads, ties and missing keys, and k [8]; all tests have these shapes, compiled once."""
    rng = np.random.default_rng(3)
    k = np.array([0, 1, 5.5, 20, 5.5, 20, 1, 90])
    z = rng.normal(size=(8, 90)) * np.array([1, 0.3, 3, 10, 1, 1, 1, 1])[:, None]
    z[4] = np.round(z[4] * 2) / 2
    z[5, ::7] = -np.inf
    z[6] = 1.0
    return z, k


def test_causal_is_the_operator_of_each_prefix(x64):
    z, k = sequences()
    result = run_causal(z, k, chunk=16)
    p = prefixes(z, k)
    tau = np.asarray(result.tau)
    # The gates of all keys follow from tau alone.
    with np.errstate(invalid="ignore"):
        gates = np.where(z[:, None] > -np.inf, np.clip(z[:, None, :] - tau[..., None], 0, 1), 0) * np.tri(90)
    np.testing.assert_allclose(gates, p, atol=1e-9)
    np.testing.assert_allclose(result.gates, np.diagonal(p, axis1=1, axis2=2), atol=1e-9)
    assert np.asarray(result.exact).all()
    # tau never decreases, so a dropped key never returns.
    assert (tau[:, 1:] >= tau[:, :-1]).all()
    dropped = p[:, :-1] <= 0
    assert not ((p[:, 1:] > 1e-12) & dropped & np.tri(90, dtype=bool)[:-1]).any()


def test_causal_derivatives(x64):
    rng = np.random.default_rng(4)
    z, dz, kept, gate_weights = rng.normal(size=(4, 4, 60))
    k = np.array([1.0, 6.0, 7.3, 2.0])

    def causal(z, k):
        tau, gates, _ = sparsek_causal(z, k, chunk=16, capacity=40)
        return (jnp.where(jnp.isfinite(tau), tau, 0) * kept + jnp.sin(gates) * gate_weights).sum()

    def by_prefix(z, k):
        # tau is z - p of any key inside the window; its derivative is 0 where there is none.
        rows = jnp.where(np.tri(60, dtype=bool), z[:, None, :], -jnp.inf)
        p = sparsek(rows, k[:, None], method="fast")
        inside = (p > 0) & (p < 1)
        count = inside.sum(-1).astype(z.dtype)
        tau = jnp.where(inside, z[:, None, :] - p, 0).sum(-1) / jnp.maximum(count, 1)
        gates = jnp.where(np.eye(60, dtype=bool), p, 0).sum(-1)
        return (jnp.where(count > 0, tau, 0) * kept + jnp.sin(gates) * gate_weights).sum()

    @jax.jit
    def derivatives(z, k):
        gradients = [jax.grad(f, (0, 1))(z, k) for f in (causal, by_prefix)]
        return gradients, jax.jvp(causal, (z, k), (dz, np.ones(4)))[1]

    (actual, expected), tangent = derivatives(z, k)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-9), actual, expected)
    np.testing.assert_allclose(tangent, (actual[0] * dz).sum() + actual[1].sum(), atol=1e-9)


def test_a_capacity_that_does_not_suffice_is_told(x64):
    rng = np.random.default_rng(5)
    z, k = rng.normal(size=(8, 90)), np.full(8, 5.0)
    # Chunks of 10 add to the 8 that are kept; up to about 15 keys count here.
    full, part = run_causal(z, k, chunk=16), run_causal(z, k, capacity=8, chunk=10)
    exact = np.asarray(part.exact)
    assert np.asarray(full.exact).all()
    assert not exact.all()
    assert exact.any()
    np.testing.assert_allclose(np.asarray(part.tau)[exact], np.asarray(full.tau)[exact], atol=1e-9)
    assert (np.asarray(part.tau) <= np.asarray(full.tau) + 1e-9).all()


def test_nan_reaches_later_positions_only(x64):
    z, k = np.random.default_rng(6).normal(size=(8, 90)), np.full(8, 4.0)
    clean = run_causal(z, k, chunk=16)
    z[0, 20] = np.nan
    result = run_causal(z, k, chunk=16)
    assert np.isnan(result.tau[0, 20:]).all()
    assert np.isnan(result.gates[0, 20:]).all()
    np.testing.assert_array_equal(result.tau[0, :20], clean.tau[0, :20])
    np.testing.assert_array_equal(result.tau[1:], clean.tau[1:])


def test_causal_in_vmap_and_in_one_chunk(x64):
    z, k = sequences()
    mapped = jax.jit(jax.vmap(sparsek_causal))(z, k)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-9), mapped, run_causal(z, k, chunk=16))


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(state: SparseKState, z):
    """The states after each step, stacked, and what the steps give."""

    def step(state, score):
        state, tau, kept = state.step(score)
        return state, (state, tau, kept, state.gates, state.exact)

    return jax.lax.scan(step, state, jnp.moveaxis(jnp.asarray(z), -1, 0))[1]


def test_decoding_agrees_with_the_causal_form(x64):
    z, k = sequences()
    start = SparseKState.init(k, capacity=90, shape=(8,), dtype=jnp.float64)
    state, tau, kept, gates, exact = (jax.tree.map(np.asarray, x) for x in jax.jit(decode)(start, z))
    np.testing.assert_allclose(tau.T, run_causal(z, k, chunk=16).tau, atol=1e-9)
    np.testing.assert_array_equal(exact, True)
    np.testing.assert_array_equal(kept, state.positions >= 0)
    p = prefixes(z, k)
    for t in range(90):
        for row in range(8):
            positions = state.positions[t, row][kept[t, row]]
            assert sorted(positions) == list(np.flatnonzero(p[row, t] > 1e-12))
            np.testing.assert_array_equal(state.scores[t, row][kept[t, row]], z[row, positions])
            np.testing.assert_allclose(gates[t, row][kept[t, row]], p[row, t, positions], atol=1e-9)


def test_decoding_within_its_room(x64):
    z, k = np.random.default_rng(8).normal(size=(8, 90)), np.full(8, 5.0)
    full = np.asarray(run_causal(z, k, chunk=16).tau)
    start = SparseKState.init(k, capacity=6, shape=(8,), dtype=jnp.float64)
    state, tau, kept, _, exact = (jax.tree.map(np.asarray, x) for x in jax.jit(decode)(start, z))
    assert not exact.all()
    assert exact.any()
    assert (tau[1:] >= tau[:-1]).all()
    assert (full + 1e-9 >= tau.T).all()
    np.testing.assert_allclose(tau.T[exact.T], full[exact.T], atol=1e-9)
    # The greatest six of the prefix, or all that count among them.
    for t in (50, 89):
        best = np.sort(z[:, : t + 1])[:, -6:]
        p = project(best, k)
        for row in range(8):
            np.testing.assert_array_equal(np.sort(state.scores[t, row][kept[t, row]]), best[row][p[row] > 0])


def test_gradients_through_decoding(x64):
    z = np.random.default_rng(9).normal(size=(2, 30))
    k = np.array([3.0, 1.0])
    start = SparseKState.init(k, capacity=20, shape=(2,), dtype=jnp.float64)

    def loss(tau):
        return jnp.where(jnp.isfinite(tau), jnp.sin(tau), 0).sum()

    # Decoding's derivatives are those of its solver, the causal form's are sums over intervals.
    actual, expected = jax.jit(
        lambda z: (
            jax.grad(lambda z: loss(decode(start, z)[1]))(z),
            jax.grad(lambda z: loss(sparsek_causal(z, k).tau))(z),
        )
    )(z)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_nan_stays_in_the_state():
    _, tau, _, gates, exact = jax.jit(decode)(SparseKState.init(2, capacity=4), np.array([1, 2, np.nan, 3], np.float32))
    np.testing.assert_array_equal(np.isnan(tau), [False, False, True, True])
    np.testing.assert_array_equal(np.isnan(gates).all(-1), [False, False, True, True])
    np.testing.assert_array_equal(exact, [True, True, False, False])
    # Without jit, too: one step is one program.
    state, _, kept = SparseKState.init(2, capacity=4).step(jnp.float32(1))
    np.testing.assert_array_equal(kept, [True, False, False, False])
    np.testing.assert_array_equal(state.positions, [0, -1, -1, -1])


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="capacity is at least 3"):
        SparseKState.init(2.5, capacity=2)
    with pytest.raises(ValueError, match="capacity is at least 4"):
        jax_bsk.sparsek_causal(jnp.ones(8), 4, capacity=3)
    with pytest.raises(TypeError, match="chunk is an int"):
        jax_bsk.sparsek_causal(jnp.ones(8), 4, chunk=1.5)  # pyright: ignore
    with pytest.raises(TypeError, match="dtype"):
        SparseKState.init(1, capacity=2, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="batch shape"):
        SparseKState.init(1, capacity=2).step(jnp.ones(3))
