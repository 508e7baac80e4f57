"""benchmarks/decode.py on a CPU: that it runs, checks its results, and judges its goals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_a_quick_run(script, tmp_path, capsys):
    path = tmp_path / "decode.json"
    assert script["run"](["--quick", "--peers", "xla", "cudnn", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    names = [case["name"] for case in result["cases"]]
    assert names[:5] == ["1 x 64", "1 x 512", "3 x 128", "3 x 128, 4 queries", "3 x 64"]
    assert names[6:9] == ["3 x 128, pages of 16", "3 x 128, pages of 64", "3 x 128, 1 of 8 pages"]
    assert names[10:] == [
        "3 x 64 behind 128",
        "the same, read once",
        "prefill beside decoding",
        "decoding alone",
        "prefill alone",
    ]
    for case in result["cases"]:
        assert case["ok"]
        rate = case["cache_bytes"] / case["seconds"]
        assert case["share_of_copy"] == pytest.approx(rate / result["copy_bytes_per_second"])
        if case["peers"]:
            assert case["peers"]["xla"]["ok"]
            assert "NVIDIA GPU only" in case["peers"]["cudnn"]["refused"]
    assert result["cases"][7]["cache_bytes"] == 8 * result["cases"][8]["cache_bytes"] == 3 * 128 * 2 * 2 * 32 * 4
    assert result["goals"] == {}  # of an H200
    out = capsys.readouterr().out
    assert "cudnn: it is measured on an NVIDIA GPU only (1 x 64, " in out


def test_wrong_results_are_told(script):
    row = script["Paged"]("pages", script["QUICK"], (1, 3), (32, 64), page_size=16).row()
    assert script["error"](row, script["program"](row, 1)) < 1e-5
    assert script["error"](row, lambda x, caches: row.step(1.01 * x, caches[0])) > 1e-3


def test_goals_are_of_an_h200(script):
    names = ["1 x 1k", "1 x 32k", "8 x 8k", "8 x 8k, 4 queries", "32 x 4k", "64 x 8k", "256 x 2k"]
    names += ["64 x 8k, pages of 16", "64 x 8k, pages of 64", "64 x 8k, 64 of 512 pages"]
    names += [
        "64 x 8k, float8",
        "64 x 1k behind 8k",
        "the same, read once",
        "prefill beside decoding",
        "decoding alone",
        "prefill alone",
    ]
    rows = {name: {"seconds": 40e-6, "share_of_copy": 0.9} for name in names}
    assert script["goals"](rows, "NVIDIA L4") == {}
    words = [verdict.split()[0] for verdict in script["goals"](rows, "NVIDIA H200").values()]
    missed = {"1 x 1k: us <= 8", "64 of 512 pages over all <= 0.20", "float8 cache, bfloat16's time over its >= 1.7"}
    missed.add("shared prefix, time apart over read once >= 4")
    assert words == ["missed" if goal.text in missed else "met" for goal in script["GOALS"]]

    rows.pop("1 x 1k")
    assert script["goals"](rows, "NVIDIA H200")["1 x 1k: us <= 8"] == "open ('1 x 1k' was not measured)"
