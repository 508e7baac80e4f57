"""The command line: what it prints, its JSON, its exit status, and that it works where nothing is built."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk.__main__ import main
from jax_bsk.cli import bench as bench_command
from jax_bsk.core import dispatch, library
from jax_bsk.qa.benchmarking import ceilings, timing
from jax_bsk.qa.benchmarking.attention import ours
from jax_bsk.qa.support import progress
from jax_bsk.qa.support.table import table

TINY = ["--lengths", "128", "--densities", "1", "--batch", "1", "--heads", "2", "--head-dim", "32"]
TINY += ["--block-size", "64", "--repeats", "1", "--quiet"]
MATRIX_PRODUCT_RATE = ceilings.matrix_product_rate
NATIVE = "xla" if dispatch.unavailable("cpu") else "cpu"  # compiles faster than the pure-JAX one


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Tests look at what is reported, not at how fast it was."""
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(ceilings, "matrix_product_rate", lambda dtype, seed: 1e11)


def bench(*options: str) -> int:
    # jax.nn.dot_product_attention does not run in 16 bits under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return main(["bench", *TINY, "--implementation", NATIVE, *options])


# --- info


def test_info_names_versions_devices_and_implementations(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"jax_bsk {jax_bsk.__version__}" in text
    for word in ("python", "jaxlib", "numpy", "cpu 0", "FFI API", *dispatch.IMPLEMENTATIONS):
        assert word in text


def test_info_json_has_every_reason(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["implementations"]) == set(dispatch.IMPLEMENTATIONS)
    for name, implementation in facts["implementations"].items():
        assert implementation["available"] == (not implementation["reasons"])
        assert implementation["reasons"] == dispatch.unavailable(name)
    assert facts["devices"]


def test_info_brief_is_a_line_an_implementation(capsys):
    assert main(["info", "--brief"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(dispatch.IMPLEMENTATIONS)


def test_info_of_a_cuda_library(capsys, monkeypatch):
    facts = {
        "version": "0.1.0",
        "ffi_api": [0, 3],
        "dtypes": ["float16", "bfloat16"],
        "architectures": "80-real;90a-real",
        "min_compute_capability": 80,
        "head_dim_multiple": 8,
        "max_head_dim": 256,
        "blocks": [64, 128],
    }
    monkeypatch.setattr(library, "load", lambda platform: library.Library(platform, facts, None))
    main(["info"])
    text = capsys.readouterr().out
    for words in (
        "80-real;90a-real",
        "64 or 128",
        "up to 256, multiples of 8",
        "compute capability 8.0",
        "FFI API 0.3",
    ):
        assert words in text


def test_info_in_a_source_tree_without_libraries_says_what_to_do(tmp_path):
    package = Path(jax_bsk.__file__).parent
    shutil.copytree(package, tmp_path / "jax_bsk", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    # The copy must win over an editable installation, whose import hook -S leaves out.
    paths = [str(tmp_path), *(p for p in sys.path if "site-packages" in p)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for options, count in (([], 1), (["--brief"], 3)):
        command = [sys.executable, "-S", "-m", "jax_bsk", "info", *options]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "cpu   not available" in result.stdout
        assert "run `make build`" in result.stdout
        assert len(result.stdout.splitlines()) >= count


def test_info_when_jax_does_not_start(tmp_path):
    command = [sys.executable, "-m", "jax_bsk", "info"]
    result = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "JAX does not start its platform" in result.stdout


# --- bench


def test_bench_prints_and_writes_everything(capsys, tmp_path):
    path = tmp_path / "new" / "bench.json"
    assert bench("--patterns", "random", "causal", "window", "dense", "--output", str(path), "--seed", "3") == 0
    text = capsys.readouterr().out
    assert "speed-up" in text
    assert "WRONG" not in text
    report = json.loads(path.read_text())
    assert report["seed"] == 3
    assert report["implementation"] == NATIVE
    assert {"versions", "devices", "method", "options"} <= set(report)
    assert len(report["cases"]) == 2 * 4
    for case in report["cases"]:
        mine, peer = case["jax_bsk"], case["peers"]["xla"]
        flops = 4 * 1 * 2 * 128 * 128 * 32 * case["density"] * {"forward": 1, "forward+backward": 3.5}[case["pass"]]
        assert case["useful_flops"] == pytest.approx(flops)
        assert mine["useful_flops_per_second"] == pytest.approx(flops / mine["seconds"])
        assert peer["ratio"] == pytest.approx(peer["seconds"] / mine["seconds"])
        results = mine["check"].get("results", {"out": mine["check"]})
        assert set(results) == {"out"} | ({"dquery", "dkey", "dvalue"} if case["pass"] != "forward" else set())
        assert mine["temp_bytes"] >= 0
        assert case["ok"]
    causal = next(case for case in report["cases"] if case["pattern"] == "causal")
    assert causal["density"] == pytest.approx(129 / 256)
    assert causal["block_density"] == 0.75


def found_by_bench(**changes) -> dict:
    """A made-up report of `bench`, as far as its last lines read it."""
    peers = {"xla": {"ratio": 3.0}, "cudnn": {"refused": "no GPU"}}
    mine = {"seconds": 1e-3, "useful_flops_per_second": 4e10}
    case = {"name": "128 tokens, random", "pass": "forward", "ok": True, "jax_bsk": mine, "peers": peers}
    found = {
        "implementation": "cpu",
        "options": {"block_size": 64, "passes": ["forward", "forward+backward"]},
        "devices": [{"platform": "cpu"}],
        "matrix_product_flops_per_second": 1e11,
        "cases": [case, case | {"pass": "forward+backward"}],
    }
    return found | changes


def test_what_to_try_next():
    usual = bench_command.next_steps(found_by_bench())
    assert len(usual) == 2
    assert "`--block-size 128`" in usual[0]
    assert "of 128 tokens, random, was 40% of a plain matrix product's" in usual[0]
    assert usual[1] == (
        "`python -m jax_bsk validate --quick` checks results, repeats and faults of the CPU kernels; the CUDA kernels "
        "need an NVIDIA GPU."
    )
    on_gpu = {"block_size": 128, "passes": ["forward", "forward+backward"]}
    steps = bench_command.next_steps(found_by_bench(options=on_gpu, devices=[{"platform": "cuda"}]))
    assert "`--block-size 64`" in steps[0]
    assert steps[1].endswith("this GPU's kernels.")
    forward_only = bench_command.next_steps(found_by_bench(options={"block_size": 64, "passes": ["forward"]}))
    assert forward_only[1] == "The same with `--backward` times the gradients, too."
    lost = found_by_bench()
    lost["cases"][0] = lost["cases"][0] | {"peers": {"xla": {"ratio": 0.5}}}
    assert "where xla won (128 tokens, random, forward: 0.50x)" in bench_command.next_steps(lost)[0]
    fallback = found_by_bench(implementation="xla")
    assert len(bench_command.next_steps(fallback)) == 3
    assert "`python -m jax_bsk info` says why" in bench_command.next_steps(fallback)[0]
    assert bench_command.next_steps(fallback, named="xla") == usual
    wrong = found_by_bench()
    wrong["cases"][0] = wrong["cases"][0] | {"ok": False}
    assert "--stage validate` finds" in bench_command.next_steps(wrong)[0]
    nothing = found_by_bench(cases=[])
    assert bench_command.next_steps(nothing) == usual[1:]


@pytest.mark.parametrize("options", [["--dtype", "bfloat16", "--kv-heads", "1"], ["--implementation", "xla"]])
def test_bench_accepts_right_results(options, capsys):
    assert bench(*options) == 0, capsys.readouterr().out


def test_matrix_product_rate_is_a_rate():
    assert 1e8 < MATRIX_PRODUCT_RATE("float32", 0) < 1e16


def test_forward_only(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench("--forward-only", "--output", str(path)) == 0
    last = capsys.readouterr().out.split("\nNext:\n")[1].splitlines()
    assert last[1] == "  The same with `--backward` times the gradients, too."
    assert {case["pass"] for case in json.loads(path.read_text())["cases"]} == {"forward"}


@pytest.mark.parametrize("wrong", ["nan", "off", "gradient"])
def test_bench_fails_on_wrong_results(wrong, monkeypatch, capsys, tmp_path):
    right = ours.sparse_attention

    def sparse_attention(query, *args, **kwargs):
        out = right(query, *args, **kwargs)
        if wrong == "nan":
            return out.at[0, 5].set(jnp.nan)
        if wrong == "off":
            return out.at[0, 5, 0, 0].add(1e-3)
        return out + 1e-2 * (query - jax.lax.stop_gradient(query))  # the value is right, its gradient is not

    monkeypatch.setattr(ours, "sparse_attention", sparse_attention)
    path = tmp_path / "bench.json"
    assert bench("--output", str(path)) == 1
    assert "WRONG" in capsys.readouterr().out
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no bare NaN, which is not JSON


def test_bench_reports_a_failing_implementation(monkeypatch, capsys):
    def sparse_attention(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

    monkeypatch.setattr(ours, "sparse_attention", sparse_attention)
    assert bench() == 1
    assert "no memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--implementation", "cuda"], "cannot take this call"),
        (["--heads", "3", "--kv-heads", "2"], "multiple of --kv-heads"),
        (["--block-size", "48"], "multiple of 32"),
    ],
)
def test_bench_refuses(options, words, capsys):
    if "cuda" in options and not dispatch.unavailable("cuda"):
        pytest.skip("the CUDA kernels run here")
    assert bench(*options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--lengths", "0"], ["--densities", "1.5"], ["--dtype", "int8"], ["--what"]])
def test_bad_options_exit_with_usage(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench(*option)
    assert "usage" in capsys.readouterr().err


def test_bench_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    assert bench("--plot", str(path), "--patterns", "random", "dense") == 0
    assert path.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("density", [0.01, 0.1, 0.23, 0.5, 1.0])
def test_random_blocks_have_the_density(density):
    blocks = bench_command.random_blocks(200, density, np.random.default_rng(0))
    assert blocks.diagonal().all()
    assert blocks.mean() == pytest.approx(max(density, 1 / 200), rel=0.05)


def test_densities_below_the_diagonal_are_one_case():
    options = {
        "batch": 1,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 32,
        "dtype": "float32",
        "block_size": 64,
        "window": 16,
    }
    options |= {"patterns": ["random"], "densities": [0.05, 0.1, 1.0], "passes": ["forward"]}
    cases = bench_command.make_cases(options, 128, np.random.default_rng(0))
    assert [case.density for case in cases] == [0.5, 1.0]


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal(capsys, monkeypatch):
    with progress.Progress(2) as bar:
        bar.step("one")
        bar.note("a")  # too soon after the step
        monkeypatch.setattr(progress, "NOTE_SECONDS", 0.0)
        bar.note("b")
        bar.step("two")
        assert bar.done == 2
    assert capsys.readouterr().err.splitlines() == ["[1/2, 0 s] one", "[1/2, 0 s] one: b", "[2/2, 0 s] two"]
    with progress.Progress(1, quiet=True) as bar:
        bar.step("one")
        bar.note("a")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar_whose_clock_moves(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    with progress.Progress(2) as bar:
        bar.step("one")
        bar.note("a")
        before = terminal.tell()
        deadline = time.perf_counter() + 10
        while terminal.tell() == before and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert terminal.tell() > before
        bar.step("two")
    text = terminal.getvalue()
    assert "one: a:   0%" in text
    assert "two:  50%" in text


# --- parts


def test_interleaved_takes_turns():
    order = []
    calls = {name: lambda n, name=name: order.append((name, n)) for name in "ab"}
    timings = timing.interleaved(calls, 3, queued=False)
    assert {name: len(t.samples) for name, t in timings.items()} == {"a": 3, "b": 3}
    assert [name for name, _ in order] == list("abbaab")
    assert [n for name, n in order if name == "a"] == [0, 1, 2]


def test_timing_is_the_median():
    assert timing.Timing((3.0, 1.0, 2.0), 1).median == 2.0
    assert dataclasses.asdict(timing.Timing((1.0,), 7))["calls_per_sample"] == 7


def test_table_aligns():
    assert table(["a", "number"], [["long", "1.5x"], ["s", "-"]]) == (
        "a     number\n----  ------\nlong    1.5x\ns          -"
    )
