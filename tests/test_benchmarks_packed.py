"""benchmarks/packed.py on a CPU: that it runs, checks its results, and judges its goals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "packed.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_quick_run(script, tmp_path, capsys):
    path = tmp_path / "packed.json"
    assert script["run"](["--quick", "--quiet", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    seconds = {name: record["seconds"] for name, record in result["contenders"].items()}
    assert all(value > 0 for value in seconds.values())
    assert result["ratios"]["speed over prebuilt lists, forward"] == pytest.approx(
        seconds["prebuilt: forward"] / seconds["packed_attention: forward"]
    )
    assert sum(result["documents"]) == script["QUICK_SIZES"]["tokens"]
    assert result["goals"] == {}  # of an H200
    assert result["refused"] == {"FlexAttention": "it is measured on an NVIDIA GPU only"}
    assert "packed_attention: training" in capsys.readouterr().out


def test_documents_fill_the_tokens(script):
    lengths = np.diff(script["documents"](script["SIZES"], 0))
    assert lengths.sum() == 32_768
    assert lengths.max() <= 8192
    assert script["pairs"](np.array([0, 2, 5])) == 3 + 6


def test_goals_are_of_an_h200(script):
    found = {
        "lists: share of the forward": 0.1,
        "speed over prebuilt lists, forward": 0.93,
        "speed over FlexAttention, training": 1.1,
    }
    assert script["goals"](found, "NVIDIA L4") == {}
    assert list(script["goals"](found, "NVIDIA H200").values()) == ["met", "missed"]
