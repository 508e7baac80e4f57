"""benchmarks/few_columns.py on a CPU: that it runs, checks its results, and judges its goals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "few_columns.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_quick_run(script, tmp_path, capsys):
    path = tmp_path / "few.json"
    assert script["run"](["--quick", "--size", "256", "--columns", "1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [(case["form"], case["block"]) for case in result["cases"]] == [
        ("x W", 128), ("W x", 128), ("x W", 64), ("W x", 64)
    ]  # fmt: skip
    for case in result["cases"]:
        assert case["ok"]
        assert case["ratio_to_dense"] == pytest.approx(case["seconds"]["dense"] / case["seconds"]["jax_bsk"])
        assert case["share_of_copy"] == pytest.approx(
            case["stored_bytes"] / case["seconds"]["jax_bsk"] / result["copy_bytes_per_second"]
        )
    assert result["goals"] == {}  # of an H200
    assert "times dense" in capsys.readouterr().out


def test_wrong_results_are_told(script, monkeypatch):
    right = script["sparse_matmul"]
    monkeypatch.setitem(script["Products"].error.__globals__, "sparse_matmul", lambda a, b: right(a, b) * 1.01)
    products = script["Products"](script["Config"](256, 0.78, 64, "float32"), 1, 0)
    assert products.error(1, True) > 1e-3


def test_goals_are_of_an_h200(script):
    cases = [{"ratio_to_dense": 2.9, "share_of_copy": 0.8}, {"ratio_to_dense": 3.0, "share_of_copy": 0.69}]
    assert script["goals"](cases, "NVIDIA L4") == {}
    assert list(script["goals"](cases, "NVIDIA H200").values()) == ["met (2.90)", "missed (0.69)"]
