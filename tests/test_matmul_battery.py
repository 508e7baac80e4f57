"""The numeric battery of the block-sparse products: what runs here against float64, by the rule of plain products.

`pytest tests/test_matmul_battery.py --cases 2000 --seed 1000` runs more; a failure prints the command that repeats it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk.core import dispatch
from jax_bsk.qa.testing import steady, tolerance, worker
from jax_bsk.qa.testing.judgement import Mismatch
from jax_bsk.qa.testing.matmul import battery, cases
from jax_bsk.qa.testing.matmul.oracle import oracle

# Programs are compiled for each, so the slower "xla", which has its own tests, gets some; gradients are of some, too.
NAMES = list(cases.CORNER_CASES)
SOME = {
    "no-rows",
    "vmap-dense-left",
    "tails-left",
    "vmap-everything",
    "id-too-large",
    "offsets-decrease",
    "no-blocks-sampled",
}
WITH_GRADIENTS = {"tails-sampled", "carried-lists", "no-columns", "float32"}


@pytest.fixture
def runs(implementation):
    if reasons := dispatch.unavailable(implementation):
        pytest.skip(" ".join(reasons))
    return implementation


@pytest.mark.parametrize("name", NAMES)
def test_corner(name, runs):
    if runs == "xla" and name not in SOME:
        pytest.skip("some of them")
    battery.run_case(cases.CORNER_CASES[name], runs, gradients=name in WITH_GRADIENTS)


def test_random(random_seed, runs):
    every = {"cpu": 16, "xla": 40}[runs]
    if random_seed % every:
        pytest.skip(f"every {every}th seed")
    battery.run_case(cases.random_case(random_seed, runs), runs)


def test_float64(runs):
    case = dataclasses.replace(cases.CORNER_CASES["float32"], dtype="float64")
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        battery.run_case(case, runs, gradients=False)


# ---- That the battery judges


@pytest.mark.parametrize("wrong", ["a block", "bfloat16 sums", "tf32", "a NaN less", "other bits"])
def test_what_is_wrong_is_found(wrong, monkeypatch):
    case = cases.Case("x", dtype="float32", rows=200, columns=500, pattern="full", width=40)
    if wrong == "a NaN less":
        case = dataclasses.replace(case, fault="id too large")
    right, calls = battery.sparse_matmul, []

    def sparse_matmul(matrix, dense, **options):
        calls.append(1)
        if wrong == "a block":
            matrix = matrix.with_data(matrix.data.at[2].set(0))
        if wrong == "tf32":
            dense = jax.lax.reduce_precision(dense, 8, 10)
        out = right(matrix, dense, **options)
        if wrong == "bfloat16 sums":
            out = jax.lax.reduce_precision(out, 8, 7)
        if wrong == "a NaN less":
            out = jnp.nan_to_num(out)
        if wrong == "other bits":
            rng = jax.pure_callback(
                lambda: np.float32(len(calls.append(1) or calls)), jax.ShapeDtypeStruct((), "float32")
            )
            out = out.at[0, 0].multiply(1 + jnp.float32(1e-7) * rng)
        return out

    battery._kept.cache_clear()
    monkeypatch.setattr(battery, "sparse_matmul", sparse_matmul)
    with pytest.raises(Mismatch, match=r"python -m jax_bsk.qa.testing matmul --case x --implementation xla"):
        battery.run_case(case, "xla", gradients=False)
    battery._kept.cache_clear()


def test_the_oracle_is_the_dense_product():
    case = cases.CORNER_CASES["tails-left"]
    inputs = cases.make_inputs(case)
    dense = np.zeros(case.shape)
    indptr, indices = inputs.operands["lists"]
    for row in range(case.grid[0]):
        for entry in range(indptr[row], indptr[row + 1]):
            top, left = row * case.block_rows, indices[entry] * case.block_columns
            part = dense[top : top + case.block_rows, left : left + case.block_columns]
            part[:] = inputs.operands["data"][entry, : part.shape[0], : part.shape[1]]
    x, dy = inputs.operands["dense"].astype(float), inputs.cotangent[0].astype(float)
    found = oracle(case, inputs, gradients=True)
    np.testing.assert_allclose(found["out"].value[0], x @ dense, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["ddense"].value[0], dy @ dense.T, rtol=1e-12, atol=1e-12)
    assert np.isnan(inputs.operands["data"][indptr[-1] :].astype(float)).all()
    assert (found["out"].terms[0] == (dense != 0).sum(0)).all()


def test_the_rule_of_plain_products():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 512)), rng.standard_normal((512, 64))
    exact, magnitude, terms = a @ b, np.abs(a) @ np.abs(b), np.full((1, 64), 512)

    def judge(x):
        return tolerance.compare_product("x", x, exact, magnitude, terms, summed_in=np.float32)

    assert judge(exact.astype(np.float32)).ok
    assert judge(exact.astype(jnp.bfloat16)).ok
    assert not judge((exact * (1 + 2**-7)).astype(jnp.bfloat16)).ok
    assert not judge(exact.astype(jnp.bfloat16).astype(np.float32)).ok
    shifted = exact.astype(np.float32)
    shifted[3, 4] += 1e-3
    assert judge(shifted).worst_index == (3, 4)
    assert not judge(shifted).ok
    nothing = tolerance.compare_product("x", np.array([[1e-9]], np.float32), *np.zeros((3, 1, 1)), summed_in=np.float32)
    assert not nothing.ok


def test_tasks_of_workers():
    records = list(worker.judge("matmul:id-too-large", "xla", gradients=True))
    assert [(record["ok"], record["gradients"]) for record in records] == [(True, False)]
    (record,) = worker.judge("matmul:float32", "cuda", gradients=False)
    assert "refused" in record
    command = worker.repro("matmul:7", 3, "cuda", gradients=False)
    case = "python -m jax_bsk.qa.testing matmul --seed 7 --draw 3 --implementation cuda --no-gradients"
    assert command == f"{case} --multiprocessors 3"
    assert worker.repro("matmul:7", 3, "cpu", gradients=False) == case.replace("cuda", "cpu")


def test_a_case_alone():
    command = [sys.executable, "-m", "jax_bsk.qa.testing", "matmul", "--case", "no-blocks", "--no-gradients"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("out    ok")


def test_what_a_gpu_gets_is_what_its_kernels_take():
    for seed in range(200):
        case = cases.random_case(seed, "cuda")
        assert case.dtype in ("bfloat16", "float16")
        assert {*case.block_size} <= {64, 128}
        again = cases.redraw(case, 3)
        assert (again.shape, again.mapped, again.lists) == (case.shape, case.mapped, case.lists)


def test_repeats():
    native = "xla" if dispatch.unavailable("cpu") else "cpu"
    assert steady.repeats_are_equal(steady.PRODUCTS["cpu"]["32-empty-rows"], native, 3)
