"""benchmarks/selection.py on a CPU: that it runs, checks its results, and judges its goals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "selection.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_quick_run(script, tmp_path, capsys):
    path = tmp_path / "selection.json"
    assert script["run"](["--quick", "--quiet", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    seconds = {name: record["seconds"] for name, record in result["contenders"].items()}
    assert all(value > 0 for value in seconds.values())
    assert result["ratios"]["sparsek: speed over dense, training"] == pytest.approx(
        seconds["dense causal: training"] / seconds["sparsek: training"]
    )
    assert result["ratios"]["from_topk: share of the forward"] == pytest.approx(
        seconds["from_topk: lists and transpose"] / seconds["attention: forward"]
    )
    assert result["goals"] == {}  # of an H200
    assert set(result["largest_error_at_2048_float32"]) == {"moba", "sparsek"}
    assert "sparsek: training" in capsys.readouterr().out


def test_wrong_results_are_told(script, monkeypatch):
    import jax_bsk

    right = jax_bsk.sparse_attention
    off = lambda *args, implementation=None, **more: (  # noqa: E731
        right(*args, implementation=implementation, **more) * (1 if implementation == "xla" else 1.01)
    )
    monkeypatch.setattr(jax_bsk, "sparse_attention", off)
    errors = script["check"](script["QUICK_SIZES"], 0)
    assert errors["moba"] > 2e-4 > errors["sparsek"]


def test_goals_are_of_an_h200(script):
    found = {"from_topk: share of the forward": 0.14, "sparsek: speed over dense, training": 4.9}
    assert script["goals"](found, "NVIDIA L4") == {}
    assert list(script["goals"](found, "NVIDIA H200").values()) == ["met", "missed"]
