"""A `BSR` as a pytree: its blocks are the only leaf unless its lists were given as JAX arrays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import sparse

import jax_bsk
from jax_bsk import BSR, sampled_matmul, sparse_matmul

SHAPE, BLOCK = (64, 48), 16


def make(seed=0) -> BSR:
    return BSR.random(jax.random.key(seed), SHAPE, 0.5, BLOCK)


def loss(matrix, x):
    return (sparse_matmul(matrix, x) ** 2).sum()


# A BSR with every kind of lists: static, leaves, leaves without those by columns.
KINDS = {
    "static": lambda matrix: matrix,
    "leaves": lambda matrix: matrix.with_traced_lists(),
    "bare": lambda matrix: BSR(matrix.data, jnp.asarray(matrix.indptr), jnp.asarray(matrix.indices), matrix.shape),
}
LEAVES = {"static": 1, "leaves": 6, "bare": 3}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "label", jax.sharding.PartitionSpec(), np.ones(7)])
def test_the_structure_does_not_depend_on_the_leaves(kind, value):
    matrix = KINDS[kind](make())
    leaves, structure = jax.tree.flatten(matrix)
    assert len(leaves) == LEAVES[kind]
    other = jax.tree.map(lambda _: value, matrix)
    if value is not None:
        assert jax.tree.structure(other) == structure
    back = jax.tree.map(lambda _, leaf: leaf, other, matrix, is_leaf=lambda x: x is None)
    assert jax.tree.structure(back) == structure
    np.testing.assert_array_equal(back.to_dense(), matrix.to_dense())
    assert repr(other).startswith("BSR(shape=(64, 48), block_size=(16, 16)")
    assert repr(value if value is None else "data") in repr(other) or "data=" in repr(other)


def test_paths_are_the_attributes(kind):
    paths, _ = jax.tree_util.tree_flatten_with_path(KINDS[kind](make()))
    names = [".data", ".indptr", ".indices", *(f".column_lists[{i}]" for i in range(3))]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == names[: LEAVES[kind]]


def test_stacks_and_norms(kind):
    matrix = KINDS[kind](make())
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), matrix, matrix)
    assert "data=float32[2, 6, 16, 16]" in repr(stack)
    x = jnp.ones((48, 3))
    both = jax.vmap(sparse_matmul, (0, None))(stack, x)
    np.testing.assert_allclose(both[1], matrix.to_dense() @ x, atol=1e-4)
    with pytest.raises(ValueError, match=r"a must have .*use jax.vmap for a stack"):
        sparse_matmul(stack, x)
    norm = jax.tree.map(jnp.linalg.norm, matrix)
    np.testing.assert_allclose(norm.data, jnp.linalg.norm(matrix.to_dense()), rtol=1e-5)
    assert "data=float32[]" in repr(norm)


def test_results_of_vmap_and_scan_hold_batches():
    matrix = make()
    batch = jax.random.normal(jax.random.key(1), (3, 48, 2))
    each = [jax.grad(loss)(matrix, x).data for x in batch]
    mapped = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(matrix, batch)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, jax.grad(loss)(matrix, x)), 0.0, batch)
    for found in (mapped, scanned):
        np.testing.assert_allclose(found.data, jnp.stack(each), rtol=1e-5, atol=1e-4)
    left = jax.random.normal(jax.random.key(2), (3, 64, 48))
    square = BSR.random(jax.random.key(3), (64, 64), 0.4, BLOCK)
    products = jax.vmap(lambda a: sampled_matmul(a, a.T, square))(left)
    want = jnp.stack([sampled_matmul(a, a.T, square).data for a in left])
    np.testing.assert_allclose(products.data, want, rtol=1e-5, atol=1e-4)


def test_a_gradient_is_a_matrix_and_needs_no_allow_int():
    matrix, x = make(), jax.random.normal(jax.random.key(1), (48, 2))
    value, gradient = jax.jit(jax.value_and_grad(loss))(matrix, x)
    dense = jnp.asarray(matrix.to_dense())
    want = jax.grad(lambda dense: ((dense @ x) ** 2).sum())(dense)
    np.testing.assert_allclose(value, ((dense @ x) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient.to_dense(), jnp.where(dense != 0, want, 0), rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(gradient) == jax.tree.structure(matrix)
    with pytest.raises(TypeError, match="int32"):
        jax.grad(loss)(matrix.with_traced_lists(), x)
    again = jax.grad(loss)(matrix.with_traced_lists().with_static_lists(), x)
    np.testing.assert_allclose(again.data, gradient.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adafactor(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)),
        optax.chain(optax.masked(optax.add_decayed_weights(0.1), {"w": True, "b": False}), optax.sgd(1e-2, 0.9)),
    ],
    ids=["adafactor", "clipped-adamw", "masked-decay"],
)
def test_optimizers_see_the_blocks_alone(optimizer):
    matrix = make()
    params, x = {"w": matrix, "b": jnp.zeros((64, 1))}, jnp.ones((48, 1))

    def objective(params):
        return ((params["w"] @ x + params["b"] - 1) ** 2).mean()

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        before, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grads, state, params)
        after: Any = optax.apply_updates(params, updates)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert after["w"].lists is matrix.lists
    assert not np.array_equal(after["w"].data, matrix.data)
    assert objective(after) < before
    assert not any(jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.ndim for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("remake", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_copies_are_equal_in_structure(kind, remake):
    matrix = KINDS[kind](make())
    again = remake(matrix)
    assert jax.tree.structure(again) == jax.tree.structure(matrix)
    np.testing.assert_array_equal(again.to_dense(), matrix.to_dense())
    with pytest.raises(AttributeError, match="a BSR is immutable"):
        again.data = matrix.data


def test_equal_lists_are_one_object_that_nobody_changes():
    matrix, equal, other = make(), make(), make(1)
    assert equal.lists is matrix.lists
    assert other.lists != matrix.lists
    assert jax.tree.structure(other) != jax.tree.structure(matrix)
    numbers = np.array(matrix.indices)
    made = BSR(matrix.data, matrix.indptr, numbers, SHAPE)
    numbers[:] = 0
    np.testing.assert_array_equal(made.indices, matrix.indices)
    with pytest.raises(ValueError, match="read-only"):
        matrix.indices[0] = 0


def test_equal_patterns_compile_nothing_and_neither_do_other_ones_that_are_leaves():
    traces = []

    @jax.jit
    def product(matrix, x):
        traces.append(matrix.has_static_lists)
        return sparse_matmul(matrix, x)

    x = jnp.ones((48, 2))
    for seed in (0, 0, 1):
        matrix = make(seed)
        for form in (matrix, matrix.with_traced_lists()):
            np.testing.assert_allclose(product(form, x), matrix.to_dense() @ x, atol=1e-4)
    assert traces == [True, False, True]


CONSTRUCTORS = {
    "random": make,
    "from_dense": lambda: BSR.from_dense(np.asarray(make().to_dense()), BLOCK),
    "from_scipy": lambda: BSR.from_scipy(sparse.bsr_array(np.asarray(make().to_dense()), blocksize=(16, 16))),
    "leaves": lambda: make().with_traced_lists(),
}


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_no_call_copies_from_the_host(constructor):
    matrix, x = CONSTRUCTORS[constructor](), jnp.ones((48, 2))
    compiled = jax.jit(sparse_matmul)
    _ = compiled(matrix, x), sparse_matmul(matrix, x)  # the first call may
    with jax.transfer_guard("disallow"):
        _ = compiled(matrix, x), sparse_matmul(matrix, x)


def test_shardings_of_arguments(kind):
    matrix, x = KINDS[kind](make()), jnp.ones((48, 2))
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    shardings = jax.tree.map(lambda _: everywhere, matrix)
    out = jax.jit(lambda matrix, x: matrix.to_dense() @ x, in_shardings=(shardings, everywhere))(matrix, x)
    np.testing.assert_allclose(out, matrix.to_dense() @ x, atol=1e-4)


def test_exported_functions_take_either_kind(kind):
    matrix, x = KINDS[kind](make()), jnp.ones((48, 2))

    def step(matrix, x):
        return sparse_matmul(matrix, x), matrix.with_data(2 * matrix.data)

    exported = jax.export.export(jax.jit(step), disabled_checks=jax_bsk.export_checks())(matrix, x)
    out, twice = jax.export.deserialize(exported.serialize()).call(matrix, x)
    np.testing.assert_allclose(out, matrix.to_dense() @ x, atol=1e-4)
    assert jax.tree.structure(twice) == jax.tree.structure(matrix)
    np.testing.assert_allclose(twice.data, 2 * matrix.data)
