"""The benchmark of matrix products on a CPU: what it writes, that its check checks, that what fails is told."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk.__main__ import main
from jax_bsk.core import compat, dispatch
from jax_bsk.qa.benchmarking import contender, suite
from jax_bsk.qa.benchmarking.check import verdict
from jax_bsk.qa.benchmarking.matmul import cases, jax_products, operation
from jax_bsk.qa.benchmarking.matmul import references as check
from jax_bsk.qa.benchmarking.matmul.cases import Case, Config, Operation
from jax_bsk.qa.benchmarking.matmul.operands import Operands

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = Config(256, 0.78, 32, "float32")
NATIVE = "xla" if dispatch.unavailable("cpu") else "cpu"
OPTIONS = ["--implementation", NATIVE, "--quick", "--quiet", "--dtypes", SMALL.dtype, "--sizes", str(SMALL.size)]
OPTIONS += ["--blocks", str(SMALL.block), "--sparsities", str(SMALL.sparsity)]  # programs are compiled once
FORWARD = [*OPTIONS, "--operations", "forward", "--contenders", "jax_bsk", "dense"]


@pytest.fixture
def script(monkeypatch):
    """`benchmarks/matmul.py`, which is a script and no part of the package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("matmul")
    del sys.modules["matmul"]


@pytest.fixture(scope="module")
def operands():
    return Operands(SMALL, seed=0)


def measured(case: Case, operands: Operands, *names: str, rates: suite.Rates | None = None, **limits: float) -> dict:
    """The record of a case with these contenders."""
    products = operation.Products(NATIVE, lambda case: names)
    for name, value in limits.items():
        setattr(products, name, value)
    return suite.measure(products, case, operands, rates or suite.Rates(), rounds=1, seed=0)


def run(script, path, *options) -> tuple[int, dict]:
    with jax.numpy_dtype_promotion("standard"):
        status = script.run([*FORWARD, *options, "--output", str(path)])
    return status, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_quick_run(script, capsys, tmp_path):
    path = tmp_path / "new" / "matmul.json"
    peers = ["jax_bsk", "dense", "torch-bsr", "bcoo"]
    status, report = run(script, path, "--operations", "forward", "ddata", "--contenders", *peers)
    text = capsys.readouterr().out
    assert status == 0, text
    assert "WRONG" not in text
    assert "GFLOP/s" in text
    assert {"jax", "jax_bsk", "torch", "driver", "platform"} <= set(report["versions"])
    assert [case["operation"] for case in report["cases"]] == ["forward", "ddata"]
    for case in report["cases"]:
        assert (case["size"], case["sparsity"], case["block"]) == (256, 0.78, 32)
        assert case["density"] == case["stored_blocks"] / 64 == 14 / 64
        assert case["useful_flops"] == 2 * 256**3 * case["density"]
        dense = case["contenders"]["dense"]
        for name in ("jax_bsk", "dense", "bcoo"):
            record = case["contenders"][name]
            assert record["check"]["ok"]
            assert 0 < record["check"]["share_of_tolerance"] <= 1
            assert 0 < record["check"]["largest_error"] < 1e-4
            assert len(record["samples"]) == 2
            assert record["useful_flops_per_second"] == pytest.approx(case["useful_flops"] / record["seconds"])
            assert record["ratio_to_dense"] == pytest.approx(dense["seconds"] / record["seconds"])
        assert case["contenders"]["torch-bsr"] == {"refused": "it is measured on an NVIDIA GPU only"}
    lines = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    assert [line["contender"] for line in lines] == peers * 2
    assert float(lines[0]["seconds"]) == report["cases"][0]["contenders"]["jax_bsk"]["seconds"]
    assert lines[0]["ok"] == "True"
    assert lines[2]["reason"] in text


def test_every_operation_against_the_whole_product(operands):
    """References, and jax_bsk's and the dense results as contenders yield them, in all operations and types."""
    w, x, dy = (np.asarray(y, np.float64) for y in (operands.dense, operands.x, operands.dy))
    whole = {
        Operation.FORWARD: w @ x,
        Operation.LAYER: x @ w,
        Operation.DENSE_GRADIENT: w.T @ dy,
        Operation.DATA_GRADIENT: (dy @ x.T) * (w != 0),
    }
    np.testing.assert_array_equal(operands.matrix.to_dense(), operands.dense)
    assert operands.matrix.entries == SMALL.stored_blocks
    operands.matrix.check()
    spots = check.choose_spots(SMALL.size, 3)
    assert len(spots.rows) == len(spots.columns) == SMALL.size
    makers = operation.makers(NATIVE)
    for which in Operation:
        reference = check.make_reference(operands, which, spots)
        np.testing.assert_allclose(reference.values, whole[which][spots.rows][:, spots.columns], atol=1e-11)
        for name in ("jax_bsk-constant" if which is Operation.LAYER else "jax_bsk", "dense"):
            made = makers[name](Case(SMALL, which), operands)
            result = reference.check(*made.pick(made.once()[0], spots))
            assert result["ok"], (which, name, result)


def test_a_dense_product_of_random_numbers(operands):
    makers, names = operation.makers(NATIVE), ("dense", "dense-random")
    record = measured(Case(SMALL, Operation.LAYER), operands, *names)
    found = record["contenders"]["dense-random"]
    assert found["check"]["ok"]
    assert found["variant"] == "dense, random numbers"
    weights = operands.random_weights()
    assert (weights != 0).all()
    made = makers["dense-random"](Case(SMALL, Operation.LAYER), operands)
    np.testing.assert_allclose(made.once()[0], operands.x @ weights, atol=1e-4)
    other = check.make_reference(operands, Operation.LAYER, check.choose_spots(SMALL.size, 0))
    assert not other.check(*made.pick(made.once()[0], other.spots))["ok"]
    record = measured(Case(SMALL, Operation.DATA_GRADIENT), operands, *names)
    assert "random numbers" in record["contenders"]["dense-random"]["refused"]


def test_spots_meet_every_tile():
    spots = check.choose_spots(32768, 0)
    for places in (spots.rows, spots.columns):
        assert places[0] == 0
        assert places[-1] == 32767
        np.testing.assert_array_equal(places // 128, np.arange(256))


def test_chained_calls(operands):
    case = Case(SMALL, Operation.LAYER, calls=3)
    made = operation.makers(NATIVE)["jax_bsk"](case, operands)
    w, x = np.asarray(operands.dense, np.float64), np.asarray(operands.x, np.float64)
    np.testing.assert_allclose(made.dispatch(0), x @ w @ w @ w, atol=1e-4)
    np.testing.assert_allclose(made.once()[0], x @ w, atol=1e-4)
    assert made.calls == 3


@pytest.mark.parametrize("wrong", ["nan", "a block", "raises"])
def test_wrong_results_are_told(wrong, script, monkeypatch, capsys, tmp_path):
    right = jax_products.sparse_matmul

    def sparse_matmul(a, b, **options):
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        if wrong == "a block":
            return right(a.with_data(a.data.at[7].set(0)), b, **options)
        return right(a, b, **options).at[77, 3].set(jnp.nan)

    monkeypatch.setattr(jax_products, "sparse_matmul", sparse_matmul)
    status, report = run(script, tmp_path / "matmul.json")
    assert status == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert ("no such kernel" in text) == (wrong == "raises")
    (case,) = report["cases"]
    assert not case["ok"]
    assert "seconds" not in case["contenders"]["jax_bsk"]
    assert "seconds" in case["contenders"]["dense"]


@pytest.mark.parametrize(("tolerances", "timed"), [(3, True), (30, False)])
def test_an_inexact_peer_is_timed_and_told(tolerances, timed, script, monkeypatch, capsys, tmp_path):
    right = jax_products.dense

    def dense(operands):
        made = right(operands)
        x, w = (np.asarray(array, np.float64) for array in (operands.x, operands.dense))
        off = tolerances * float(check.tolerance_of((w @ x)[77:78], np.dtype(np.float32))[0])
        left = lambda *operands: made.left(*operands).at[77, 3].add(off)  # noqa: E731
        return dataclasses.replace(made, left=left, shared=False)

    monkeypatch.setattr(jax_products, "dense", dense)
    status, report = run(script, tmp_path / "matmul.json")
    assert status == 1
    record = report["cases"][0]["contenders"]["dense"]
    assert not record["check"]["ok"]
    assert ("seconds" in record) == ("inexact" in record) == timed
    text = capsys.readouterr().out
    assert "WRONG: dense" in text
    assert ("x INEXACT" in text) == timed


def test_a_sum_in_the_type_of_the_operands_is_wrong():
    dtype = np.dtype(jnp.bfloat16)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(dtype) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    tolerance = check.tolerance_of(exact, dtype)
    right = (a.astype(np.float32) @ b.astype(np.float32)).astype(dtype)
    assert verdict(right.astype(np.float64), exact, tolerance, finite=True)["ok"]
    summed = np.zeros((256, 256), dtype)
    for i in range(256):
        summed = summed + a[:, i, None] * b[i]
    assert summed.dtype == dtype
    assert not verdict(summed.astype(np.float64), exact, tolerance, finite=True)["ok"]


def test_a_failing_peer_is_told_with_its_reason(script, monkeypatch, capsys, tmp_path):
    def dense(operands):
        raise ValueError("no such type\nand a page of text")

    monkeypatch.setattr(jax_products, "dense", dense)
    status, report = run(script, tmp_path / "matmul.json")
    assert status == 0
    assert report["cases"][0]["contenders"]["dense"] == {"refused": "ValueError: no such type"}
    assert "ratio_to_dense" not in report["cases"][0]["contenders"]["jax_bsk"]
    assert "Not measured: dense (forward 256 sparsity 0.78 block 32 float32): ValueError" in capsys.readouterr().out


def test_warnings_are_in_the_report(script, monkeypatch, capsys, tmp_path):
    right = jax_products.sparse_matmul

    def sparse_matmul(a, b, **options):
        warnings.warn("a slower implementation", stacklevel=2)
        return right(a, b, **options)

    monkeypatch.setattr(jax_products, "sparse_matmul", sparse_matmul)
    status, report = run(script, tmp_path / "matmul.json")
    assert status == 0
    assert report["cases"][0]["contenders"]["jax_bsk"]["notes"] == ["UserWarning: a slower implementation"]
    assert "Note: jax_bsk (forward 256" in capsys.readouterr().out


def test_slow_calls_are_measured_once_or_left_out(operands):
    rates, limits = suite.Rates(), {"slow_seconds": 0.0, "most_seconds": 1e-9}
    case = Case(SMALL, Operation.FORWARD)
    first, second = (measured(case, operands, "dense", rates=rates, **limits)["contenders"]["dense"] for _ in range(2))
    assert len(first["samples"]) == first["calls_per_sample"] == 1
    assert "would take" in second["refused"]


def test_memory_is_estimated_first(operands, monkeypatch):
    monkeypatch.setattr(contender, "MOST_SCRATCH", {"cpu": 1000, "gpu": 1000})
    record = measured(Case(SMALL, Operation.FORWARD), operands, "bcoo")
    assert "scratch memory" in record["contenders"]["bcoo"]["refused"]


def test_what_was_measured_is_kept(script, monkeypatch, tmp_path):
    path = tmp_path / "matmul.json"

    def interrupted(products, case, *args, **kwargs):
        if case.config.size == 128:
            raise KeyboardInterrupt
        return {"name": case.name, "size": case.config.size, "contenders": {}, "ok": True}

    monkeypatch.setattr(suite, "measure", interrupted)
    monkeypatch.setattr(operation, "Operands", lambda config, seed: argparse.Namespace(config=config))
    with pytest.raises(KeyboardInterrupt):
        run(script, path, "--sizes", "64", "128")
    assert [case["size"] for case in json.loads(path.read_text())["cases"]] == [64]
    assert path.with_suffix(".csv").exists()


def test_a_case_without_operands_and_a_budget(script, monkeypatch, capsys, tmp_path):
    def no_memory(config, seed):
        raise MemoryError("no memory")

    monkeypatch.setattr(operation, "Operands", no_memory)
    status, report = run(script, tmp_path / "matmul.json")
    assert status == 1
    assert "no memory" in report["cases"][0]["contenders"]["jax_bsk"]["failed"]
    status, report = run(script, tmp_path / "matmul.json", "--budget", "1e-9")
    assert status == 0
    assert report["cases"] == []
    assert "forward 256" in report["not_measured"][0]
    assert "--budget is spent" in capsys.readouterr().out


def test_the_cases_of_a_gpu():
    names = [case.name for case in cases.GPU.cases()]
    assert len(names) == len(set(names)) == 4 * 4 * 2 + 3 * 4 * 2
    assert all(case.calls == (10 if case.config.size == 4096 else 1) for case in cases.GPU.cases())
    assert [case.calls for case in cases.GPU_QUICK.cases()] == [10, 10, 10, 1]
    assert Config(8192, 0.78, 128, "bfloat16").density == pytest.approx(0.22, abs=1e-4)


def test_the_command_line(capsys):
    assert main(["bench-matmul", "--quick", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == 8
    if compat.default_platform() == "cpu":
        assert {tuple(name.split()[1:]) for name in names} == {
            ("1024", "sparsity", sparsity, "block", "64", "float32") for sparsity in ("0.5", "0.9")
        }
    assert main(["bench-matmul", "--sizes", "100", "--blocks", "64"]) == 2
    assert "multiples" in capsys.readouterr().err


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from jax_bsk.qa.benchmarking import plots

    record = {"seconds": 1.0, "useful_flops_per_second": 4e14}
    found = {"jax_bsk": record, "dense": record, "bcoo": {"refused": "no memory"}}
    common = {"operation": "forward", "dtype": "bfloat16", "block": 128, "contenders": found}
    report = {
        "devices": [{"platform": "cuda", "name": "NVIDIA H200"}],
        "cases": [common | {"size": size, "density": density} for size in (4096, 8192) for density in (0.1, 0.5)],
    }
    (path,) = plots.plot(report, tmp_path / "new")
    assert path.name == "matmul-forward-bfloat16-128.png"
    assert path.read_bytes().startswith(b"\x89PNG")
