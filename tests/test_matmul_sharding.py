"""Block-sparse products on a mesh of eight host devices: the same values, also of gradients and of bad lists.

Tokens and rows of the result split with no collective, the contracted length with one sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BSR, sampled_matmul, sparse_matmul
from tests.util import assert_close, collectives, text_of

# Four devices split M and K in whole blocks, two split N anywhere.
M, K, N, BLOCK = 128, 192, 24, 16


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def make(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    matrix = BSR.random(keys[0], (M, K), 0.4, BLOCK)
    return matrix, np.asarray(matrix.to_dense()), [jax.random.normal(key, (M + K, N)) for key in keys[1:]]


# name: function of the matrix and the dense factor, its length, the contracted dim of the factor, the dense equivalent
FORMS = {
    "A B": (sparse_matmul, K, 0, lambda a, b: a @ b),
    "At B": (lambda a, b: sparse_matmul(a, b, transpose=True), M, 0, lambda a, b: a.T @ b),
    "X A": (lambda a, x: sparse_matmul(x, a), M, 1, lambda a, x: x @ a),
    "X At": (lambda a, x: sparse_matmul(x, a, transpose=True), K, 1, lambda a, x: x @ a.T),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("split", ["tokens", "rows", "contracted"])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_splits(form, split, axis_type):
    function, length, contracted, plain = FORMS[form]
    if split == "rows" and axis_type == AxisType.Explicit:
        pytest.skip("an explicit mesh has no way to ask for it: the result's rows follow no operand")
    matrix, dense, (numbers, *_) = make()
    factor = numbers[:length] if contracted == 0 else numbers[:length].T
    want = plain(dense, np.asarray(factor))
    mesh = mesh_of(axis_type)
    spec = {"tokens": {1 - contracted: "data"}, "contracted": {contracted: "model"}, "rows": {}}[split]
    sharded = jax.device_put(factor, NamedSharding(mesh, P(*(spec.get(i) for i in range(2)))))
    out = {contracted: "model"} if split == "rows" else spec if split == "tokens" else {}
    out_sharding = NamedSharding(mesh, P(*(out.get(i) for i in range(2))))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda b: function(matrix, b), out_shardings=out_sharding).lower(sharded).compile()
        got = program(sharded)
    assert collectives(program) == (["all-reduce"] if split == "contracted" else [])
    assert_close(got, want, 1e-4)
    # Each device computes its part and no more.
    local = list(want.shape)
    if split != "contracted":
        local[contracted if split == "rows" else 1 - contracted] //= 4 if split == "rows" else 2
    (call,) = [line for line in text_of(program).splitlines() if 'custom_call_target="jax_bsk_matmul_product"' in line]
    assert f"f32[{local[0]},{local[1]}]" in call.split("custom-call")[0]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_gradients_over_tokens(axis_type):
    # The usual training step: tokens over devices, the weight on each; its gradient is one sum.
    matrix, dense, (numbers, cotangent, _) = make()
    x, dy = numbers[:M].T, cotangent[:K].T
    mesh = mesh_of(axis_type)
    tokens = NamedSharding(mesh, P("data", None))

    def pull(data, x, dy):
        return jax.vjp(lambda data, x: sparse_matmul(x, matrix.with_data(data)), data, x)[1](dy)

    with jax.set_mesh(mesh):
        args = matrix.data, jax.device_put(x, tokens), jax.device_put(dy, tokens)
        program = jax.jit(pull).lower(*args).compile()
        ddata, dx = program(*args)
    assert collectives(program) == ["all-reduce"]
    assert_close(dx, np.asarray(dy) @ dense.T, 1e-4)
    want = np.where(dense != 0, np.asarray(x).T @ np.asarray(dy), 0)
    assert_close(matrix.with_data(ddata).to_dense(), want, 1e-4)


def test_a_bad_list_under_a_split_contraction():
    matrix, dense, (numbers, *_) = make()
    indices, indptr = np.array(matrix.indices), np.array(matrix.indptr)
    indices[indptr[1]] = 999
    indptr[-1] = 10_000
    bad = BSR(matrix.data, indptr, indices, matrix.shape)
    mesh = mesh_of()
    factor = jax.device_put(numbers[:K], NamedSharding(mesh, P("model", None)))
    with jax.set_mesh(mesh):
        got = np.asarray(jax.jit(lambda bad, b: sparse_matmul(bad, b))(bad, factor))
    nan = np.isnan(got).any(1).reshape(-1, BLOCK)
    assert nan.any(1).tolist() == nan.all(1).tolist() == [r in (1, M // BLOCK - 1) for r in range(M // BLOCK)]
    assert_close(got[:BLOCK], (dense @ np.asarray(numbers[:K]))[:BLOCK], 1e-4)


def test_the_sampled_product_sums_a_split_length():
    matrix, dense, (a, b, _) = make()
    mesh = mesh_of()
    left, right = a[:M], b[:K].T
    args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((left, P(None, "data")), (right, P("data", None)))]
    with jax.set_mesh(mesh):
        program = jax.jit(lambda a, b: sampled_matmul(a, b, matrix).data).lower(*args).compile()
        got = matrix.with_data(program(*args)).to_dense()
    assert collectives(program) == ["all-reduce"]
    assert_close(got, np.where(dense != 0, np.asarray(left) @ np.asarray(right), 0), 1e-4)


def test_vmap_over_a_split_axis():
    matrix, dense, numbers = make()
    mesh = mesh_of()
    batch = jnp.stack([numbers[0][:K], numbers[1][:K]])
    split = jax.device_put(batch, NamedSharding(mesh, P("data", None, None)))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.vmap(lambda b: sparse_matmul(matrix, b))).lower(split).compile()
        got = program(split)
    assert collectives(program) == []
    assert_close(got, dense @ np.asarray(batch), 1e-4)


def test_vmap_over_an_axis_of_size_zero_on_a_mesh():
    mesh = mesh_of()
    matrix = make()[0]
    placed = jax.device_put(jnp.zeros((0, K, N)), NamedSharding(mesh, P(None, None, "data")))
    call = jax.jit(jax.vmap(lambda x: sparse_matmul(matrix, x)))
    assert call(placed).shape == (0, M, N)
    gradient = jax.jit(jax.grad(lambda data, x: jax.vmap(lambda x: sparse_matmul(matrix.with_data(data), x))(x).sum()))
    np.testing.assert_array_equal(gradient(matrix.data, placed), jnp.zeros_like(matrix.data))
