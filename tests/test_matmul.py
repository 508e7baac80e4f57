"""Block-sparse products against dense ones in float64: values, derivatives, transformations, bad lists."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk import BSR, FallbackWarning, UnsupportedError, sampled_matmul, sparse_matmul

# shape, block size, density
CASES = [
    ((96, 64), (32, 16), 0.4),
    ((100, 70), (32, 16), 0.5),
    ((64, 200), 64, 0.3),
    ((33, 31), 16, 1.0),
    ((64, 64), 16, 0),
]


def make(shape, block_size, density, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    matrix = BSR.random(keys[0], shape, density, block_size)
    dense = np.asarray(matrix.to_dense(), np.float64)
    right, left = jax.random.normal(keys[1], (shape[1], 23)), jax.random.normal(keys[2], (2, 5, shape[0]))
    return matrix, dense, right, left


@pytest.mark.parametrize(("shape", "block_size", "density"), CASES)
def test_values(shape, block_size, density):
    matrix, dense, right, left = make(shape, block_size, density)
    b, x = np.asarray(right, np.float64), np.asarray(left, np.float64)
    for got, want in (
        (sparse_matmul(matrix, right), dense @ b),
        (sparse_matmul(left, matrix), x @ dense),
        (sparse_matmul(matrix, left[0].T, transpose=True), dense.T @ x[0].T),
        (sparse_matmul(right.T, matrix, transpose=True), b.T @ dense.T),
        (matrix.T.to_dense(), dense.T),
    ):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "block_size", "density"), CASES[:4])
def test_the_sampled_product(shape, block_size, density):
    matrix, dense, right, left = make(shape, block_size, density)
    a, b = left[0].T, right[:, :5].T
    got = np.asarray(sampled_matmul(a, b, matrix).to_dense(), np.float64)
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(got, np.where(dense != 0, want, 0), atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_derivatives(transpose):
    matrix, dense, right, left = make((100, 70), (32, 16), 0.5)
    operand = left[0].T if transpose else right

    def sparse(data, operand):
        return jnp.sin(sparse_matmul(matrix.with_data(data), operand, transpose=transpose)).sum()

    def full(matrix, operand):
        return jnp.sin((matrix.T if transpose else matrix) @ operand).sum()

    data, operand_gradient = jax.jit(jax.grad(sparse, (0, 1)))(matrix.data, operand)
    expected = jax.grad(full, (0, 1))(jnp.asarray(dense, jnp.float32), operand)
    assert data.shape == matrix.data.shape  # no dense gradient
    np.testing.assert_allclose(
        matrix.with_data(data).to_dense(), np.where(dense != 0, expected[0], 0), atol=5e-5, rtol=1e-4
    )
    np.testing.assert_allclose(operand_gradient, expected[1], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [{"indices": 99}, {"indices": -1}, {"indptr": 10_000}])
def test_a_bad_list_poisons_its_row_alone(change):
    matrix, dense, right, _ = make((96, 64), (32, 16), 0.6)
    ((name, value),) = change.items()
    lists = {"indptr": np.array(matrix.indptr), "indices": np.array(matrix.indices)}
    place = int(lists["indptr"][2]) if name == "indices" else 3
    lists[name][place] = value
    bad = BSR(matrix.data, lists["indptr"], lists["indices"], matrix.shape)
    out = np.asarray(jax.jit(sparse_matmul)(bad, right))
    assert np.isnan(out[64:]).all()
    np.testing.assert_allclose(out[:64], (dense @ np.asarray(right, np.float64))[:64], atol=2e-5)
    with pytest.raises(ValueError, match="row 2"):
        bad.check()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["cpu", "xla"])
def test_a_bad_offset_takes_no_other_row_with_it(name, traced):
    # The offset between rows 2 and 3: both cannot be followed, those after them can.
    matrix, dense, right, left = make((192, 64), (32, 16), 0.6)
    indptr = np.array(matrix.indptr)
    indptr[3] = 10_000
    kept = dense.copy()
    kept[64:128] = 0

    def run(indptr):
        bad = BSR(matrix.data, indptr, matrix.indices, matrix.shape)
        gradient = jax.grad(lambda data: sparse_matmul(left, bad.with_data(data), implementation=name).sum())(bad.data)
        products = (sparse_matmul(bad, right, implementation=name), sparse_matmul(left, bad, implementation=name))
        return *products, gradient, bad.row_ids()

    by_rows, by_columns, gradient, row_ids = (jax.jit(run) if traced else run)(indptr)
    wrong = np.isnan(by_rows).any(1)
    assert wrong.tolist() == np.isnan(by_rows).all(1).tolist() == [64 <= row < 128 for row in range(192)]
    np.testing.assert_allclose(by_rows[128:], (dense @ np.asarray(right, np.float64))[128:], atol=2e-5)
    np.testing.assert_allclose(by_columns, np.asarray(left, np.float64) @ kept, atol=3e-5)
    rows = np.repeat(np.arange(6), np.diff(matrix.indptr))
    assert np.asarray(row_ids).tolist() == np.where((rows == 2) | (rows == 3), -1, rows).tolist()
    assert ((np.abs(gradient).max((1, 2)) > 0) == (np.asarray(row_ids) >= 0)).all()


def test_transformations():
    matrix, dense, right, _ = make((96, 64), (32, 16), 0.5)
    want = dense @ np.asarray(right, np.float64)
    both = jnp.stack([right, 2 * right])
    got = jax.jit(jax.vmap(sparse_matmul, (None, 0)))(matrix, both)
    np.testing.assert_allclose(got, [want, 2 * want], atol=5e-5)
    data = jnp.stack([matrix.data, -matrix.data])
    got = jax.vmap(lambda data: sparse_matmul(matrix.with_data(data), right))(data)
    np.testing.assert_allclose(got, [want, -want], atol=5e-5)

    def loss(data):
        return (sparse_matmul(matrix.with_data(data), right) ** 2).sum()

    def full(array):
        gradient = jax.grad(lambda array: ((array @ right) ** 2).sum())(array)
        return (jnp.where(stored, gradient, 0) ** 2).sum()

    stored, array = dense != 0, jnp.asarray(dense, jnp.float32)
    second = jax.grad(lambda data: (jax.grad(loss)(data) ** 2).sum())(matrix.data)
    want = np.where(stored, jax.grad(full)(array), 0)
    np.testing.assert_allclose(matrix.with_data(second).to_dense(), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("mapped", ["data", "dense", "left", "right"])
def test_vmap_over_an_axis_of_size_zero(mapped, implementation):
    matrix, _, right, left = make((96, 64), (32, 16), 0.4)
    arrays = {"data": matrix.data, "dense": right, "left": left[0].T, "right": right[:, :5].T}

    def call(array):
        given = {**arrays, mapped: array}
        if mapped in ("data", "dense"):
            return sparse_matmul(matrix.with_data(given["data"]), given["dense"], implementation=implementation)
        return sampled_matmul(given["left"], given["right"], matrix, implementation=implementation).data

    none = jnp.zeros((0, *arrays[mapped].shape))
    shape = (96, 23) if mapped in ("data", "dense") else matrix.data.shape
    assert jax.vmap(call)(none).shape == (0, *shape)
    assert jax.grad(lambda x: jax.vmap(call)(x).sum())(none).shape == none.shape
    assert jax.vmap(jax.grad(lambda x: call(x).sum()))(none).shape == none.shape


def test_types():
    matrix, dense, right, _ = make((64, 64), 16, 0.5)
    out = sparse_matmul(matrix.astype(jnp.bfloat16), right.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), dense @ np.asarray(right), atol=0.3, rtol=2e-2)
    wide = sparse_matmul(matrix.astype(jnp.bfloat16), right.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


def test_forms_and_back():
    matrix, dense, _, _ = make((96, 64), (32, 16), 0.5)
    array = dense.astype(np.float32)
    np.testing.assert_array_equal(BSR.from_dense(array, (32, 16)).to_dense(), array)
    np.testing.assert_array_equal(matrix.to_scipy().toarray(), np.asarray(matrix.to_dense()))
    again = BSR.from_scipy(matrix.to_scipy())
    np.testing.assert_array_equal(again.indices, matrix.indices)
    np.testing.assert_array_equal(again.to_dense(), matrix.to_dense())
    np.testing.assert_array_equal(matrix.to_jax().todense(), matrix.to_dense())
    np.testing.assert_array_equal(BSR.from_jax(matrix.to_jax(), (32, 16)).to_dense(), matrix.to_dense())
    ragged, full, _, _ = make((100, 70), (32, 16), 0.5)
    np.testing.assert_allclose(ragged.to_jax().todense(), full, rtol=1e-6)
    keep = np.zeros((3, 4), bool)
    keep[1, 2] = True
    kept = BSR.from_dense(np.ones((96, 64), np.float32), (32, 16), keep=keep)
    assert kept.entries == 1
    assert kept.density == pytest.approx(1 / 12)


def test_room_that_is_not_used_counts_for_nothing():
    matrix, dense, right, left = make((96, 64), (32, 16), 0.5)
    spare = np.full((5, 32, 16), np.nan, np.float32)
    wide = BSR(
        jnp.concatenate([matrix.data, spare]),
        matrix.indptr,
        np.concatenate([matrix.indices, np.full(5, -1, np.int32)]),
        matrix.shape,
    )
    want = dense @ np.asarray(right, np.float64)
    np.testing.assert_allclose(jax.jit(sparse_matmul)(wide, right), want, atol=2e-5)
    x = np.asarray(left, np.float64)
    np.testing.assert_allclose(jax.jit(sparse_matmul)(left, wide), x @ dense, atol=2e-5)
    np.testing.assert_array_equal(wide.to_dense(), matrix.to_dense())
    np.testing.assert_array_equal(jax.jit(lambda m: m.T.to_dense())(wide), matrix.to_dense().T)


def test_mistakes_are_named():
    matrix, _, right, _ = make((96, 64), (32, 16), 0.5)
    with pytest.raises(TypeError, match="one a BSR and the other an array"):
        sparse_matmul(right, right)
    with pytest.raises(ValueError, match=r"b must be \[64, N\]"):
        sparse_matmul(matrix, right[1:])
    with pytest.raises(ValueError, match=r"for a pattern of \(96, 64\)"):
        sampled_matmul(right, right.T, matrix)
    with pytest.raises(ValueError, match="indptr must have 4 numbers"):
        BSR(matrix.data, matrix.indptr[1:], matrix.indices, matrix.shape)


def test_implementations_are_chosen_and_refused():
    matrix, dense, right, _ = make((96, 64), (32, 16), 0.5)
    want = dense @ np.asarray(right, np.float64)
    for name in ("cpu", "xla"):
        np.testing.assert_allclose(sparse_matmul(matrix, right, implementation=name), want, atol=2e-5)
        blocks = sampled_matmul(want.astype(np.float32), right.T, matrix, implementation=name).to_dense()
        np.testing.assert_allclose(blocks, np.where(dense != 0, want @ np.asarray(right).T, 0), rtol=1e-4, atol=1e-3)
    wide = BSR.random(jax.random.key(0), (600, 600), 0.5, 300)
    with pytest.raises(UnsupportedError, match="Block sizes are at most 256, got 300"):
        sparse_matmul(wide, jnp.ones((600, 2)), implementation="cpu")
    with pytest.warns(FallbackWarning, match="jax_bsk.sparse_matmul uses its slower pure-JAX implementation"):
        sparse_matmul(wide, jnp.ones((600, 2)))
    with pytest.raises(UnsupportedError, match="cuda"):
        jax.jit(lambda: sparse_matmul(matrix, right, implementation="cuda"))()
    with pytest.raises(ValueError, match="implementation is one of"):
        sparse_matmul(matrix, right, implementation="tpu")  # pyright: ignore[reportArgumentType]


def test_lists_as_arguments_and_as_constants_give_the_same_bits():
    matrix, _, right, left = make((96, 64), (32, 16), 0.5)

    def pull(matrix, b, x):
        def products(data):
            return sparse_matmul(matrix.with_data(data), b), sparse_matmul(x, matrix.with_data(data))

        out, vjp = jax.vjp(products, matrix.data)
        return out, vjp(out)

    constants = jax.jit(lambda b, x: pull(matrix, b, x))(right, left)
    arguments = jax.jit(pull)(matrix.with_traced_lists(), right, left)
    lists = jnp.asarray(matrix.indptr), jnp.asarray(matrix.indices)
    bare = jax.jit(pull)(BSR(matrix.data, *lists, matrix.shape), right, left)
    for other in (arguments, bare):
        jax.tree.map(np.testing.assert_array_equal, other, constants)


def test_the_cuda_call_has_rows_of_whole_16_bytes():
    # What the copy engine asks for; sizes that have none are padded, and the result is cut.
    matrix = BSR.random(jax.random.key(0), (301, 499), 0.4, 64, dtype=jnp.bfloat16)
    right, left = jnp.ones((499, 77), jnp.bfloat16), jnp.ones((77, 301), jnp.bfloat16)

    def all_of_them(data, right, left):
        def products(data, right, left):
            here = matrix.with_data(data)
            return sparse_matmul(here, right), sparse_matmul(left, here)

        out, vjp = jax.vjp(products, data, right, left)
        return out, vjp(out)

    arguments = matrix.data, right, left
    exported = jax.export.export(jax.jit(all_of_them), platforms=["cuda"], disabled_checks=jax_bsk.export_checks())(
        *arguments
    )
    calls = [line for line in exported.mlir_module().splitlines() if "@jax_bsk_matmul_" in line]
    assert len(calls) == 6
    for line in calls:
        types = re.findall(r"tensor<([\dx]+)xbf16>", line.split(" : ")[-1])
        assert types
        assert all(int(shape.split("x")[-1]) % 8 == 0 for shape in types), line
    assert [x.shape for x in exported.out_avals[:2]] == [(301, 77), (77, 499)]


def test_a_column_is_a_row_of_the_cuda_call():
    # Eight columns, as the copy engine asks for, would be eight times the memory, and copies before and after.
    matrix = BSR.random(jax.random.key(0), (304, 496), 0.4, 64, dtype=jnp.bfloat16)
    products = {
        "tensor<1x304xbf16>": (lambda data, x: sparse_matmul(matrix.with_data(data), x), jnp.ones(496, jnp.bfloat16)),
        "tensor<1x496xbf16>": (lambda data, x: matrix.with_data(data).T @ x, jnp.ones((304, 1), jnp.bfloat16)),
    }
    for result, (product, x) in products.items():
        export = jax.export.export(jax.jit(product), platforms=["cuda"], disabled_checks=jax_bsk.export_checks())
        text = export(matrix.data, x).mlir_module()
        (call,) = [line for line in text.splitlines() if "@jax_bsk_matmul_product" in line]
        assert "dense_left = true" in call
        assert result in call.split("->")[-1]
        assert "stablehlo.pad" not in text


def test_export():
    matrix, dense, right, _ = make((96, 64), (32, 16), 0.5)
    exported = jax.export.export(jax.jit(sparse_matmul), disabled_checks=jax_bsk.export_checks())(matrix, right)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(matrix, right), dense @ np.asarray(right, np.float64), atol=2e-5)
