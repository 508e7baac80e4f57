"""The products are linear in each factor: forward mode, transposition and solvers, against dense products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as solvers
import numpy as np
import pytest

from jax_bsk import BSR, sampled_matmul, sparse_matmul

MATRIX = BSR.random(jax.random.key(0), (60, 40), 0.5, 16)
DENSE = jnp.asarray(MATRIX.to_dense())
STORED = MATRIX.with_data(jnp.ones_like(MATRIX.data)).to_dense() != 0


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(found, wanted):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * max(1, float(jnp.abs(want).max(initial=0))))


def as_dense(tree):
    return jax.tree.map(lambda x: x.to_dense() if isinstance(x, BSR) else x, tree, is_leaf=lambda x: isinstance(x, BSR))


# of a matrix and a dense factor: sparse, dense
FORMS = {
    "A B": (sparse_matmul, lambda a, b: a @ b, (40, 3)),
    "At B": (lambda a, b, **o: sparse_matmul(a, b, transpose=True, **o), lambda a, b: a.T @ b, (60, 3)),
    "X A": (lambda a, x, **o: sparse_matmul(x, a, **o), lambda a, x: x @ a, (3, 60)),
    "X At": (lambda a, x, **o: sparse_matmul(x, a, transpose=True, **o), lambda a, x: x @ a.T, (3, 40)),
}


@pytest.mark.parametrize("form", FORMS)
def test_tangents_of_a_product(form, implementation):
    sparse, dense, shape = FORMS[form]
    x, dx = draw(1, *shape), draw(2, *shape)
    change = MATRIX.with_data(draw(3, *MATRIX.data.shape))

    def tangents(product, a, x, da, dx):
        out = jax.jvp(product, (a, x), (da, dx))
        # Forward over reverse: the Hessian of a loss times a vector.
        return out, jax.jvp(jax.grad(lambda a, x: jnp.sin(product(a, x)).sum(), (0, 1)), (a, x), (da, dx))[1]

    def ours(a, x):
        return sparse(a, x, implementation=implementation)

    found, second = jax.jit(lambda *args: tangents(ours, *args))(MATRIX, x, change, dx)
    wanted, expected = tangents(dense, DENSE, x, change.to_dense(), dx)
    close(found, wanted)
    close(as_dense(second), (jnp.where(STORED, expected[0], 0), expected[1]))


@pytest.mark.parametrize("form", FORMS)
def test_transposes_of_a_product(form, implementation):
    sparse, dense, shape = FORMS[form]
    x = draw(1, *shape)

    def ours(a, x):
        return sparse(a, x, implementation=implementation)

    cotangent = draw(2, *dense(DENSE, x).shape)

    @jax.jit
    def transposed(cotangent):
        (da,) = jax.linear_transpose(lambda a: ours(a, x), MATRIX)(cotangent)
        (dx,) = jax.linear_transpose(lambda x: ours(MATRIX, x), x)(cotangent)
        return da, dx

    da, dx = transposed(cotangent)
    want_a, want_x = jax.vjp(dense, DENSE, x)[1](cotangent)
    close((da.to_dense(), dx), (jnp.where(STORED, want_a, 0), want_x))


def test_derivatives_of_a_sampled_product(implementation):
    left, right = draw(1, 60, 5), draw(2, 5, 40)

    def ours(left, right):
        return sampled_matmul(left, right, MATRIX, implementation=implementation).to_dense()

    def dense(left, right):
        return jnp.where(STORED, left @ right, 0)

    def all_of_them(product, left, right):
        out = jax.jvp(product, (left, right), (2 * left, right))
        (dleft,) = jax.linear_transpose(lambda left: product(left, right), left)(out[0])
        (dright,) = jax.linear_transpose(lambda right: product(left, right), right)(out[0])
        mixed = jax.grad(lambda x: jax.jvp(lambda x: (product(x, right) ** 2).sum(), (x,), (left,))[1])(left)
        return out, dleft, dright, mixed

    close(jax.jit(lambda *args: all_of_them(ours, *args))(left, right), all_of_them(dense, left, right))


@pytest.mark.parametrize(
    ("lists", "implementation"),
    [("static", "cpu"), ("leaves", "cpu"), ("without columns", "cpu"), ("without columns", "xla")],
)
def test_vmap_of_every_mode(lists, implementation):
    data = jnp.stack([MATRIX.data, 2 * MATRIX.data])
    x = draw(1, 2, 40, 3)
    places = {
        "static": MATRIX,
        "leaves": MATRIX.with_traced_lists(),
        "without columns": BSR(MATRIX.data, jnp.asarray(MATRIX.indptr), jnp.asarray(MATRIX.indices), MATRIX.shape),
    }[lists]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), places)

    def modes(a, x, product):
        loss = jax.grad(lambda x: (product(a, x) ** 2).sum())
        return jax.jvp(lambda x: product(a, x), (x,), (x,))[1], jax.jvp(loss, (x,), (x,))[1]

    def ours(a, x):
        return sparse_matmul(a, x, implementation=implementation)

    # The factors are mapped, or one of them, or the lists, too.
    dense = jnp.stack([DENSE, 2 * DENSE])
    wanted = jax.vmap(lambda a, x: modes(a, x, jnp.matmul))(dense, x)
    close(jax.jit(jax.vmap(lambda data, x: modes(places.with_data(data), x, ours)))(data, x), wanted)
    wanted = jax.vmap(lambda x: modes(DENSE, x, jnp.matmul))(x)
    close(jax.jit(jax.vmap(lambda a, x: modes(a, x, ours)))(stack, x), wanted)
    # And the transpose of what is mapped sums over what is shared.
    shared = jax.grad(lambda x: (jax.vmap(ours, (0, None))(stack, x) ** 2).sum())(x[0])
    close(shared, 2 * jax.grad(lambda x: ((DENSE @ x) ** 2).sum())(x[0]))


def test_jacobians(implementation):
    v = draw(1, 40)

    def ours(v):
        return sparse_matmul(MATRIX, v, implementation=implementation)

    @jax.jit
    def jacobians(v):
        linear = jax.vmap(jax.linearize(ours, v)[1], 0, 1)(jnp.eye(40))
        return jax.jacfwd(ours)(v), jax.jacrev(ours)(v), linear, jax.hessian(lambda v: (ours(v) ** 2).sum())(v)

    close(jacobians(v), (DENSE, DENSE, DENSE, 2 * DENSE.T @ DENSE))


@pytest.mark.parametrize(("solver", "implementation"), [("gmres", "cpu"), ("gmres", "xla"), ("cg", "cpu")])
def test_gradients_through_a_solver(solver, implementation):
    dense = DENSE @ DENSE.T + 20 * jnp.eye(60)
    matrix, b = BSR.from_dense(dense, 16, keep=np.ones((4, 4), bool)), draw(1, 60)

    def solved(matrix, b):
        def multiply(v):
            return sparse_matmul(matrix, v, implementation=implementation)

        return jnp.sin(getattr(solvers, solver)(multiply, b, tol=1e-7)[0]).sum()

    found = jax.jit(jax.grad(solved, (0, 1)))(matrix, b)
    wanted = jax.grad(lambda dense, b: jnp.sin(jnp.linalg.solve(dense, b)).sum(), (0, 1))(dense, b)
    close(as_dense(found), wanted)


def test_debugging_modes(implementation):
    x = draw(1, 40, 3)

    def loss(matrix, x):
        return (sparse_matmul(matrix, x, implementation=implementation) ** 2).sum()

    want = jax.grad(loss)(MATRIX, x)
    with jax.disable_jit():
        close(jax.grad(loss)(MATRIX, x), want)
    with jax.debug_nans(True), jax.debug_infs(True):
        close(jax.grad(loss)(MATRIX, x), want)
        with pytest.raises(FloatingPointError):
            sparse_matmul(MATRIX, jnp.full((40, 1), jnp.nan), implementation=implementation)
