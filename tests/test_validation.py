"""The validation tool on a CPU: its stages run, its verdicts cannot be had by skipping, crashes and hangs are told."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_bsk.__main__ import main
from jax_bsk.core import library
from jax_bsk.qa.benchmarking.attention import cases as grid
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.matmul import goals
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.support.git_tree import tree_hash
from jax_bsk.qa.testing.isolate import Worker
from jax_bsk.qa.validation import (
    analyse,
    benchmark,
    harden,
    kernels,
    markdown,
    numerics,
    products,
    profile,
    programs,
    provenance,
    report,
    runner,
    targets,
)
from jax_bsk.qa.validation.measured import Measured
from jax_bsk.qa.validation.outcome import Check, StageResult, Verdict, failed, passed, skipped, verdict_of
from jax_bsk.qa.validation.settings import CASES, DECODING, PACKED, PRODUCTS, STAGES, Clock, Level, Settings

ROOT = Path(__file__).parents[1]
FACTS = {
    "csrc_tree": "a",
    "package_tree": "b",
    "library_tree": "a",
    "implementation": "cpu",
    "device": {},
    "level": "full",
}


# ---- Provenance


def test_the_tree_hash_is_gits(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b.c").write_text("int x;\n")  # sorts between a folder "b" and what is in it
    (tmp_path / "b" / "one.h").write_text("")
    (tmp_path / "b" / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "b" / "deep" / "run.sh").chmod(0o755)

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    git("init", "-q")
    git("add", "-A")
    expected = git("write-tree")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "_cpu.so").write_text("")
    assert tree_hash(tmp_path) == expected


def test_the_library_says_which_sources_it_was_built_from():
    native = library.load("cpu")
    assert native.info["source_tree"] == tree_hash(ROOT / "csrc"), "rebuild: `make build`"
    assert provenance.collect()["package_tree"] == tree_hash(ROOT / "jax_bsk")


# ---- Verdicts


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ([], Verdict.SKIPPED),
        ([passed("a")], Verdict.PASSED),
        ([passed("a"), skipped("b", "no GPU")], Verdict.SKIPPED),
        ([passed("a"), skipped("b", "no ncu", required=False)], Verdict.PASSED),
        ([skipped("b", "no ncu", required=False)], Verdict.SKIPPED),
        ([passed("a"), skipped("b", "no GPU"), failed("c", "wrong")], Verdict.FAILED),
        ([Check("c", Verdict.FAILED, required=False)], Verdict.FAILED),
    ],
)
def test_a_stage_cannot_pass_by_skipping(checks, expected):
    assert verdict_of(checks) is expected


def stages_that_passed(level: Level = Level.FULL) -> dict[str, StageResult]:
    facts = FACTS | {"level": level.value}
    return {name: StageResult(name, (passed("x"),), provenance=facts) for name in STAGES if name != "report"}


def test_what_is_cleared():
    full, quick = Settings(Path("x"), Level.FULL), Settings(Path("x"))
    assert report.assemble(full, stages_that_passed())["verdict"] == "cleared"
    assert report.assemble(quick, stages_that_passed(Level.QUICK))["verdict"] == "cleared (quick)"
    # What ran decides, not the call that puts the report together.
    raised = report.assemble(full, stages_that_passed(Level.QUICK))
    assert (raised["verdict"], raised["settings"]["level"]) == ("cleared (quick)", "quick")
    mixed = stages_that_passed() | {"harden": stages_that_passed(Level.QUICK)["harden"]}
    assert report.assemble(full, mixed)["verdict"] == "not cleared"
    assert all(word not in report.CPU_PASSED for word in ("cleared", "CLEARED"))
    missing = stages_that_passed()
    del missing["harden"]
    assert report.assemble(full, missing)["reasons"] == ["stage harden was not run"]
    for check, word in ((skipped("ncu", "absent"), "skipped: ncu"), (failed("ncu", "bad"), "failed: ncu")):
        stages = stages_that_passed()
        stages["profile"] = dataclasses.replace(stages["profile"], checks=(passed("y"), check))
        found = report.assemble(full, stages)
        assert found["verdict"] == "not cleared"
        assert found["reasons"] == [f"stage profile {word}"]
    other = stages_that_passed()
    other["validate"] = dataclasses.replace(other["validate"], provenance=FACTS | {"csrc_tree": "older"})
    assert report.assemble(full, other)["reasons"] == ["the stages are of different code or machines"]


def stages_without_a_gpu(level: Level = Level.QUICK) -> dict[str, StageResult]:
    stages = stages_that_passed(level)
    return stages | {"analyse": dataclasses.replace(stages["analyse"], checks=(analyse.gpu_check(False), passed("x")))}


@pytest.mark.parametrize("level", Level)
def test_without_a_gpu_the_verdict_is_of_the_cpu(level):
    found = report.assemble(Settings(Path("x"), level), stages_without_a_gpu(level))
    assert found["verdict"] == "CPU: passed; CUDA: not looked at"
    assert found["reasons"] == ["the CUDA kernels were not looked at, because JAX runs on no NVIDIA GPU here"]
    assert found["settings"]["level"] == level.value


@pytest.mark.parametrize(
    ("check", "word"),
    [(skipped("cases", "the time was over"), "skipped: cases"), (failed("cases", "bad"), "failed: cases")],
)
def test_without_a_gpu_all_the_rest_must_have_passed(check, word):
    gpu = "stage analyse skipped: a GPU"
    stages = stages_without_a_gpu()
    stages["validate"] = dataclasses.replace(stages["validate"], checks=(passed("y"), check))
    found = report.assemble(Settings(Path("x")), stages)
    assert (found["verdict"], found["reasons"]) == ("not cleared", [gpu, f"stage validate {word}"])
    stages = stages_without_a_gpu()
    del stages["harden"]
    found = report.assemble(Settings(Path("x")), stages)
    assert (found["verdict"], found["reasons"]) == ("not cleared", ["stage harden was not run", gpu])
    # Another check of the same stage that was skipped is not excused by the missing GPU.
    stages = stages_without_a_gpu()
    checks = (*stages["analyse"].checks, skipped("copy bandwidth", "no time"))
    stages["analyse"] = dataclasses.replace(stages["analyse"], checks=checks)
    assert report.assemble(Settings(Path("x")), stages)["verdict"] == "not cleared"


def test_a_gpu_can_be_required(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert runner.platform() == "cpu"
    assert main(["validate", "--require-gpu", "--out", str(tmp_path / "out")]) == 2
    assert "runs on cpu here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(runner, "platform", lambda: "cuda")
    monkeypatch.setattr(runner, "run", lambda settings, stages, on_result: [StageResult("report", (passed("x"),))])
    assert main(["validate", "--require-gpu", "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("check", "status"), [(passed("x"), 0), (failed("x", "wrong"), 1)])
def test_the_exit_status_without_a_gpu(check, status, tmp_path, monkeypatch, capsys):
    """The stages are made up; the report of them is real."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("jax_bsk.qa.validation.plots.draw", lambda report, folder: [])

    def run(settings: Settings, stages: list[str], *, on_result: Any) -> list[StageResult]:
        settings.results.mkdir(parents=True)
        results = stages_without_a_gpu()
        results["harden"] = dataclasses.replace(results["harden"], checks=(check,))
        device = {"platform": "cpu", "id": 0, "name": "a processor"}
        for name, result in results.items():
            whole = dataclasses.replace(result, provenance=result.provenance | {"versions": {}, "device": device})
            (settings.results / f"{name}.json").write_text(json.dumps(whole.to_json()))
        return [*results.values(), report.run(settings, Clock(60))]

    monkeypatch.setattr(runner, "run", run)
    assert main(["validate", "--quick", "--out", str(tmp_path)]) == status
    text = capsys.readouterr().out
    assert ("CPU: PASSED; CUDA: NOT LOOKED AT" in text) == (status == 0)
    assert ("NOT CLEARED" in text) == (status == 1)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] in (report.CPU_PASSED, "not cleared")


def test_results_survive_json():
    result = StageResult("validate", (passed("a", "b"), skipped("c", "d", required=False)), {"x": float("nan")}, 1, 2)
    back = StageResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert back.checks == result.checks
    assert back.data == {"x": "nan"}


# ---- The run


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What `python -m jax_bsk validate` does without a GPU, less the stage that repeats what other tests do."""
    out = tmp_path_factory.mktemp("validation")
    command = [
        sys.executable,
        "-m",
        "jax_bsk",
        "validate",
        "--quick",
        "--seed",
        "5",
        "--out",
        str(out),
    ]
    for stage in STAGES:
        command += [] if stage == "harden" else ["--stage", stage]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False), out


def test_a_quick_run_without_a_gpu(quick_run):
    result, out = quick_run
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["schema"] == report.SCHEMA
    assert found["verdict"] == "not cleared"
    assert found["reasons"] == ["stage harden was not run", "stage analyse skipped: a GPU"]
    assert "NOT CLEARED" in result.stdout
    assert found["provenance"]["csrc_tree"] == tree_hash(ROOT / "csrc")
    numbers = found["stages"]["validate"]["data"]
    assert numbers["forward_cases"] >= CASES["cpu", Level.QUICK]
    assert 0 < numbers["backward_cases"] < numbers["forward_cases"]
    products_of = numbers["matmul"]
    assert products_of["forward_cases"] >= PRODUCTS["cpu", Level.QUICK]
    assert 0 < products_of["backward_cases"] < products_of["forward_cases"]
    assert numbers["decode"]["forward_cases"] >= DECODING["cpu", Level.QUICK]
    assert numbers["decode"]["backward_cases"] == 0
    assert numbers["packed"]["forward_cases"] >= PACKED["cpu", Level.QUICK]
    counts = numbers["histogram"]["counts"]
    assert sum(counts["out"]) == numbers["forward_cases"]
    assert sum(counts["dq"]) == numbers["backward_cases"]
    assert sum(entry["cases"] for entry in numbers["by_dtype"].values()) == numbers["forward_cases"]
    measured = found["stages"]["benchmark"]["data"]["matmul"]
    assert [case["operation"] for case in measured["cases"]] == ["forward", "ddata"]
    assert all("seconds" in case["contenders"]["jax_bsk"] for case in measured["cases"])
    assert measured["not_measured"] == measured["goals"] == []
    for case in found["stages"]["benchmark"]["data"]["cases"]:
        assert case["floor"]["times_floor"] > 0
        assert case["floor"]["floor_seconds"] * case["floor"]["times_floor"] == pytest.approx(
            case["jax_bsk"]["seconds"]
        )


def test_what_a_run_writes(quick_run):
    _, out = quick_run
    text = (out / "report.md").read_text()
    found = json.loads((out / "report.json").read_text())
    for stage in found["stages"].values():
        for check in stage["checks"]:
            assert check["name"] in text
    with (out / "numerics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} <= {"passed", "refused"}
    random = [row for row in rows if row["seed or name"].isdigit()]
    assert sum(row["verdict"] == "passed" for row in random) == found["stages"]["validate"]["data"]["forward_cases"]
    with (out / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"jax_bsk", "xla"} <= {row["contender"] for row in rows}
    with (out / "matmul.csv").open() as file:
        assert {row["contender"] for row in csv.DictReader(file)} == {"jax_bsk", "dense", "dense-random"}
    for name in ("matmul", "decode", "packed"):
        with (out / f"numerics-{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == found["stages"]["validate"]["data"][name]["forward_cases"]
        assert {row["verdict"] for row in rows} == {"passed"}
    pytest.importorskip("matplotlib")
    for name in ("roofline.png", "errors.png", "forward-density.png", "matmul.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text


def test_options_that_make_no_sense(capsys):
    assert main(["validate", "--cases", "0"]) == 2
    assert "--cases" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["validate", "--stage", "nonsense"])


def test_a_stage_that_crashes_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no-such-platform")
    settings = Settings(tmp_path, quiet=True)
    (result,) = runner.run(settings, ["analyse"])
    assert result.verdict is Verdict.FAILED
    assert "status 1" in result.checks[0].detail
    assert runner.load(settings)["analyse"].verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("program", "what"),
    [("import sys; sys.stdin.readline(); sys.exit(3)", "status 3"), ("import time; time.sleep(60)", "does not end")],
)
def test_a_worker_that_dies_or_hangs_is_a_failed_case(program, what):
    worker = Worker("cpu", 1.0, command=[sys.executable, "-c", program])
    (record,) = list(numerics._records(worker, "7", gradients=True))
    assert not record["ok"]
    assert what in record["text"]
    check = numerics._judge("random", [record], "cpu", 1)
    assert check.verdict is Verdict.FAILED
    assert "python -m jax_bsk.qa.testing --seed 7 --draw 0" in check.detail


def test_too_few_cases_are_not_a_pass():
    record = {"task": "1", "draw": 0, "ok": True, "gradients": True, "case": {}, "results": []}
    assert numerics._judge("random", [record], "cpu", 2).verdict is Verdict.SKIPPED
    assert numerics._judge("random", [record], "cpu", 1).verdict is Verdict.PASSED


def test_refusals_alone_and_fewer_cases_than_the_level_asks_for_are_not_a_pass(tmp_path, monkeypatch):
    refused = [{"task": name, "draw": 0, "gradients": True, "case": {}, "refused": "no"} for name in ("a", "b")]
    assert numerics._judge("corner cases", refused, "cpu", 1).verdict is Verdict.SKIPPED
    monkeypatch.setattr(numerics, "CORNER_CASES", {"one-token": None})
    one = {"draw": 0, "ok": True, "gradients": True, "case": {}, "results": []}
    tasks = ("one-token", "3", "matmul:3", "decode:3")
    monkeypatch.setattr(numerics, "_answers", lambda *a: iter([one | {"task": task} for task in tasks]))
    result = numerics.run(Settings(tmp_path, cases=1, quiet=True), Clock(60))
    verdicts = {check.name: check.verdict for check in result.checks}
    assert verdicts == {
        "corner cases": Verdict.PASSED,
        "random cases from seed 0": Verdict.SKIPPED,
        "products: random cases from seed 0": Verdict.SKIPPED,
        "decoding: random cases from seed 0": Verdict.SKIPPED,
        "packed: random cases from seed 0": Verdict.SKIPPED,
    }


def test_tasks_are_given_out_until_each_suite_has_enough(tmp_path):
    attention, matmul, decode, packed = suites = numerics.suites(Settings(tmp_path, Level.FULL, cases=3), "cuda")
    assert (attention.wanted, matmul.wanted) == (3, PRODUCTS["cuda", Level.FULL])
    assert (decode.wanted, packed.wanted) == (DECODING["cuda", Level.FULL], PACKED["cuda", Level.FULL])
    taken = dict.fromkeys(suites, 0)
    tasks = numerics._tasks(40, taken)
    corners = [next(tasks) for suite in suites for _ in suite.corners]
    assert {"one-token", "matmul:one-number", "decode:prompts", "packed:streaming"} <= set(corners)
    assert [next(tasks) for _ in range(5)] == ["40", "matmul:40", "decode:40", "packed:40", "41"]
    taken[attention] = 3
    second = [f"{name}:{seed}" for seed in (41, 42) for name in ("matmul", "decode", "packed")]
    assert [next(tasks) for _ in range(6)] == second
    taken[matmul] = taken[decode] = taken[packed] = 600
    assert list(tasks) == []
    (record,) = (
        {"task": "matmul:7", "draw": 1, "ok": False, "gradients": True, "case": {}, "results": [], "text": ""},
    )
    check = numerics._judge("random", [record], "cuda", 1)
    assert "python -m jax_bsk.qa.testing matmul --seed 7 --draw 1 --implementation cuda" in check.detail
    check = numerics._judge("random", [record | {"task": "decode:7"}], "cuda", 1)
    assert "python -m jax_bsk.qa.testing.decode --cases 1 --seed 7 --implementation cuda --multi" in check.detail
    check = numerics._judge("random", [record | {"task": "packed:7"}], "cuda", 1)
    assert "python -m jax_bsk.qa.testing packed --seed 7 --draw 1 --implementation cuda" in check.detail


def test_programs_of_other_sources_are_no_evidence(tmp_path):
    settings = Settings(tmp_path, programs=tmp_path)
    program = tmp_path / "cuda_check"
    for tree, found in ((provenance.source_tree(), program), ("0" * 40, None)):
        program.write_text(f'#!/bin/sh\n[ "$1" = tree ] && echo {tree}\n')
        program.chmod(0o755)
        assert programs.find(settings, "cuda_check") == found
    assert programs.find(settings, "cuda_racecheck") is None
    check = programs.provide(dataclasses.replace(settings, level=Level.FULL), Clock(60), on_gpu=True)
    assert check.verdict is Verdict.FAILED
    assert "cuda_check, cuda_racecheck" in check.detail


def test_which_comparison_of_a_check_program_failed_is_told(tmp_path):
    program = tmp_path / "cuda_check"
    program.write_text(f"""#!/bin/sh
case "$1" in
tree) echo {provenance.source_tree()} ;;
list) echo full regimes-0-39 ;;
full) exit 0 ;;
*) echo " seed 3: batch 1"; echo " hopper"; echo "  dq max error 1   <-- FAILED"; echo "        got 1 want 2"
   for i in $(seq 99); do echo "  dv right"; done; exit 1 ;;
esac
""")
    program.chmod(0o755)
    settings = Settings(tmp_path, programs=tmp_path, level=Level.FULL, jobs=1)
    (named, regimes), data = kernels.check_cases(settings, Clock(60), "cuda")
    assert named.verdict is Verdict.PASSED
    assert regimes.verdict is Verdict.FAILED
    assert "seed 3: batch 1\n  dq max error 1   <-- FAILED\n        got 1 want 2\n[...]\n" in regimes.detail
    assert len(regimes.detail) < 1000
    assert data["failed"] == ["regimes-0-39"]


def test_a_benchmark_that_is_cut_short_is_not_a_pass(tmp_path, monkeypatch):
    sets = benchmark.case_sets(Level.QUICK, on_gpu=False, seed=0)
    monkeypatch.setattr(benchmark, "case_sets", lambda *arguments: {"forward": sets["forward"]})
    result = benchmark.run(Settings(tmp_path, peers=False, quiet=True), Clock(-1))
    assert result.verdict is Verdict.SKIPPED
    assert len(result.data["cases"]) == 1
    assert result.data["matmul"]["cases"] == []
    verdicts = {check.name: check.verdict for check in result.checks}
    assert verdicts["results of the products"] is Verdict.SKIPPED


def test_harden_goes_on_after_the_part_that_was_cut_short(tmp_path, monkeypatch):
    calls = []

    def part(name, verdict=Verdict.PASSED):
        def run(*arguments):
            calls.append(name)
            return [Check(name, verdict)], {"of": name}

        return run

    def cut_short(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(provenance, "implementation", lambda: "cpu")
    monkeypatch.setattr(harden, "_repeats", part("repeats", Verdict.FAILED))
    monkeypatch.setattr(harden, "_products", part("products", Verdict.SKIPPED))
    monkeypatch.setattr(harden, "_decoding", part("decoding"))
    monkeypatch.setattr(harden, "_faults", cut_short)
    monkeypatch.setattr(harden, "_processes", part("memory"))
    settings = Settings(tmp_path, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        harden.run(settings, Clock(60))
    monkeypatch.setattr(harden, "_faults", part("faults"))
    found = harden.run(dataclasses.replace(settings, resume=True), Clock(60))
    # What failed is kept, what was skipped is tried again.
    assert calls == ["repeats", "products", "decoding", "products", "faults", "memory"]
    assert [check.name for check in found.checks] == ["repeats", "products", "decoding", "faults", "memory"]
    assert found.checks[0].verdict is Verdict.FAILED
    assert found.data["repeats"] == {"of": "repeats"}


def test_a_benchmark_that_was_cut_short_is_resumed(tmp_path, monkeypatch):
    forward = benchmark.case_sets(Level.QUICK, on_gpu=False, seed=0)["forward"][:2]
    monkeypatch.setattr(benchmark, "case_sets", lambda *arguments: {"forward": forward})
    monkeypatch.setattr(products, "chosen", lambda *arguments: [])
    settings = Settings(tmp_path, peers=False, quiet=True)
    (first,) = benchmark.run(settings, Clock(-1)).data["cases"]
    resumed = benchmark.run(dataclasses.replace(settings, resume=True), Clock(1000))
    assert resumed.data["taken_up"] == 1
    assert [case["name"] for case in resumed.data["cases"]] == [case.name for case in forward]
    assert resumed.data["cases"][0]["jax_bsk"]["seconds"] == first["jax_bsk"]["seconds"]
    assert Measured(dataclasses.replace(settings, resume=True), "benchmark").taken_up == 2
    # Of other options, of other code, or without being asked: from the beginning.
    assert Measured(dataclasses.replace(settings, resume=True, seed=1), "benchmark").taken_up == 0
    monkeypatch.setattr(provenance, "collect", lambda: {"csrc_tree": "another"})
    assert Measured(dataclasses.replace(settings, resume=True), "benchmark").taken_up == 0
    assert Measured(settings, "benchmark").taken_up == 0
    assert not (settings.results / "benchmark.jsonl").exists()


def test_cases_of_one_name_are_measured_in_every_pass(tmp_path, monkeypatch):
    sets = benchmark.case_sets(Level.FULL, on_gpu=False, seed=0)
    (case,) = sets["forward"][:1]
    (same,) = [other for other in sets["backward"] if other.name == case.name][:1]
    monkeypatch.setattr(benchmark, "case_sets", lambda *arguments: {"forward": [case], "backward": [same]})
    monkeypatch.setattr(products, "chosen", lambda *arguments: [])
    settings = Settings(tmp_path, peers=False, quiet=True)
    forward, backward = benchmark.run(settings, Clock(1000)).data["cases"]
    assert (forward["set"], backward["set"]) == ("forward", "backward")
    assert backward["useful_flops"] == pytest.approx(2.5 * forward["useful_flops"])
    assert backward["jax_bsk"]["seconds"] != forward["jax_bsk"]["seconds"]
    resumed = benchmark.run(dataclasses.replace(settings, resume=True), Clock(1000)).data
    assert resumed["taken_up"] == 2
    assert [case["jax_bsk"]["seconds"] for case in resumed["cases"]] == [
        case["jax_bsk"]["seconds"] for case in (forward, backward)
    ]


@pytest.mark.parametrize("what", ["products", "decoding"])
def test_products_and_decoding_that_hang_or_crash_fail(what, tmp_path, monkeypatch):
    program = "import sys; sys.stdin.readline(); sys.exit('illegal memory access')"
    broken = functools.partial(Worker, command=[sys.executable, "-c", program])
    monkeypatch.setattr(harden, "Worker", broken)
    checks, data = getattr(harden, f"_{what}")(Settings(tmp_path), Clock(60), "cuda")
    assert [check.name for check in checks] == [f"bit-equal {what}", f"memory of {what}"]
    assert all(check.verdict is Verdict.FAILED and "illegal memory access" in check.detail for check in checks)
    assert data["unequal"] == data["shapes"]
    assert "device_growth_bytes" not in data


# ---- Arithmetic


def test_the_floor():
    record = {
        "pass": "forward",
        "batch": 2,
        "heads": 8,
        "kv_heads": 2,
        "length": 1024,
        "head_dim": 64,
        "dtype": "bfloat16",
        "useful_flops": 1e9,
        "jax_bsk": {"seconds": 1e-3},
    }
    moved = 2 * (2 * 8 + 2 * 2) * 2 * 1024 * 64 + 4 * 2 * 8 * 1024
    slow_memory = targets.floor(record, 1e15, 1e9)
    assert slow_memory["bytes"] == moved
    assert slow_memory["floor_seconds"] == pytest.approx(moved / 1e9)
    slow_products = targets.floor(record, 1e12, 1e15)
    assert slow_products["floor_seconds"] == pytest.approx(1e-3)
    assert slow_products["times_floor"] == pytest.approx(1.0)
    assert slow_products["seconds_per_head"] == pytest.approx(1e-3 / 16)


def test_tiers():
    records = [{"density": d, "jax_bsk": {"seconds": s}} for d, s in ((0.1, 4e-3), (0.5, 12e-3), (1.0, 20e-3))]
    found = {tier["milliseconds"]: tier for tier in grid.met_tiers(records)}
    assert set(found) == set(grid.TIERS)
    assert found[14.0]["met_at_density"] == 0.5
    assert found[14.0]["interpolated_density"] == pytest.approx(0.625)
    assert found[5.0]["met_at_density"] == 0.1
    assert found[5.0]["interpolated_density"] == pytest.approx(0.15)
    assert grid.met_tiers([records[2]])[0]["met_at_density"] is None


def test_the_cases_of_a_full_run():
    sets = benchmark.case_sets(Level.FULL, on_gpu=True, seed=0)
    shapes = {(c.batch, c.heads, c.length, c.head_dim) for c in sets["micro"]}
    assert shapes == {(16, heads, 512, 64) for heads in (8, 16, 32, 64, 128)}
    for name, which in (("grid, forward", Pass.FORWARD), ("grid, backward", Pass.BACKWARD)):
        cases = sets[name]
        assert {c.length for c in cases} == {4096, 8192, 16384, 32768}
        assert all(c.measured is which for c in cases)
        densities = sorted(c.density for c in cases if c.length == 8192)
        assert densities == pytest.approx([0.1, 0.22, 0.3, 0.5], abs=1e-3)
    assert {(c.batch, c.heads, c.length, c.head_dim, c.dtype) for c in sets["tiers"]} == {
        (16, 96, 4096, 128, "float16")
    }
    assert max(c.density for c in sets["tiers"]) == 1


def test_the_products_of_a_full_run():
    cases = products.chosen(Level.FULL, on_gpu=True)
    assert len({case.name for case in cases}) == len(cases) == 12
    # The goals' cases come first.
    assert {(case.config.size, case.config.sparsity) for case in cases[:8]} == {(8192, 0.78)}
    assert {case.operation for case in cases[:8]} == set(Operation)
    assert {case.config.sparsity for case in cases[8:]} == {0.5, 0.9}
    slow = [case.name for case in cases if "cusparse-csr" in products.contenders(case, peers=True)]
    assert slow == ["forward 8192 sparsity 0.78 block 128 bfloat16"]
    assert products.contenders(cases[0], peers=False) == ("jax_bsk", "dense", "dense-random")


def product_record(operation: str, block: int, **seconds: float) -> dict:
    flops = 2 * 8192**3 * 0.22
    found: dict[str, dict[str, Any]] = {
        name.replace("_", "-"): {"seconds": s, "useful_flops_per_second": flops / s} for name, s in seconds.items()
    }
    found["jax_bsk"] = found.pop("jax-bsk", {"failed": "no such kernel"})
    config = {"size": 8192, "sparsity": 0.78, "block": block, "dtype": "bfloat16"}
    return config | {"operation": operation, "density": 0.22, "contenders": found}


def test_goals_of_products():
    gpu = {"platform": "cuda", "name": "NVIDIA H200"}
    records = [
        product_record("forward", 128, jax_bsk=3.6e-4, dense=1.4e-3, dense_random=1.3e-3, torch_bsr=8e-4),
        product_record("ddata", 128, jax_bsk=4e-4),
        product_record("forward", 64),
    ]
    rows = goals.judge(records, gpu)
    found = {(row["case"].split()[0], row["case"].split()[5], row["measure"]): row for row in rows}
    assert len(found) == len(rows) == 10
    forward = [row for key, row in found.items() if key[:2] == ("forward", "128")]
    assert [row["verdict"] for row in forward] == ["met", "met", "missed", "met", "missed", "met", "open"]
    assert forward[0]["measured"] == pytest.approx(2 * 8192**3 * 0.22 / 3.6e-4 / 1e12)
    assert forward[1]["measured"] == pytest.approx(0.22 * 1.4 / 0.36, rel=1e-3)
    assert forward[4]["measured"] == pytest.approx(1.3 / 0.36)
    assert found["ddata", "128", "rate / the forward's"]["measured"] == pytest.approx(0.9)
    assert found["forward", "64", "useful TFLOP/s"]["verdict"] == "missed"  # it failed
    assert found["ddata", "64", "rate / the forward's"]["verdict"] == "open"  # it was not run
    assert goals.judge(records, {"platform": "cuda", "name": "NVIDIA A100"}) == []
    (cpu,) = goals.judge(records, {"platform": "cpu", "name": "x", "cores": 2})
    assert (cpu["verdict"], cpu["least"]) == ("open", 3)
    data = {"cases": records, "not_measured": ["the rest"], "goals": rows}
    text = "\n".join(markdown._products(data))
    assert "| Y = W X | 8,192 | 78 % | 128 | bfloat16 | 0.36 ms | 672 | 0.86 | 3.89x | 3.61x | 2.22x | - |" in text
    assert "times faster than dense >= 3.8 | met | 3.89" in text
    assert markdown._products(None) == []
    # A peer that was timed though its result is beyond the tolerance says so.
    records[0]["contenders"]["cusparse-csr"] = {"seconds": 0.09, "inexact": 1.7}
    assert "| 2.22x | 250x (inexact) |" in "\n".join(markdown._products(data))
    assert goals.judge(records, gpu)[6]["measured"] == pytest.approx(250)


NCU = "\n".join(
    (
        "==PROF== Connected",
        '"ID","Kernel Name",' + ",".join(f'"{name}"' for name in profile.COUNTERS),
        '"","","%","%","%","%","%"',
        '"0","void sm90::ForwardKernel<X>(Params)","71","81.5","1,012.25","3","18.7"',
    )
)


def test_counters_are_read():
    (found,) = profile.parse(NCU)
    numbers = {"tensor_pipe": 71, "sm": 81.5, "dram": 1012.25, "l2": 3, "occupancy": 18.7}
    assert found == {"kernel": "void sm90::ForwardKernel<X>(Params)"} | numbers
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_tables_escape_what_markdown_would_read():
    assert markdown.table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
