"""The committed report of an H200, and that the README and the site say what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jax_bsk.qa.validation import report
from jax_bsk.qa.validation.outcome import StageResult, Verdict
from jax_bsk.qa.validation.settings import STAGES, Level, Settings
from tools import draw_speed, figures

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "reports" / "h200"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((FOLDER / "report.json").read_text(), parse_constant=pytest.fail)


def test_pages_have_the_reports_figures(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().err


def test_figures_that_drifted_are_found():
    text = (ROOT / "README.md").read_text()
    drifted, count = re.subn(r"\d+ TFLOP/s \|", "999 TFLOP/s |", text, count=1)
    assert count == 1
    assert figures.written(drifted) == text
    with pytest.raises(KeyError):
        figures.written("<!-- figures: nothing -->\n<!-- end of figures -->")


def test_a_report_of_before_the_products_were_measured(committed, monkeypatch):
    data = committed["stages"]["benchmark"]["data"]
    if "matmul" not in data:
        assert figures.matmul() == "not in this report"
    one = {"seconds": 3e-4, "useful_flops_per_second": 6.7e14}
    config = {"operation": "forward", "size": 8192, "sparsity": 0.78, "block": 128, "dtype": "bfloat16"}
    goal = {"case": "a case", "measure": "useful TFLOP/s", "least": 650, "measured": 600.0, "verdict": "missed"}
    later = {"cases": [config | {"contenders": {"jax_bsk": one, "dense": {"seconds": 1.2e-3}}}], "goals": [goal]}
    monkeypatch.setattr(figures, "benchmark", lambda: data | {"matmul": later})
    text = figures.matmul()
    assert "| 0.3 ms | 670 | 0.88 | 4.00x | - | - | - |" in text
    assert text.endswith("Of 1 goals: 1 missed. Not met: a case: useful TFLOP/s >= 650.")


def test_products_of_few_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.few_columns() == "not measured yet"
    case = {"form": "x W", "block": 128, "columns": 8, "seconds": {"jax_bsk": 1.25e-5, "dense": 3.5e-5}}
    case |= {"stored_bytes_per_second": 2.36e12, "share_of_copy": 0.72, "ratio_to_dense": 2.8}
    result = {"cases": [case], "goals": {"speed over dense >= 2.8": "met (2.80)"}}
    (tmp_path / "few-columns-nvidia-h200.json").write_text(json.dumps(result))
    text = figures.few_columns()
    assert "| Y = X W | 128 | 8 | 12.5 us | 2.36 TB/s | 0.72 | 2.80x |" in text
    assert text.endswith("Goal, speed over dense >= 2.8: met (2.80).")


def test_a_sequence_over_two_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.context() == "not measured yet"
    layout = {"forward_efficiency": 0.954, "both_efficiency": 0.97, "received_bytes": [0, 54e6]}
    case = {
        "case": "causal",
        "shape": [1, 16, 16, 131072, 128],
        "one": {"forward_ms": 40.0, "both_ms": 160.0},
        "contiguous": {"forward_ms": 30.0, "both_ms": 120.0, **layout},
        "plan": {"forward_ms": 20.96, "both_ms": 82.47, **layout},
    }
    short = case | {"shape": [1, 32, 4, 32768, 128]}
    written = {"cases": [case, short], "note": "As it was."}
    (tmp_path / "context-nvidia-h200-x2.json").write_text(json.dumps(written))
    row = "| causal | 40.00 / 160.00 ms | 30.00 / 120.00 ms | 95 / 97 % | 20.96 / 82.47 ms | 95 / 97 % | 54 / 54 |"
    assert figures.context().splitlines()[2:] == [row, row.replace("causal", "causal, 32,768 tokens"), "", "As it was."]


def test_pictures_of_the_site_are_those_of_the_report():
    for name, copy in draw_speed.COPIES.items():
        assert (draw_speed.IMAGES / copy).read_bytes() == (FOLDER / name).read_bytes(), "run python tools/draw_speed.py"


def test_the_verdict_follows_from_the_stages(committed):
    facts = committed["provenance"]
    stages = {
        name: StageResult.from_json({**stage, "stage": name, "provenance": facts})
        for name, stage in committed["stages"].items()
    }
    assert list(stages) == [name for name in STAGES if name != "report"]
    again = report.assemble(Settings(Path("unused"), Level(committed["settings"]["level"])), stages)
    # Of which code each stage is, a report does not keep: it only says where they differ.
    different = "the stages are of different code or machines"
    assert again["reasons"] == [reason for reason in committed["reasons"] if reason != different]
    assert committed["verdict"] == ("not cleared" if different in committed["reasons"] else again["verdict"])
    for name, stage in committed["stages"].items():
        assert Verdict(stage["verdict"]) is stages[name].verdict, name


def test_what_a_full_report_of_a_gpu_has(committed):
    assert committed["schema"] == report.SCHEMA
    assert committed["settings"]["level"] == "full"
    facts = committed["provenance"]
    assert facts["platform"] == "cuda"
    assert facts["library_tree"] == facts["csrc_tree"]
    numbers = committed["stages"]["validate"]["data"]
    assert numbers["forward_cases"] >= 3000
    assert numbers["backward_cases"] >= 1500
    harden = committed["stages"]["harden"]["data"]
    assert all(row["caught"] for row in harden["seeded bugs"])
    assert len(harden["seeded bugs"]) >= 12
    assert {tool for tool, found in harden["sanitizers"].items() if not found["failed"]} == {
        "memcheck",
        "racecheck",
        "synccheck",
        "initcheck",
    }


def test_every_picture_and_table_is_there(committed):
    text = (FOLDER / "report.md").read_text()
    for name in re.findall(r"\(([a-z-]+\.png)\)", text):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG"), name
    for name in ("numerics.csv", "benchmark.csv", "kernels.csv"):
        assert f"`{name}`" in text
        assert (FOLDER / name).read_text().count("\n") > 50
    assert committed["provenance"]["csrc_tree"] in text
