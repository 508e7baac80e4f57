"""benchmarks/biases.py on a CPU: that it runs and checks its results."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "biases.py"


def test_it_runs_and_is_right(tmp_path):
    path = tmp_path / "biases.json"
    assert runpy.run_path(str(SCRIPT))["run"](["--quick", "--output", str(path)]) == 0
    found = {case["name"]: case for case in json.loads(path.read_text())["cases"]}
    assert {name for name, case in found.items() if "largest_error" in case} == {
        "causal",
        "alibi",
        "t5",
        "t5 and its table",
        "dense",
    }
