"""The numeric battery of decoding: what runs here against float64, its bits again and in another order of sequences.

`pytest tests/decode/test_battery.py --cases 2000` runs more; a failure prints the command that repeats it.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jax_bsk.core import dispatch
from jax_bsk.qa.testing.decode import __main__ as command
from jax_bsk.qa.testing.decode import battery, cases

# A program of "xla" takes a second or two to compile, so it gets some; the kit's command runs all of them.
SOME = {"mixed", "window-and-sink-tokens", "tree", "selected-in-a-window", "contiguous-selected", "no-keys"}


@pytest.fixture
def runs(implementation):
    if reasons := dispatch.unavailable(implementation):
        pytest.skip(" ".join(reasons))
    return implementation


@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner(name, runs):
    if runs == "xla" and name not in SOME:
        pytest.skip("some of them")
    battery.run_case(cases.CORNER_CASES[name], runs)


def test_random(random_seed, runs):
    if random_seed % {"cpu": 4, "xla": 40}[runs]:
        pytest.skip("every 4th seed, or 40th")
    battery.run_case(cases.random_case(random_seed), runs)


def test_float64(runs):
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        battery.run_case(dataclasses.replace(cases.CORNER_CASES["no-keys"], dtype="float64"), runs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner_on_a_gpu(name):
    battery.run_case(cases.CORNER_CASES[name], "cuda")


# ---- That the battery judges


@pytest.mark.parametrize("wrong", ["a key less", "a NaN less", "other bits", "another's bits"])
def test_what_is_wrong_is_found(wrong, monkeypatch):
    case = cases.CORNER_CASES["page-negative" if wrong == "a NaN less" else "decoding"]
    right, calls = battery._run, []

    def run(program, inputs):
        calls.append(1)
        if wrong == "a key less":
            inputs = inputs._replace(kv_lens=inputs.kv_lens - (inputs.kv_lens > 20))
        results = {name: x.copy() for name, x in right(program, inputs).items()}
        if wrong == "a NaN less":
            results["out"] = np.nan_to_num(results["out"])
        if len(calls) == {"other bits": 2, "another's bits": 3}.get(wrong):
            results["out"][0, 0, 0, 0] += 1e-6
        return results

    monkeypatch.setattr(battery, "_run", run)
    assert not battery.judge_case(case, "cpu").ok


def test_the_command_prints_a_line_per_failure_and_a_summary(capsys, monkeypatch):
    assert command.main(["--implementation", "cpu", "--case", "no-keys"]) == 0
    assert "cpu: 1 of 1 cases passed, 0 refused" in capsys.readouterr().out
    monkeypatch.setattr(battery, "oracle", lambda *_: 1 / 0)
    assert command.main(["--implementation", "cpu", "--cases", "2", "--seed", "5"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["FAIL", "seed-5:"], ["FAIL", "seed-6:"]]
    assert lines[2].startswith("cpu: 0 of 2 cases passed")
