"""Operators of a `BSR`, matrices of SciPy in any format, and mistakes, each with its remedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from jax_bsk import BSR, sampled_matmul, sparse_matmul

KEY = jax.random.key(0)
MATRIX = BSR.random(KEY, (64, 48), 0.5, 16)
DENSE = np.asarray(MATRIX.to_dense())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_products_by_the_operator(compiled):
    x, v, rows = jnp.ones((48, 3)), jnp.arange(48.0), jnp.ones((2, 3, 64))

    def products(matrix, x, v, rows):
        return matrix @ x, matrix @ v, rows @ matrix, rows[0, 0] @ matrix, sparse_matmul(v, matrix, transpose=True)

    found = (jax.jit(products) if compiled else products)(MATRIX, x, v, rows)
    want = DENSE @ x, DENSE @ v, rows @ DENSE, rows[0, 0] @ DENSE, v @ DENSE.T
    for got, expected in zip(found, want, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_numpy_leaves_the_operators_to_the_matrix():
    found = np.ones((2, 64), np.float32) @ MATRIX
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, np.ones((2, 64)) @ DENSE, atol=1e-4)
    assert isinstance(np.float32(2) * MATRIX, BSR)


@pytest.mark.parametrize("factor", [2, 2.0, np.float32(2), jnp.float32(2)], ids=lambda x: type(x).__name__)
def test_scalar_factors(factor):
    for scaled in (factor * MATRIX, MATRIX * factor, -MATRIX * -factor, MATRIX / (1 / factor)):
        assert scaled.lists is MATRIX.lists
        np.testing.assert_array_equal(scaled.data, 2 * MATRIX.data)
    np.testing.assert_array_equal(jax.jit(lambda s, matrix: s * matrix)(factor, MATRIX).data, 2 * MATRIX.data)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dok", "lil", "dia", "bsr"])
def test_from_scipy_takes_every_format(form):
    numbers = sparse.random_array((50, 37), density=0.05, rng=0, dtype=np.float32)
    array = numbers.asformat(form)
    for block_size, found in (((32, 16), (32, 16)), (None, (128, 128))):
        if form == "bsr" and block_size is None:
            assert isinstance(array, sparse.bsr_array)
            found = array.blocksize
        matrix = BSR.from_scipy(array, block_size)
        assert matrix.block_size == found
        matrix.check()
        np.testing.assert_array_equal(matrix.to_dense(), numbers.toarray())


def test_from_scipy_sums_what_is_named_twice():
    twice = sparse.coo_array((np.ones(3, np.float32), ([5, 5, 40], [7, 7, 3])), (64, 48))
    np.testing.assert_array_equal(BSR.from_scipy(twice, 16).to_dense(), twice.toarray())
    empty = BSR.from_scipy(sparse.csr_matrix((64, 48), dtype=np.float32), 16)
    assert empty.entries == 0
    np.testing.assert_array_equal(empty @ jnp.ones(48), jnp.zeros(64))


def test_a_random_matrix_in_jit_by_a_key_with_a_value():
    made = jax.jit(lambda x: BSR.random(KEY, (64, 48), 0.5, 16) @ x)(jnp.eye(48))
    np.testing.assert_allclose(made, DENSE, atol=1e-5)


def jitted(function, *args):
    return lambda: jax.jit(function)(*args)


def of_lists(function):
    return jitted(function, MATRIX.with_traced_lists())


X = jnp.ones((48, 3))
MISTAKES = {
    "random in jit": (
        jitted(lambda key: BSR.random(key, (64, 48), 0.5, 16).data, KEY),
        TypeError,
        r"key must have a value, .*; call BSR.random outside of jit",
    ),
    "a traced density": (
        jitted(lambda density: BSR.random(KEY, (64, 48), density, 16).data, 0.5),
        TypeError,
        r"density must have a value",
    ),
    "from_dense in jit": (jitted(lambda a: BSR.from_dense(a, 16).data, X), TypeError, r"array must have values.*keep"),
    "a traced keep": (
        jitted(lambda keep: BSR.from_dense(X, 16, keep=keep).data, jnp.ones((3, 1), bool)),
        TypeError,
        r"keep must have values",
    ),
    "density of traced lists": (of_lists(lambda m: m.density), TypeError, r"BSR.density needs values"),
    "to_scipy in jit": (of_lists(lambda m: m.to_scipy()), TypeError, r"to_scipy.* needs values"),
    "check in jit": (of_lists(lambda m: m.check()), TypeError, r"check.* needs values"),
    "static lists in jit": (of_lists(lambda m: m.with_static_lists().data), TypeError, r"static_lists.* needs values"),
    "boolean blocks": (lambda: MATRIX.astype(bool) @ X, TypeError, r"a must have blocks of numbers, got boolean"),
    "boolean blocks on the right": (lambda: X.T @ MATRIX.T.astype(bool), TypeError, r"b must have blocks of numbers"),
    "integers": (
        lambda: MATRIX.astype(jnp.int32) @ X.astype(jnp.int32),
        TypeError,
        r"a and b must have floating-point numbers, got int32 and int32",
    ),
    "sampled integers": (
        lambda: sampled_matmul(jnp.ones((64, 2), int), jnp.ones((2, 48), int), MATRIX),
        TypeError,
        r"a and b must have floating-point numbers",
    ),
    "no pattern": (lambda: sampled_matmul(X, X.T, X), TypeError, r"pattern must be a BSR, got ArrayImpl"),  # pyright: ignore[reportArgumentType]
    "two matrices": (lambda: MATRIX @ MATRIX, TypeError, r"one a BSR and the other an array"),
    "a batch": (lambda: MATRIX @ jnp.ones((2, 48, 3)), ValueError, r"b must be \[48, N\] or \[48\].*jax.vmap"),
    "a vector of another length": (lambda: MATRIX @ jnp.ones(64), ValueError, r"b must be .*see transpose"),
    "a vector as a factor": (lambda: jnp.ones(48) * MATRIX, ValueError, r"factor must be a scalar"),
    "no blocks": (lambda: jax.tree.map(lambda _: None, MATRIX) @ X, TypeError, r"a must have an array of blocks"),
    "a placeholder": (
        lambda: BSR(None, MATRIX.indptr, MATRIX.indices, (64, 48)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "data must be an array.*jax.tree.map",
    ),
    "data of another shape": (lambda: MATRIX.with_data(X), ValueError, r"data must be .* \(6, 16, 16\), got \(48, 3\)"),
    "dense in from_scipy": (lambda: BSR.from_scipy(DENSE), TypeError, r"array must be a sparse array.*BSR.from_dense"),
    "a density above 1": (lambda: BSR.random(KEY, (64, 48), 1.5), ValueError, r"density must be .*got 1.5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_remedy(mistake):
    call, error, text = MISTAKES[mistake]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("call", [lambda: MATRIX @ [1.0], lambda: 2 / MATRIX, lambda: MATRIX * "2"])  # pyright: ignore[reportOperatorIssue]
def test_other_operands_are_pythons_own_error(call):
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        call()
