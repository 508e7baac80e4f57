"""The benchmarks on a CPU: what they write, that their figures agree with each other, that their checks check."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk.core import dispatch
from jax_bsk.qa.benchmarking.attention import cases, goals, ours, passes
from jax_bsk.qa.benchmarking.attention.peers import jax_nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NATIVE = "xla" if dispatch.unavailable("cpu") else "cpu"


@pytest.fixture
def script(monkeypatch):
    """`benchmarks/attention.py`, which is a script and no part of the package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("attention")
    del sys.modules["attention"]


def test_a_run_on_a_cpu(tmp_path):
    path = tmp_path / "new" / "forward.json"
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--quick", "--implementation", NATIVE]
    command += ["--output", str(path), "--quiet"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WRONG" not in result.stdout
    assert "GFLOP/s" in result.stdout
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {"jax", "jax_bsk", "torch", "driver", "platform"} <= set(report["versions"])
    assert report["options"]["rounds"] == 2
    cases = {case["name"]: case for case in report["cases"]}
    assert {case["pattern"] for case in cases.values()} == {"random", "causal", "dense", "window", "documents"}
    for case in cases.values():
        assert case["name"] in result.stdout
        mine, peer = case["jax_bsk"], case["peers"]["xla"]
        sizes = case["batch"] * case["heads"] * case["length"] ** 2 * case["head_dim"]
        assert case["useful_flops"] == pytest.approx(4 * sizes * case["density"])
        assert mine["useful_flops_per_second"] == pytest.approx(case["useful_flops"] / mine["seconds"])
        assert peer["ratio"] == pytest.approx(peer["seconds"] / mine["seconds"])
        assert len(mine["samples"]) == 2
        assert mine["check"]["ok"]
        assert peer["check"]["ok"]
        assert 0 < mine["check"]["share_of_tolerance"] <= 1
        assert case["peers"]["flex"]["refused"]
        assert case["goal"] is None  # a CPU has none
    assert cases["B1 H2 S512 D32 causal"]["density"] == pytest.approx(513 / 1024)
    chained = cases["B1 H2 S256 D32 half of 64-blocks"]
    assert chained["chained_calls"] == 3
    assert chained["density"] == 0.5


def test_densities_are_those_of_the_predicates():
    for case in cases.cpu_cases(1):
        positions = np.arange(case.length)
        dense = case.pattern.attends(positions[:, None], positions, case.length)
        assert case.density == pytest.approx(dense.mean()), case.name
        np.testing.assert_array_equal(case.mask.to_dense()[0, 0], dense)


def test_the_gpu_table():
    table = {case.name: case for case in cases.gpu_cases(0)}
    assert set(goals.GOALS[passes.Pass.FORWARD]) <= set(table)
    for name, density in {
        "B4 H32 S8192 D128 random .22": 0.237,
        "B4 H32 S8192 D128 random .10": 0.118,
        "B4 H32 S8192 D128 random .03": 0.047,
        "B1 H16 S32768 D128 random .22": 0.221,
        "B16 H96 S4096 D128 random .23": 0.257,
        "B16 H96 S4096 D128 random .10": 0.129,
        "B4 H32 S8192 D64 random .22": 0.237,
        "B1 H8 S512 D64 half of 64-blocks": 0.5,
        "B4 H32 S8192 D128 documents, mask in jit": 0.0625,
    }.items():
        assert table[name].density == pytest.approx(density, abs=1e-3), name
    blocks = table["B4 H32 S8192 D128 random .03"].pattern.blocks
    assert blocks is not None
    assert blocks.diagonal().all()
    again = next(case for case in cases.gpu_cases(0) if case.name == "B4 H32 S8192 D128 random .03")
    np.testing.assert_array_equal(again.pattern.blocks, blocks)


def test_short_sequences_and_small_blocks():
    short = cases.short(0)
    assert len({case.name for case in short}) == len(short) >= 16
    assert all(case.length <= 2048 or case.block_size == 64 for case in short)
    assert {"B16 H32 S512 D64 half of 64-blocks", "B16 H96 S512 D64 dense"} <= {case.name for case in short}


@pytest.mark.parametrize("wrong", ["nan", "mask", "a head", "raises"])
def test_wrong_results_are_told(wrong, script, monkeypatch, capsys, tmp_path):
    right = ours.sparse_attention

    def sparse_attention(query, key, value, *, mask, implementation):
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        out = right(query, key, value, mask=None if wrong == "mask" else mask, implementation=implementation)
        if wrong == "nan":
            return out.at[0, 77, 1, 3].set(jnp.nan)  # no row that the check looks at: it must be found all the same
        return out.at[:, :, 1].add(1e-3) if wrong == "a head" else out

    monkeypatch.setattr(ours, "sparse_attention", sparse_attention)
    path = tmp_path / "forward.json"
    options = ["--only", "causal", "--no-peers", "--quick", "--quiet", "--implementation", NATIVE]
    with jax.numpy_dtype_promotion("standard"):
        assert script.run([*options, "--output", str(path)]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert ("no such kernel" in text) == (wrong == "raises")
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert all(not case["ok"] and "seconds" not in case["jax_bsk"] for case in report["cases"])


def test_a_wrong_peer_is_told(script, monkeypatch, capsys):
    monkeypatch.setattr(jax_nn, "native", lambda case: {})  # computes everything, whatever the mask
    assert script.run(["--only", "S512 D32 causal", "--quick", "--quiet", "--implementation", NATIVE]) == 1
    assert "WRONG: xla, B1 H2 S512 D32 causal" in capsys.readouterr().out


@pytest.mark.parametrize(("which", "factor"), [("backward", 10), ("training", 14)])
def test_the_passes_with_gradients(which, factor, script, capsys, tmp_path):
    path = tmp_path / f"{which}.json"
    options = ["--pass", which, "--only", "S256", "--quick", "--quiet", "--implementation", NATIVE]
    assert script.run([*options, "--output", str(path)]) == 0
    assert "WRONG" not in capsys.readouterr().out
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["pass"] == which
    assert f"Useful FLOPs: {factor} B H S^2 D" in report["method"]
    grouped, chained = report["cases"]
    assert (grouped["heads"], grouped["kv_heads"]) == (4, 2)
    assert chained["chained_calls"] == 3
    names = {"dquery", "dkey", "dvalue"} | ({"out"} if which == "training" else set())
    for case in (grouped, chained):
        sizes = case["batch"] * case["heads"] * case["length"] ** 2 * case["head_dim"]
        assert case["useful_flops"] == pytest.approx(factor * sizes * case["density"])
        for record in (case["jax_bsk"], case["peers"]["xla"]):
            assert set(record["check"]["results"]) == names
            assert 0 < record["check"]["share_of_tolerance"] <= 1
            assert record["seconds"] > 0


@pytest.mark.parametrize("wrong", ["dquery", "dkey", "dvalue"])
def test_wrong_gradients_are_told(wrong, script, monkeypatch, capsys, tmp_path):
    right = ours.sparse_attention

    def sparse_attention(query, key, value, *, mask, implementation):
        def off(x, name):  # x itself, with a gradient that is 1.01 of what it should be
            return x + jnp.asarray(0.01, x.dtype) * (x - jax.lax.stop_gradient(x)) if wrong == name else x

        inputs = off(query, "dquery"), off(key, "dkey"), off(value, "dvalue")
        return right(*inputs, mask=mask, implementation=implementation)

    monkeypatch.setattr(ours, "sparse_attention", sparse_attention)
    path = tmp_path / "backward.json"
    options = ["--pass", "backward", "--only", "causal", "--no-peers", "--quick", "--quiet", "--implementation", NATIVE]
    assert script.run([*options, "--output", str(path)]) == 1
    assert "WRONG" in capsys.readouterr().out
    (case,) = json.loads(path.read_text(), parse_constant=pytest.fail)["cases"]
    told = {name for name, check in case["jax_bsk"]["check"]["results"].items() if not check["ok"]}
    assert told == {wrong}


def test_the_gpu_table_of_the_gradients():
    which = passes.Pass
    table = {case.name: case for case in cases.table(which.BACKWARD, 0, on_gpu=True)}
    assert set(goals.GOALS[which.BACKWARD]) <= set(table)
    for name, density in {
        "B4 H32 S8192 D128 random .50": 0.515,
        "B4 H32 S8192 D128 random .22": 0.237,
        "B4 H32 S8192 D128 random .10": 0.118,
        "B4 H32 S8192 D128 random .03": 0.047,
        "B4 H32/8 S8192 D128 random .22": 0.237,
        "B1 H16 S32768 D128 random .03": 0.034,
        "B2 H16 S8192 D256 random .22": 0.237,
    }.items():
        assert table[name].density == pytest.approx(density, abs=1e-3), name
    forward = {case.name: case for case in cases.table(which.FORWARD, 0, on_gpu=True)}
    for name in table.keys() & forward.keys():  # the same masks, so that the passes can be compared
        assert table[name].density == forward[name].density, name
        assert table[name].useful_flops == pytest.approx(2.5 * forward[name].useful_flops)


def test_a_training_step_on_a_cpu(tmp_path):
    pytest.importorskip("flax")
    path = tmp_path / "new" / "training.json"
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--output", str(path)]
    for name, value in {"length": 128, "layers": 1, "width": 32, "heads": 2, "vocabulary": 64, "steps": 2}.items():
        command += [f"--{name}", str(value)]
    command += ["--dtype", "float32", "--remat", "--implementation", "jax_bsk", "xla-mask", "cudnn-mask"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    mine, peer = report["contenders"]["jax_bsk"], report["contenders"]["xla-mask"]
    assert mine["ran"] == ("xla" if NATIVE == "xla" else "kernels")
    assert peer["agrees"]
    assert len(mine["losses"]) == len(peer["losses"]) == report["config"]["warm_up"] + 2
    assert mine["tokens_per_second"] == pytest.approx(128 / mine["seconds"])
    program = mine["program_bytes"]
    assert program["total"] == program["argument"] + program["output"] - program["alias"] + program["temp"]
    assert report["contenders"]["cudnn-mask"]["failed"]
    assert "Not measured: cudnn-mask" in result.stdout


def test_goals_are_judged_on_an_h200_only():
    name = "B4 H32 S8192 D128 random .22"

    def verdict(rate: float, ratio: float | None, device: str = "NVIDIA H200") -> str | None:
        flex = {"refused": "torch is not installed"} if ratio is None else {"ratio": ratio}
        record = {"name": name, "jax_bsk": {"seconds": 1.0, "useful_flops_per_second": rate}, "peers": {"flex": flex}}
        goals.judge(record, device)
        return record["verdict"]

    assert verdict(621e12, 1.6) == "met"
    assert verdict(619e12, 1.6) == "missed"
    assert verdict(621e12, 1.5) == "missed"
    assert verdict(621e12, None) == "open"
    assert verdict(619e12, None) == "missed"
    assert verdict(621e12, 1.6, "NVIDIA A100") is None


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from jax_bsk.qa.benchmarking import plots

    record = {"seconds": 1.0, "useful_flops_per_second": 4e14, "variant": "block mask"}
    common = {"jax_bsk": record, "peers": {"flex": record}, "pattern": "random", "length": 8192}
    report = {
        "devices": [{"platform": "cuda", "name": "NVIDIA H200"}],
        "options": {"dtype": "bfloat16"},
        "matrix_product_flops_per_second": 7e14,
        "cases": [common | {"panel": "P", "series": "random blocks", "density": d} for d in (0.05, 0.2)],
    }
    written = plots.plot(report, tmp_path / "new")
    assert [path.name for path in written] == ["forward-density.png", "forward-length.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_filter_that_matches_nothing(script, capsys):
    assert script.run(["--only", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err
